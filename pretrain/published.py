"""Checkpoints of the published code, read as data: the frozen denoiser, encoder and shift path.

    from pretrain.published import load_authors_checkpoint

    checkpoint = load_authors_checkpoint("runs/celeba64/diti64/checkpoints/latest.pt")
    checkpoint.partition, checkpoint.mode, checkpoint.unet  # what it is
    model = checkpoint.build_diti()                         # eval mode, no gradients

Three layouts are recognised by their keys (METHOD section 5): a pre-trained denoiser, a DiTi or
PDAE run, and the bare state dict of an unconditional OpenAI guided-diffusion (ADM) U-Net. Nothing
in a file is ever executed. What follows from shapes is taken from shapes; the rest comes from
`config.yml`, from arguments, or from the published recipe, and `origins` says which.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from configs.task import (
    BackboneConfig,
    DitiTask,
    EncoderConfig,
    PublishedPartition,
    ScheduleConfig,
    TimestepsConfig,
    UNetConfig,
)
from data_pipelines.local_files import sha256_of
from data_pipelines.object_store import ObjectStore, absolute
from pretrain.backbone import Backbone, digest_of_state, shapes_of, state_problems
from pretrain.diti import DiTi
from pretrain.encoder import Encoder
from pretrain.partition import Partition, make_partition
from pretrain.published_config import (
    DEFAULT,
    SHAPES,
    Arguments,
    LayoutError,
    Mode,
    PublishedConfig,
    check_encoder,
    check_unet,
    find_dropout,
    find_heads,
    find_image_size,
    find_mode,
    find_partition,
    find_schedule,
    read_config,
    validated,
)
from pretrain.published_file import Parts, read_weights_only, take_apart
from pretrain.published_shapes import encoder_shape, unet_fields
from pretrain.shift_decoder import ShiftDecoder
from pretrain.unet import UNet

Kind = Literal["dpm", "diti", "pdae", "adm"]
ConfigSource = str | Path | Mapping[str, Any]

KIND_NAMES: dict[Kind, str] = {
    "dpm": "pre-trained denoiser of the authors' layout",
    "diti": "DiTi run",
    "pdae": "PDAE run",
    "adm": "unconditional ADM (guided-diffusion) denoiser",
}

_AUTHORS_DROPOUT = 0.1
Module = TypeVar("Module", bound=nn.Module)
_LOG = logging.getLogger(__name__)


class PublishedCheckpointError(ValueError):
    """A file is no checkpoint of a published layout, is damaged, or contradicts its config.yml."""


@dataclass(frozen=True, slots=True)
class AuthorsCheckpoint:
    """What one published checkpoint holds; tensors are float32 on the CPU.

    State dicts use this project's names: `backbone` those of `UNet`, `encoder` those of `Encoder`,
    `shift` those of `ShiftDecoder` without its backbone. The last two are empty for denoisers.
    """

    source: str
    sha256: str
    """Of the whole file."""
    kind: Kind
    step: int | None
    """Optimizer steps; None when the file does not say."""
    ema: bool
    """Averaged weights, not the online ones."""
    unet: UNetConfig
    schedule: ScheduleConfig
    image_size_px: int | None
    """None for a denoiser of which neither config.yml nor an argument tells it."""
    backbone: dict[str, Tensor]
    encoder_config: EncoderConfig | None
    encoder: dict[str, Tensor]
    shift: dict[str, Tensor]
    partition_config: PublishedPartition | None
    mode: Mode | None
    """What the decoder saw in training; `no_pdae` is a baseline whose decoder was not trained."""
    config: PublishedConfig
    origins: dict[str, str]
    """Where each thing was found: shapes of the weights, a config.yml, an argument, a default."""
    prediction: Literal["epsilon"] = "epsilon"

    @property
    def backbone_sha256(self) -> str:
        """Over names and values of the frozen part."""
        return digest_of_state(self.backbone)

    @property
    def partition(self) -> Partition | None:
        """The authors' own cut; one subset for PDAE; None for a denoiser."""
        if self.partition_config is None or self.encoder_config is None:
            return None
        return make_partition(self.partition_config, self.encoder_config.latent_dim)

    def task(self) -> DitiTask:
        """The DiTi task that would train such a model.

        Raises:
            PublishedCheckpointError: the file holds a denoiser only, or a decoder never trained.
        """
        if self.encoder_config is None or self.partition_config is None or self.mode is None:
            raise self._lacks_encoder()
        if self.mode == "no_pdae":
            raise PublishedCheckpointError(
                f"{self.source} is of a baseline run (pdae_mode no_pdae), whose decoder was never "
                f"trained; only its encoder can be used"
            )
        where = self.source if "://" in self.source else f"file://{self.source}"
        return DitiTask(
            kind="diti",
            backbone=BackboneConfig(weights=where, sha256=self.backbone_sha256),
            encoder=self.encoder_config,
            partition=self.partition_config,
            mode=self.mode,
            timesteps=TimestepsConfig(edges=(0, self.schedule.num_timesteps)),
        )

    def build_backbone(self) -> Backbone:
        """The frozen denoiser.

        Raises:
            PublishedCheckpointError: the size of its images is not known.
        """
        if self.image_size_px is None:
            raise PublishedCheckpointError(
                f"{self.source} does not tell the size of its images, nor does {self.config.name}; "
                f"give image_size_px"
            )
        unet = _filled(UNet, self.backbone, self.unet)
        return Backbone(
            unet, self.schedule, self.image_size_px, self.backbone_sha256, self.prediction
        )

    def build_encoder(self) -> Encoder:
        """The encoder, in eval mode without gradients.

        Raises:
            PublishedCheckpointError: the file holds a denoiser only.
        """
        if self.encoder_config is None or self.image_size_px is None:
            raise self._lacks_encoder()
        return _filled(Encoder, self.encoder, self.encoder_config, image_size_px=self.image_size_px)

    def build_diti(self) -> DiTi:
        """The whole model, in eval mode without gradients.

        Raises:
            PublishedCheckpointError: as `task` and `build_backbone`.
        """
        task, backbone = self.task(), self.build_backbone()
        model = DiTi(task, backbone, image_size_px=backbone.image_size_px)
        model.load_state_dict(self.trained_weights())
        return model.requires_grad_(False).eval()

    def trained_weights(self) -> dict[str, Tensor]:
        """Encoder and shift path by the names that they have in `DiTi`.

        Raises:
            PublishedCheckpointError: the file holds a denoiser only.
        """
        if self.encoder_config is None:
            raise self._lacks_encoder()
        return {f"encoder.{name}": value for name, value in self.encoder.items()} | {
            f"decoder.{name}": value for name, value in self.shift.items()
        }

    def _lacks_encoder(self) -> PublishedCheckpointError:
        return PublishedCheckpointError(
            f"{self.source} is a {KIND_NAMES[self.kind]} without an encoder; a checkpoint of a "
            f"DiTi or PDAE run is needed here"
        )


