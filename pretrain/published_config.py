"""The authors' `config.yml`: found beside a checkpoint, parsed as plain data, read field by field.

Every field is optional. What is there must have the right type, and must not contradict the weights
or an argument; what is missing is taken from the published recipe, and `origin` says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from configs.task import PublishedPartition, ScheduleConfig, StagedPartition
from data_pipelines.object_store import ObjectStore, absolute
from pretrain.partition import published_partition

CONFIG_NAME = "config.yml"
DEFAULT = "default of the published recipe"
ARGUMENT = "argument"
SHAPES = "shapes of the weights"

_PAPER = StagedPartition()  # whose stages both maps of time-steps share

_PARENTS_SEARCHED = 5  # from runs/DATA/NAME/config.yml up to the folder above `runs`, and one more
_CUT_KEYS = ("k", "k_per_stage", "stages", "dims_per_stage", "pdae_mode")
_UNET_FIELDS = {
    "input_channel": "in_channels",
    "base_channel": "base_channels",
    "channel_multiplier": "channel_multipliers",
    "num_residual_blocks_of_a_block": "num_res_blocks",
    "learn_sigma": "learn_sigma",
}

Mode = Literal["base", "stop_grad", "dual", "no_pdae"]
Model = TypeVar("Model", bound=BaseModel)


class LayoutError(ValueError):
    """A checkpoint or its config.yml is not as published; the message does not name the file."""


@dataclass(frozen=True, slots=True)
class PublishedConfig:
    """What a config.yml says. Without one, `values` is empty and `source` is None."""

    values: dict[str, Any]
    source: str | None
    denoiser_source: str | None = None
    """Where `denoise_fn_config` stands when that is the denoiser's own file."""

    @property
    def name(self) -> str:
        return self.source or CONFIG_NAME

    def where(self, section: str) -> str:
        """The file that a section stands in."""
        own = section == "denoise_fn_config" and self.denoiser_source
        return self.denoiser_source if own and self.denoiser_source else self.name

    def value(self, section: str, key: str) -> Any:
        """The value, or None when it, or its section, is not there."""
        inside = self.values.get(section)
        if inside is None:
            return None
        if not isinstance(inside, Mapping):
            raise LayoutError(f"{self.where(section)}: {section} must be a section, got {inside!r}")
        return inside.get(key)

    def whole(self, section: str, key: str) -> int | None:
        value = self.value(section, key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.wrong(section, key, "a whole number", value)

    def flag(self, section: str, key: str) -> bool | None:
        value = self.value(section, key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(section, key, "true or false", value)

    def real(self, section: str, key: str) -> float | None:
        """A number; YAML 1.1 reads 1e-4 as text, which is accepted."""
        value = self.value(section, key)
        if value is None:
            return None
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise self.wrong(section, key, "a number", value) from error

    def wholes(self, section: str, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers, or the same as text: `50,100,1000`."""
        value = self.value(section, key)
        if value is None:
            return None
        items = value if isinstance(value, list) else str(value).split(",")
        try:
            if any(isinstance(item, float) for item in items):
                raise ValueError("int() would cut its fraction")
            return tuple(int(item) for item in items)
        except (TypeError, ValueError) as error:
            raise self.wrong(section, key, "whole numbers separated by commas", value) from error

    def wrong(self, section: str, key: str, wanted: str, value: object) -> LayoutError:
        where = self.where(section)
        return LayoutError(f"{where}: {section}.{key} must be {wanted}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Heads:
    """What the weights do not tell about attention, and where it was found."""

    num_heads: int
    head_channels: int | None
    origin: str
    attention_order: Literal["legacy", "new"]
    order_origin: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the caller knows about a checkpoint; None where only the files should tell."""

    image_size_px: int | None = None
    num_heads: int | None = None
    head_channels: int | None = None
    attention_order: Literal["legacy", "new"] | None = None


def read_config(
    store: ObjectStore, given: str | Path | Mapping[str, Any] | None, checkpoint_url: str
) -> PublishedConfig:
    """The config that was given, the one beside the checkpoint or one folder up, or an empty one.

    A run's config names its denoiser's (`trained_ddpm_config`); when that file can be found its
    `denoise_fn_config` is taken over.

    Raises:
        LayoutError: it is no YAML mapping of plain values.
        StoreError: the given file cannot be read.
    """
    if isinstance(given, Mapping):
        return PublishedConfig(_plain(given, "the given config"), "the given config")
    url = absolute(str(given)) if given is not None else _find(store, checkpoint_url)
    if url is None:
        return PublishedConfig({}, None)
    values = _parse(store.read(url), url)
    denoiser = values.get("trained_ddpm_config")
    if "denoise_fn_config" in values or not isinstance(denoiser, str):
        return PublishedConfig(values, url)
    return _with_denoiser(store, values, denoiser, url)


def check_unet(config: PublishedConfig, fields: Mapping[str, Any]) -> None:
    """Refuse a config that describes another U-Net than `fields`, which the shapes gave."""
    for theirs, ours in _UNET_FIELDS.items():
        if theirs == "channel_multiplier":
            said = config.wholes("denoise_fn_config", theirs)
        else:
            said = config.value("denoise_fn_config", theirs)
        _check_same(config, "denoise_fn_config", theirs, said, fields[ours])
    said = config.wholes("denoise_fn_config", "attention_resolutions")
    if said is not None:  # a factor that the U-Net does not come down to changes nothing
        deepest = 2 ** (len(fields["channel_multipliers"]) - 1)
        there = tuple(sorted({factor for factor in said if factor <= deepest}))
        said = there if there == fields["attention_factors"] else tuple(sorted(set(said)))
    _check_same(
        config,
        "denoise_fn_config",
        "attention_resolutions",
        said,
        fields["attention_factors"],
    )


def check_encoder(config: PublishedConfig, *, latent_dim: int, image_size_px: int) -> None:
    """Refuse a config that describes another encoder than the shapes do."""
    for section in ("encoder_config", "decoder_config"):
        said = config.whole(section, "latent_dim")
        _check_same(config, section, "latent_dim", said, latent_dim)
    section, said = _image_size(config)
    _check_same(config, section, "image_size", said, image_size_px)


def find_image_size(config: PublishedConfig, arguments: Arguments) -> tuple[int | None, str]:
    """Image size of a denoiser, and its origin; the weights do not tell it."""
    section, said = _image_size(config)
    size = _agreed(config, section, "image_size", said, "image_size_px", arguments.image_size_px)
    if size is None:
        return None, "unknown"
    return size, config.name if said is not None else ARGUMENT


def find_heads(config: PublishedConfig, arguments: Arguments, *, needed: bool) -> Heads:
    """How attention splits its channels, which no shape tells.

    Raises:
        LayoutError: config and argument differ, or nobody says it although it is `needed`.
    """
    section = "denoise_fn_config"
    said_channels = config.whole(section, "head_channel")
    said_heads = config.whole(section, "num_heads") if said_channels in (None, -1) else None
    said_channels = None if said_channels == -1 else said_channels
    for ours, said, name, argument in (
        ("num_heads", said_heads, "head_channels", arguments.head_channels),
        ("head_channel", said_channels, "num_heads", arguments.num_heads),
    ):
        if said is not None and argument is not None:
            raise _contradiction(config, section, ours, said, name, argument)
    heads = _agreed(config, section, "num_heads", said_heads, "num_heads", arguments.num_heads)
    channels = _agreed(
        config, section, "head_channel", said_channels, "head_channels", arguments.head_channels
    )
    if heads is None and channels is None and needed:
        raise LayoutError(
            "how many attention heads it has stands neither in the weights nor in a config.yml; "
            "give num_heads or head_channels (64 channels per head in the published ADM models)"
        )
    from_config = said_heads is not None or said_channels is not None
    given = ARGUMENT if heads is not None or channels is not None else DEFAULT
    order, order_origin = _attention_order(config, arguments)
    return Heads(
        num_heads=1 if heads is None else heads,
        head_channels=channels,
        origin=config.where(section) if from_config else given,
        attention_order=order,
        order_origin=order_origin,
    )


def _attention_order(
    config: PublishedConfig, arguments: Arguments
) -> tuple[Literal["legacy", "new"], str]:
    section, key = "denoise_fn_config", "use_new_attention_order"
    flag = config.flag(section, key)
    said = None if flag is None else ("new" if flag else "legacy")
    order = _agreed(config, section, key, said, "attention_order", arguments.attention_order)
    if order is None:
        return "legacy", DEFAULT
    return order, ARGUMENT if said is None else config.where(section)


def find_schedule(config: PublishedConfig) -> tuple[ScheduleConfig, str]:
    """The noise schedule, and its origin. Raises LayoutError unless it is linear."""
    section = "diffusion_config"
    kind = config.value(section, "betas_type")
    if kind not in (None, "linear"):
        raise config.wrong(section, "betas_type", "'linear', the only schedule known here", kind)
    fields = {
        "num_timesteps": config.whole(section, "timesteps"),
        "beta_start": config.real(section, "linear_beta_start"),
        "beta_end": config.real(section, "linear_beta_end"),
    }
    said = {name: value for name, value in fields.items() if value is not None}
    return validated(ScheduleConfig, "its noise schedule", **said), config.name if said else DEFAULT


def find_dropout(config: PublishedConfig, default: float) -> tuple[float, str]:
    """Dropout inside residual blocks, for training (evaluation has none), and its origin."""
    section = "denoise_fn_config"
    said = config.real(section, "dropout")
    return (default, DEFAULT) if said is None else (said, config.where(section))


def find_partition(
    config: PublishedConfig, *, latent_dim: int, num_timesteps: int, is_diti: bool
) -> tuple[PublishedPartition, str]:
    """How z is cut, and the origin. One subset for PDAE, which cuts nothing.

    Args:
        is_diti: the checkpoint holds what only DiTi runs save, so that without a config the
            published cut of 512 dimensions is taken instead of none.

    Raises:
        LayoutError: the cut is incomplete, does not add up, or cannot be known.
    """
    section = "ssl_config"
    if config.value(section, "k_per_stage") is not None:
        raise LayoutError(
            f"{config.name}: {section}.k_per_stage has no defined map of time-steps to subsets "
            f"(the published code fails on it); only k, stages and dims_per_stage can be read"
        )
    num_subsets = config.whole(section, "k")
    if config.source is None and is_diti:
        return _paper_partition(latent_dim, num_timesteps), DEFAULT
    if num_subsets is None and is_diti:
        raise LayoutError(
            f"{config.name} does not say {section}.k, but the file is of a DiTi run, which cuts z; "
            f"give the config.yml that was written with this file"
        )
    if num_subsets is None or find_mode(config)[0] == "no_pdae":
        one = _partition(1, latent_dim, num_timesteps, None, None)
        return one, DEFAULT if num_subsets is None else config.name
    ends, dims = config.wholes(section, "stages"), config.wholes(section, "dims_per_stage")
    if dims is not None and sum(dims) != latent_dim:
        raise LayoutError(
            f"{config.name}: {section}.dims_per_stage add up to {sum(dims)}, but the encoder gives "
            f"{latent_dim} dimensions; give the config.yml that was written with this file"
        )
    return _partition(num_subsets, latent_dim, num_timesteps, ends, dims), config.name


def find_mode(config: PublishedConfig) -> tuple[Mode, str]:
    """What the decoder saw in training, and the origin. Raises LayoutError for an unknown mode."""
    said = config.value("ssl_config", "pdae_mode")
    if said is None:
        return "base", config.name if config.source else DEFAULT
    modes: tuple[Mode, ...] = ("base", "stop_grad", "dual", "no_pdae")
    for mode in modes:
        if said == mode:
            return mode, config.name
    raise config.wrong("ssl_config", "pdae_mode", f"one of {', '.join(modes)}", said)


def validated(schema: type[Model], what: str, /, **fields: Any) -> Model:
    """`schema(**fields)`; what the schema refuses becomes a LayoutError about `what`."""
    try:
        return schema(**fields)
    except ValidationError as error:
        reasons = [details["msg"].removeprefix("Value error, ") for details in error.errors()]
        raise LayoutError(
            f"{what} cannot be: {'; '.join(reasons)}; give the right config.yml or arguments"
        ) from error


def _find(store: ObjectStore, checkpoint_url: str) -> str | None:
    folder = checkpoint_url.rpartition("/")[0]
    for candidate in (folder, folder.rpartition("/")[0]):
        if candidate and not candidate.endswith((":", "/")):
            url = f"{candidate}/{CONFIG_NAME}"
            if store.exists(url):
                return url
    return None


def _with_denoiser(
    store: ObjectStore, values: dict[str, Any], path: str, config_url: str
) -> PublishedConfig:
    """A run's config with the `denoise_fn_config` of the denoiser's, looked for upwards from it.

    The authors' paths count from the folder that they start in, which a copied run does not know.
    """
    below = path.lstrip("./")
    folder = config_url
    for _ in range(_PARENTS_SEARCHED):
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith((":", "/")):
            break
        url = f"{folder}/{below}"
        if url != config_url and store.exists(url):
            found = _parse(store.read(url), url)
            section = {key: found[key] for key in ("denoise_fn_config",) if key in found}
            return PublishedConfig(values | section, config_url, url if section else None)
    return PublishedConfig(values, config_url)


def _parse(data: bytes, url: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise LayoutError(f"{url} is not YAML of plain values: {reason}") from error
    if not isinstance(values, dict):
        raise LayoutError(f"{url} must be a mapping of sections, got {type(values).__name__}")
    return _plain(values, url)


def _plain(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The same as JSON would give it, so that it can stand in a manifest."""
    try:
        plain = json.loads(json.dumps(values, default=str, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise LayoutError(f"{source} holds something that JSON cannot: {error}") from error
    if plain.get("ssl_config") is None:  # some write its keys without the section
        cut = {key: plain[key] for key in _CUT_KEYS if key in plain}
        return plain | ({"ssl_config": cut} if cut else {})
    return plain


def _image_size(config: PublishedConfig) -> tuple[str, int | None]:
    """DiTi names its training data's section differently from PDAE."""
    for section in ("train_dataset_config", "dataset_config"):
        said = config.whole(section, "image_size")
        if said is not None:
            return section, said
    return "train_dataset_config", None


def _check_same(
    config: PublishedConfig, section: str, key: str, said: object, weights: object
) -> None:
    if said is not None and said != weights:
        raise LayoutError(
            f"{config.where(section)} says {section}.{key} is {_readable(said)}, but the weights "
            f"have {_readable(weights)}; give the config.yml that was written with this file"
        )


def _agreed(
    config: PublishedConfig, section: str, key: str, said: Any, name: str, argument: Any
) -> Any | None:
    """The one value that config and argument `name` have, if any."""
    if said is not None and argument is not None and said != argument:
        raise _contradiction(config, section, key, said, name, argument)
    return argument if said is None else said


def _contradiction(
    config: PublishedConfig, section: str, key: str, said: object, name: str, argument: object
) -> LayoutError:
    return LayoutError(
        f"{config.where(section)} says {section}.{key} is {said}, but the argument {name} is "
        f"{argument}; leave the argument out, or give the right config.yml"
    )


def _readable(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _paper_partition(latent_dim: int, num_timesteps: int) -> PublishedPartition:
    ends, dims = _PAPER.stage_ends, _PAPER.stage_dims
    if (latent_dim, num_timesteps) != (sum(dims), ends[-1]):
        raise LayoutError(
            f"how its {latent_dim} dimensions are cut stands in no config.yml beside it or one "
            f"folder up; give the run's config.yml (the published cut is one of "
            f"{sum(dims)} dimensions)"
        )
    return _partition(sum(_PAPER.stage_subsets), latent_dim, num_timesteps, ends, dims)


def _partition(
    num_subsets: int,
    latent_dim: int,
    num_timesteps: int,
    stage_ends: Sequence[int] | None,
    stage_dims: Sequence[int] | None,
) -> PublishedPartition:
    """`allow_empty` is set where it must be, so that equal cuts give equal values."""
    fields = validated(
        PublishedPartition,
        "its partition",
        kind="published",
        num_subsets=num_subsets,
        num_timesteps=num_timesteps,
        stage_ends=None if stage_ends is None else tuple(stage_ends),
        stage_dims=None if stage_dims is None else tuple(stage_dims),
    )
    try:
        cut = published_partition(
            num_subsets,
            latent_dim,
            stage_ends=stage_ends,
            stage_dims=stage_dims,
            num_timesteps=num_timesteps,
            allow_empty=True,
        )
    except ValueError as error:
        raise LayoutError(f"its partition cannot be: {error}") from error
    empty = any(first == last for first, last in (subset.dims for subset in cut.subsets))
    return fields.model_copy(update={"allow_empty": empty})
