"""The frozen, pre-trained denoiser: loaded from outside, checked, never changed.

A backbone is a safetensors file and a JSON card beside it (`NAME.safetensors`, `NAME.json`). The
card holds the U-Net's shape, what its output stands for, its noise schedule, the image size, and
where the weights came from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.loading import digest_of_json
from configs.task import BUILTIN_PREFIX, BackboneConfig, ScheduleConfig, UNetConfig
from data_pipelines.object_store import ObjectMissingError, ObjectStore
from pretrain.noise_schedule import NoiseSchedule, Prediction, make_schedule
from pretrain.shift_decoder import ShiftDecoder
from pretrain.unet import UNet

_PREDICTION: TypeAdapter[Prediction] = TypeAdapter(Prediction)


class BackboneError(ValueError):
    """The backbone's file, hash, card or keys are not what the run expects."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen U-Net (float32, eval mode, no gradients) and what its card says."""

    unet: UNet
    schedule: ScheduleConfig
    image_size_px: int
    sha256: str
    prediction: Prediction = "epsilon"
    """What the U-Net's output stands for."""
    latents: None = None
    """It works on pixels."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return make_schedule(self.schedule)

    def make_decoder(self, latent_dim: int) -> ShiftDecoder:
        """The trainable decoder beside it."""
        return ShiftDecoder(self.unet, latent_dim=latent_dim)

    @property
    def card_sha256(self) -> str:
        """Over what the card says: weights alone do not tell what they compute."""
        card = _card_of(self.unet.config, self.prediction, self.schedule, self.image_size_px)
        return digest_of_json(card)


def load_backbone(store: ObjectStore, config: BackboneConfig) -> Backbone:
    """Read, verify and freeze the backbone that `config` pins.

    Raises:
        BackboneError: another SHA-256, an unreadable card, or missing, extra or misshapen keys.
        ObjectMissingError: there is no such file.
    """
    weights = _read(store, config.weights)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config.sha256:
        raise BackboneError(
            f"backbone {config.weights} has SHA-256 {digest}, but task.backbone.sha256 pins "
            f"{config.sha256}; use the pinned file, or pin this one if the change is meant"
        )
    card_url = _card_url(config.weights)
    card = _read_card(store, card_url)
    unet = UNet(card["unet"])
    _load_exactly(unet, _parse_weights(weights, config.weights), config.weights)
    if card["sha256"] not in (None, digest):
        raise BackboneError(
            f"backbone card {card_url} belongs to weights with SHA-256 {card['sha256']}, not to "
            f"{config.weights} ({digest}); use the card that was written with these weights"
        )
    unet.requires_grad_(False).eval()
    return Backbone(unet, card["schedule"], card["image_size_px"], digest, card["prediction"])


def untrained_backbone(store: ObjectStore, config: BackboneConfig) -> Backbone:
    """One with the shape on the card of `config`, on the meta device, to plan by.

    The weights need not be there.

    Raises:
        BackboneError: there is no card, or an unreadable one.
    """
    card_url = _card_url(config.weights)
    card = _read_card(store, card_url)
    with torch.device("meta"):
        unet = UNet(card["unet"]).requires_grad_(False).eval()
    return Backbone(unet, card["schedule"], card["image_size_px"], "", card["prediction"])


def save_backbone(
    store: ObjectStore,
    url: str,
    *,
    state: dict[str, Tensor],
    unet: UNetConfig,
    schedule: ScheduleConfig,
    image_size_px: int,
    provenance: dict[str, Any],
    prediction: Prediction = "epsilon",
    dtype: torch.dtype = torch.float16,
) -> str:
    """Write weights (as `dtype`) and card to `url` (ending in .safetensors); returns the SHA-256.

    Args:
        provenance: goes onto the card as it is; nothing there replaces what the card always holds.
    """
    weights = save_safetensors({k: v.to(dtype).contiguous() for k, v in state.items()})
    digest = hashlib.sha256(weights).hexdigest()
    card = _card_of(unet, prediction, schedule, image_size_px) | {"sha256": digest}
    card |= {key: value for key, value in provenance.items() if key not in card}
    store.write(url, weights)
    store.write(_card_url(url), (json.dumps(card, indent=2) + "\n").encode())
    return digest


def pin_backbone(store: ObjectStore, url: str) -> str:
    """The SHA-256 of a weights file as it is now, to pin it in a run file."""
    return hashlib.sha256(_read(store, url)).hexdigest()


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        numbers = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(numbers.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def state_problems(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> str:
    """Missing, extra and misshapen names, the first five of each; "" when all agree."""
    misshapen = [
        f"{name} {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = (
        ("missing", sorted(wanted.keys() - found.keys())),
        ("extra", sorted(found.keys() - wanted.keys())),
        ("wrong shape", misshapen),
    )
    return "; ".join(f"{what}: {first_few(names)}" for what, names in problems if names)


def first_few(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names to shapes, as `state_problems` compares them."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def card_of(store: ObjectStore, weights_url: str) -> dict[str, Any]:
    """All that the card beside a backbone's weights says, unchecked.

    Raises:
        StoreError, ValueError, TypeError: there is none, or it is no JSON object.
    """
    return dict(json.loads(_read(store, _card_url(weights_url))))


def _read(store: ObjectStore, url: str) -> bytes:
    if not url.startswith(BUILTIN_PREFIX):
        return store.read(url)
    folder = resources.files("pretrain") / "weights"
    path = folder / url.removeprefix(BUILTIN_PREFIX)
    if not path.is_file():
        names = sorted(
            BUILTIN_PREFIX + entry.name
            for entry in (folder.iterdir() if folder.is_dir() else ())
            if entry.name.endswith(".safetensors")
        )
        raise BackboneError(f"there is no packaged backbone {url}; there are {names}")
    return path.read_bytes()


def _card_url(weights_url: str) -> str:
    return weights_url.removesuffix(".safetensors") + ".json"


def _read_card(store: ObjectStore, url: str) -> dict[str, Any]:
    try:
        return _parse_card(_read(store, url), url)
    except ObjectMissingError as error:
        raise BackboneError(
            f"{error}; a backbone needs its card, the JSON that `diti backbone train` and `import` "
            f"write beside the weights: copy it there too"
        ) from error


def _card_of(
    unet: UNetConfig, prediction: Prediction, schedule: ScheduleConfig, image_size_px: int
) -> dict[str, Any]:
    return {
        "unet": unet.model_dump(mode="json"),
        "prediction": prediction,
        "schedule": schedule.model_dump(mode="json"),
        "image_size_px": image_size_px,
    }


def _parse_card(data: bytes, url: str) -> dict[str, Any]:
    try:
        card = {"prediction": "epsilon"} | json.loads(data)  # which old cards leave out
        return {
            "unet": UNetConfig.model_validate_json(json.dumps(card["unet"])),
            "prediction": _PREDICTION.validate_python(card["prediction"]),
            "schedule": ScheduleConfig.model_validate_json(json.dumps(card["schedule"])),
            "image_size_px": int(card["image_size_px"]),
            "sha256": card.get("sha256"),
        }
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise BackboneError(
            f"backbone card {url} is unreadable ({type(error).__name__}: {error}); "
            f"write it again with `diti backbone train` or `diti backbone import`"
        ) from error


def _parse_weights(data: bytes, url: str) -> dict[str, Tensor]:
    try:
        state = load_safetensors(data)
    except SafetensorError as error:
        raise BackboneError(
            f"{url} is not a whole safetensors file ({error}); fetch it again"
        ) from error
    if broken := sorted(
        name for name, t in state.items() if not (t.is_floating_point() and t.isfinite().all())
    ):
        raise BackboneError(
            f"{url} holds tensors that are no finite floating-point numbers: {first_few(broken)}; "
            f"use weights from before their training went wrong"
        )
    return state


def _load_exactly(unet: UNet, state: dict[str, Tensor], url: str) -> None:
    if problems := state_problems(shapes_of(state), shapes_of(unet.state_dict())):
        raise BackboneError(
            f"backbone {url} does not fit the U-Net on its card; {problems}. "
            f"Use the card that was written with these weights."
        )
    unet.load_state_dict({name: tensor.float() for name, tensor in state.items()})