def load_authors_checkpoint(
    path: str | Path,
    *,
    config: ConfigSource | None = None,
    ema: bool = True,
    store: ObjectStore | None = None,
    image_size_px: int | None = None,
    num_heads: int | None = None,
    head_channels: int | None = None,
    attention_order: Literal["legacy", "new"] | None = None,
) -> AuthorsCheckpoint:
    """Read a checkpoint that the published code, PDAE's or OpenAI's guided-diffusion wrote.

    What no shape tells is taken from `config`, else from the arguments, else from the published
    recipe: 1 attention head, legacy channel order, dropout 0.1, linear betas from 1e-4 to 0.02 over
    1000 steps; one subset for PDAE; for a DiTi run of 512 dimensions the 64 subsets of the paper in
    mode `base`. ADM files need `num_heads` or `head_channels`, and have no dropout.

    Args:
        path: a local `.pt` file, or a URL.
        config: a config.yml, or its parsed content. By default one beside the file or one folder
            up is taken, together with the `trained_ddpm_config` that it names, if that is found.
        ema: the averaged weights; False takes the online ones.
        store: reads `path` and `config`; by default one with standard settings.
        image_size_px: side of a denoiser's images; encoders tell it by their shapes.
        num_heads, head_channels, attention_order: how attention splits its channels.

    Raises:
        PublishedCheckpointError: the file is damaged, would execute code, is of no known layout, or
            lacks or adds tensors, or it and config.yml or an argument contradict each other.
        ObjectMissingError, StoreError: it, or the given config, cannot be read.
    """
    store = store or ObjectStore()
    source = absolute(str(path))
    arguments = Arguments(image_size_px, num_heads, head_channels, attention_order)
    try:
        with store.local_copy(source) as file:
            digest = sha256_of(file)
            parts = take_apart(read_weights_only(file), ema=ema)
        found = read_config(store, config, source)
        return _assemble(source, digest, parts, found, arguments, ema=ema)
    except LayoutError as error:
        raise PublishedCheckpointError(f"{path}: {error}") from error


def _assemble(
    source: str,
    digest: str,
    parts: Parts,
    config: PublishedConfig,
    arguments: Arguments,
    *,
    ema: bool,
) -> AuthorsCheckpoint:
    unet, unet_origins = _unet_of(parts, config, arguments)
    schedule, schedule_origin = find_schedule(config)
    origins = unet_origins | {"schedule": schedule_origin}
    encoder = partition = mode = None
    kind: Kind = "adm" if parts.layout == "adm" else "dpm"
    if parts.layout == "run":
        encoder, image_size_px = _encoder_of(parts, unet, config)
        if arguments.image_size_px not in (None, image_size_px):
            raise LayoutError(
                f"its encoder takes {image_size_px} px images, but the argument image_size_px is "
                f"{arguments.image_size_px}; leave the argument out"
            )
        partition, origins["partition"] = find_partition(
            config,
            latent_dim=encoder.latent_dim,
            num_timesteps=schedule.num_timesteps,
            is_diti=parts.is_diti,
        )
        mode, origins["mode"] = find_mode(config)
        origins |= {"encoder": SHAPES, "image size": SHAPES}
        kind = "diti" if partition.num_subsets > 1 or parts.is_diti else "pdae"
    else:
        image_size_px, origins["image size"] = find_image_size(config, arguments)
    assumed = [
        what
        for what, origin in origins.items()
        if origin == DEFAULT and (kind, what) != ("pdae", "partition")  # which cuts nothing
    ]
    if assumed:
        _LOG.warning(
            "%s: taken from the published recipe, because no file says: %s",
            source,
            ", ".join(assumed),
        )
    return AuthorsCheckpoint(
        source=source,
        sha256=digest,
        kind=kind,
        step=parts.step,
        ema=ema,
        unet=unet,
        schedule=schedule,
        image_size_px=image_size_px,
        backbone=parts.backbone,
        encoder_config=encoder,
        encoder=parts.encoder,
        shift=parts.shift,
        partition_config=partition,
        mode=mode,
        config=config,
        origins=origins,
    )


def _unet_of(
    parts: Parts, config: PublishedConfig, arguments: Arguments
) -> tuple[UNetConfig, dict[str, str]]:
    """The U-Net that the file's tensors fit exactly."""
    fields = unet_fields(shapes_of(parts.backbone))
    check_unet(config, fields)
    heads = find_heads(config, arguments, needed=parts.layout == "adm")
    recipe = 0.0 if parts.layout == "adm" else _AUTHORS_DROPOUT
    dropout, dropout_origin = find_dropout(config, recipe)
    unet = validated(
        UNetConfig,
        "its U-Net",
        **fields,
        num_heads=heads.num_heads,
        head_channels=heads.head_channels,
        attention_order=heads.attention_order,
        dropout=dropout,
    )
    with torch.device("meta"):
        _check_fit("denoiser", parts.backbone, UNet(unet).state_dict())
    return unet, {
        "U-Net": SHAPES,
        "attention heads": heads.origin,
        "attention order": heads.order_origin,
        "dropout": dropout_origin,
    }


def _encoder_of(
    parts: Parts, unet: UNetConfig, config: PublishedConfig
) -> tuple[EncoderConfig, int]:
    """The encoder and its image size; encoder and shift path fit exactly."""
    encoder, image_size_px = encoder_shape(shapes_of(parts.encoder))
    check_encoder(config, latent_dim=encoder.latent_dim, image_size_px=image_size_px)
    with torch.device("meta"):
        wanted = Encoder(encoder, image_size_px=image_size_px).state_dict()
        decoder = ShiftDecoder(UNet(unet), latent_dim=encoder.latent_dim).state_dict()
    _check_fit("encoder", parts.encoder, wanted)
    _check_fit("shift path", parts.shift, decoder)
    return encoder, image_size_px


def _check_fit(part: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if problems := state_problems(shapes_of(found), shapes_of(wanted)):
        raise LayoutError(
            f"its {part} does not have the tensors of a published one; {problems}. The file is "
            f"incomplete, or of an architecture that is not supported."
        )


def _filled(kind: type[Module], state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Module:
    """`kind(*args, **kwargs)` with these weights, frozen and in eval mode."""
    module = kind(*args, **kwargs)
    module.load_state_dict(state)
    return module.requires_grad_(False).eval()
