"""What a run teaches: networks, noise schedule, partition by time-step, objective."""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from configs.values import (
    FiniteFloat,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Sha256,
    Url,
    check_rising,
    kind_or,
)

BUILTIN_PREFIX = "builtin/"
"""Of the weights, and the shapes without weights, that are packaged."""


class UNetConfig(Section):
    """Shape of an ADM-type U-Net (METHOD section 4)."""

    in_channels: PositiveInt = 3
    """Image channels, before pixel-unshuffling."""
    patch_size_px: PositiveInt = 1
    """Pixels of a patch are folded into channels; 1 is the published models' layout."""
    base_channels: PositiveInt = 64
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    num_res_blocks: PositiveInt = 2
    attention_factors: tuple[PositiveInt, ...] = (4,)
    """Down-sampling factors (not pixels) at which self-attention is applied."""
    num_heads: PositiveInt = 1
    head_channels: PositiveInt | None = None
    """Channels per attention head; null means channels / num_heads."""
    attention_order: Literal["legacy", "new"] = "legacy"
    """Channel layout of q, k, v: heads first (legacy) or q|k|v first (new)."""
    dropout: Fraction = 0.0
    learn_sigma: bool = False
    """The last convolution has twice the channels; its second half (variances) is not used."""
    resblock_updown: bool = True
    """Resampling inside residual blocks; false means strided and plain convolutions instead."""
    scale_shift_norm: bool = True
    """The time-step scales and shifts the normalised activations; false means it is added."""

    @model_validator(mode="after")
    def _channels_fit_group_norm(self) -> Self:
        if self.base_channels % 32:
            raise ValueError(
                f"base_channels must be a multiple of 32 (GroupNorm has 32 groups), "
                f"got {self.base_channels}"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        factors = [2**level for level in range(len(self.channel_multipliers))]
        if unknown := sorted(set(self.attention_factors) - set(factors)):
            raise ValueError(
                f"attention_factors are down-sampling factors, not pixels: this U-Net has "
                f"{factors}, got {unknown}"
            )
        multipliers = dict(zip(factors, self.channel_multipliers, strict=True))
        for factor in (*self.attention_factors, factors[-1]):  # the middle has attention, always
            channels = self.base_channels * multipliers[factor]
            if channels % (self.head_channels or self.num_heads):
                raise ValueError(
                    f"num_heads (or head_channels) must divide the {channels} channels of the "
                    f"attention at factor {factor}, got {self.head_channels or self.num_heads}"
                )
        return self


class ScheduleConfig(Section):
    """Linear noise schedule: beta_t from `beta_start` to `beta_end` over `num_timesteps`."""

    num_timesteps: PositiveInt = 1000
    beta_start: PositiveFloat = 1e-4
    beta_end: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _betas_rise_below_one(self) -> Self:
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start <= beta_end < 1 must hold, got {self.beta_start} and {self.beta_end}"
            )
        return self

    @model_validator(mode="after")
    def _alpha_bar_stays_between_zero_and_one(self) -> Self:
        """In float32, where coefficients would be no numbers otherwise."""
        rise = (self.beta_end - self.beta_start) / max(1, self.num_timesteps - 1)
        betas = (self.beta_start + rise * t for t in range(self.num_timesteps))
        log_alpha_bar = sum(math.log1p(-min(beta, self.beta_end)) for beta in betas)
        if self.beta_start < 1e-7 or log_alpha_bar < -80:
            raise ValueError(
                f"alpha-bar must stay between 0 and 1 in float32, and runs from 1 - "
                f"{self.beta_start:g} to exp({log_alpha_bar:.0f}): raise beta_start above 1e-7, or "
                f"lower beta_end {self.beta_end:g}"
            )
        return self


class BackboneConfig(Section):
    """The frozen, pre-trained denoiser: somebody else's weights, pinned by hash."""

    kind: Literal["unet"] = "unet"
    weights: Url
    """safetensors file with its JSON card beside it, or `builtin/NAME` for a packaged one."""
    sha256: Sha256
    """SHA-256 of the safetensors file; a file with another hash is refused."""

    @property
    def place(self) -> str:
        return self.weights

    def moved(self, move: Callable[[str], str]) -> Self:
        """The same with another place, which `move` finds."""
        if self.weights.startswith(BUILTIN_PREFIX):
            return self
        return self.model_copy(update={"weights": move(self.weights)})


class DiffusersConfig(Section):
    """A frozen denoiser as diffusers saves it: a pipeline's folder, pinned by hash.

    A U-Net (pixels, or Stable Diffusion 1, 2 and XL), a DiT, or Stable Diffusion 3's transformer.
    """

    kind: Literal["diffusers"]
    folder: Url
    """With model_index.json, as `save_pretrained` writes it; or `builtin/NAME` for a public model's
    shape, by which a run can be planned and not trained."""
    sha256: Sha256
    """Over the names and bytes of its files, as `diti backbone inspect` prints it."""
    condition: Literal["none", "caption"] = "none"
    """What the model is told of an image: what its pipeline puts in the place of no prompt (or the
    class of no class), or the image's caption, which `data.encoded` holds."""
    tail_blocks: PositiveInt = 4
    """Blocks at a transformer's end that are copied and trained; a U-Net's tail is its up path."""

    @property
    def place(self) -> str:
        return self.folder

    def moved(self, move: Callable[[str], str]) -> Self:
        """The same with another place, which `move` finds."""
        if self.folder.startswith(BUILTIN_PREFIX):
            return self
        return self.model_copy(update={"folder": move(self.folder)})


AnyBackboneConfig = Annotated[
    Annotated[BackboneConfig, Tag("unet")] | Annotated[DiffusersConfig, Tag("diffusers")],
    kind_or("unet"),
]


class EncoderConfig(Section):
    """Convolutional encoder x_0 -> z (METHOD section 4)."""

    kind: Literal["conv"] = "conv"
    latent_dim: PositiveInt = 512
    """Dimensions of z."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (64, 128, 128, 128)
    """Output channels of the stride-2 convolutions, in order."""
    attention_after: NonNegativeInt | None = 2
    """Self-attention after this many convolutions; null means none."""
    num_heads: PositiveInt = 4

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        odd = [channels for channels in self.channels if channels % 32]
        if odd:
            raise ValueError(f"channels must be multiples of 32 (GroupNorm), got {odd}")
        if self.attention_after is not None and not (
            1 <= self.attention_after <= len(self.channels)
        ):
            raise ValueError(
                f"attention_after must be between 1 and {len(self.channels)}, "
                f"the number of convolutions, got {self.attention_after}"
            )
        if self.attention_after and self.channels[self.attention_after - 1] % self.num_heads:
            raise ValueError(
                f"num_heads must divide the {self.channels[self.attention_after - 1]} channels of "
                f"the attention, got {self.num_heads}"
            )
        return self


class ResNet10Config(Section):
    """ResNet10 encoder x_0 -> z (METHOD section 4): nothing about it can be chosen.

    It has BatchNorm over a rank's micro-batch: its numbers depend on the number of workers.
    """

    kind: Literal["resnet10"]
    latent_dim: int = 512
    """Dimensions of z: the channels of the last block, whatever else was asked for."""

    @model_validator(mode="after")
    def _has_512_dimensions(self) -> Self:
        if self.latent_dim != 512:
            raise ValueError(
                f"latent_dim of a resnet10 is 512, the channels of its last block, "
                f"got {self.latent_dim}; leave it out, or choose kind conv"
            )
        return self


class VitConfig(Section):
    """Vision transformer x_0 -> z with a query token for each subset: for natural images."""

    kind: Literal["vit"]
    size: Literal["S", "B", "L"] = "B"
    """Width 384, 768 or 1024; 12, 12 or 24 blocks."""
    patch_size_px: PositiveInt = 16
    latent_dim: PositiveInt = 512
    """Dimensions of z."""


AnyEncoderConfig = Annotated[
    Annotated[EncoderConfig, Tag("conv")]
    | Annotated[ResNet10Config, Tag("resnet10")]
    | Annotated[VitConfig, Tag("vit")],
    kind_or("conv"),
]


class StagedPartition(Section):
    """How z is cut by time-step (METHOD section 2), stage by stage.

    Time-steps are the DDPM's; on another schedule a stage lies where log-SNR is the same. Each
    stage is cut evenly in time-steps and in dimensions. One stage with one subset is PDAE.
    """

    kind: Literal["stages"] = "stages"
    stage_ends: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (50, 100, 300, 500, 1000)
    """Exclusive last time-step of each stage; the last one is the schedule's length."""
    stage_dims: tuple[PositiveInt, ...] = (10, 25, 327, 100, 50)
    """Dimensions of z that each stage receives; their sum is latent_dim."""
    stage_subsets: tuple[PositiveInt, ...] = (4, 3, 13, 12, 32)
    """Subsets that each stage is cut into, evenly in time-steps."""

    @property
    def num_timesteps(self) -> int:
        return self.stage_ends[-1]

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        lengths = (len(self.stage_ends), len(self.stage_dims), len(self.stage_subsets))
        if len(set(lengths)) != 1:
            raise ValueError(
                f"stage_ends, stage_dims and stage_subsets need one entry per stage, "
                f"got {lengths[0]}, {lengths[1]} and {lengths[2]}"
            )
        check_rising("stage_ends", self.stage_ends)
        starts = (0, *self.stage_ends[:-1])
        for start, end, dims, subsets in zip(
            starts, self.stage_ends, self.stage_dims, self.stage_subsets, strict=True
        ):
            if subsets > min(dims, end - start):
                raise ValueError(
                    f"stage [{start}, {end}) has {subsets} subsets but only {dims} dimensions and "
                    f"{end - start} time-steps; each subset needs at least one of both"
                )
        return self


class PublishedPartition(Section):
    """The published recipes' own cut: subsets even over all time-steps, whatever the stages.

    A subset belongs to the stage that holds its first time-step. Without stages, dimensions are
    dealt evenly too.
    """

    kind: Literal["published"]
    num_subsets: PositiveInt = 64
    num_timesteps: PositiveInt = 1000
    stage_ends: tuple[PositiveInt, ...] | None = None
    """Exclusive last time-step of each stage; null means balanced."""
    stage_dims: tuple[PositiveInt, ...] | None = None
    """Dimensions of z that each stage receives; their sum is latent_dim."""
    allow_empty: bool = False
    """Accept subsets without a dimension, which the published code makes of short stages."""

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        if self.num_subsets > self.num_timesteps:
            raise ValueError(
                f"num_subsets ({self.num_subsets}) must not exceed num_timesteps "
                f"({self.num_timesteps}): each subset needs a time-step"
            )
        if (self.stage_ends is None) != (self.stage_dims is None):
            raise ValueError("stage_ends and stage_dims must both be given, or neither")
        if self.stage_ends is None or self.stage_dims is None:
            return self
        if len(self.stage_ends) != len(self.stage_dims):
            raise ValueError(
                f"stage_ends and stage_dims need one entry per stage, "
                f"got {len(self.stage_ends)} and {len(self.stage_dims)}"
            )
        check_rising("stage_ends", self.stage_ends)
        if self.stage_ends[-1] != self.num_timesteps:
            raise ValueError(
                f"stage_ends must end at num_timesteps ({self.num_timesteps}), "
                f"got {self.stage_ends[-1]}"
            )
        return self


PartitionConfig = Annotated[
    Annotated[StagedPartition, Tag("stages")] | Annotated[PublishedPartition, Tag("published")],
    kind_or("stages"),
]


class TimestepsConfig(Section):
    """Which time-steps are trained on: pieces between edges, each drawn from evenly.

    The default is the paper's: uniform over all of them. Time-steps are those of the DDPM's
    schedule, as a partition's are.
    """

    unit: Literal["timestep", "log_snr"] = "timestep"
    """The unit of edges, in which draws are even; log-SNR is log(alpha-bar / (1 - alpha-bar))."""
    edges: Annotated[tuple[FiniteFloat, ...], Field(min_length=2)] = (0, 1000)
    """One more than pieces, from low noise to high: time-steps rise, log-SNR falls."""
    shares: tuple[PositiveFloat, ...] = (1.0,)
    """Part of the draws that each piece receives; they add up to 1."""

    @model_validator(mode="after")
    def _pieces_agree(self) -> Self:
        if len(self.shares) != len(self.edges) - 1:
            raise ValueError(
                f"{len(self.edges)} edges make {len(self.edges) - 1} pieces, "
                f"but there are {len(self.shares)} shares"
            )
        if not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ValueError(f"shares must add up to 1, got {sum(self.shares):g}")
        if self.unit == "log_snr":
            check_rising("log-SNR edges, negated,", [-edge for edge in self.edges])
            return self
        check_rising("edges", self.edges)
        if self.edges[0] < 0 or any(edge != int(edge) for edge in self.edges):
            raise ValueError(f"edges in time-steps must be whole and not negative: {self.edges}")
        return self


class DitiTask(Section):
    """Train the encoder and the shift decoder against a frozen backbone (METHOD section 3)."""

    kind: Literal["diti"]
    backbone: AnyBackboneConfig
    encoder: AnyEncoderConfig = EncoderConfig()
    partition: PartitionConfig = StagedPartition()
    mode: Literal["base", "stop_grad", "dual"] = "base"
    """What the decoder sees at t: all subsets up to t's own; the same with gradients to the own
    subset only; or both, with the losses added."""
    weight: Literal["snr", "constant", "min_snr", "v"] = "snr"
    """Loss weight: the paper's SNR^gamma / (1 + SNR); 1; min(SNR, cap) / SNR; or (1 + SNR) / SNR,
    which makes the loss the error of v: about as large at every time-step."""
    snr_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """gamma of the weight `snr`."""
    min_snr_cap: PositiveFloat = 5.0
    """Cap of the weight `min_snr`."""
    timesteps: TimestepsConfig = TimestepsConfig()
    start_from: Url | None = None
    """Weights of encoder and shift path to begin with: a checkpoint file in the published layout
    or a run's folder; null means from scratch."""

    @model_validator(mode="after")
    def _dims_add_up(self) -> Self:
        dims = self.partition.stage_dims
        if dims is not None and sum(dims) != self.encoder.latent_dim:
            raise ValueError(
                f"partition.stage_dims add up to {sum(dims)}, but encoder.latent_dim is "
                f"{self.encoder.latent_dim}; they must be equal"
            )
        _check_timesteps(self.timesteps, self.partition.num_timesteps)
        return self


class LabelsTask(Section):
    """Train the encoder with labels: what a feature of its shape could tell at most."""

    kind: Literal["labels"]
    encoder: AnyEncoderConfig = EncoderConfig()
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Of those that each sample's json has under `attributes`, 0 or 1 each."""

    @model_validator(mode="after")
    def _attributes_differ(self) -> Self:
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"attributes must differ, got {', '.join(self.attributes)}")
        return self


class VaeTask(Section):
    """Train the encoder as a beta-VAE's."""

    kind: Literal["vae"]
    encoder: AnyEncoderConfig = EncoderConfig()
    beta: PositiveFloat = 1.0
    """Weight of the divergence from N(0, I); the error of a pixel has unit variance."""


class MaskedTask(Section):
    """Train the encoder to fill in hidden patches."""

    kind: Literal["masked"]
    encoder: AnyEncoderConfig = EncoderConfig()
    patch_size_px: PositiveInt = 4
    hidden_share: Annotated[float, Field(gt=0, lt=1)] = 0.75


class SimClrTask(Section):
    """Train the encoder to tell views of one image from those of others."""

    kind: Literal["simclr"]
    encoder: AnyEncoderConfig = EncoderConfig()
    temperature: PositiveFloat = 0.2


class SimSiamTask(Section):
    """Train the encoder to predict one view of an image from another."""

    kind: Literal["simsiam"]
    encoder: AnyEncoderConfig = EncoderConfig()


class DiffAeTask(Section):
    """Train the encoder together with a denoiser of its own that z steers (Diff-AE)."""

    kind: Literal["diffae"]
    encoder: AnyEncoderConfig = EncoderConfig()
    unet: UNetConfig
    schedule: ScheduleConfig = ScheduleConfig()
    timesteps: TimestepsConfig = TimestepsConfig()

    @model_validator(mode="after")
    def _timesteps_exist(self) -> Self:
        _check_timesteps(self.timesteps, self.schedule.num_timesteps)
        return self


BaselineTask = LabelsTask | VaeTask | MaskedTask | SimClrTask | SimSiamTask | DiffAeTask


class DenoiserTask(Section):
    """Train a backbone: an unconditional denoiser, epsilon prediction."""

    kind: Literal["denoiser"]
    unet: UNetConfig
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    """What the U-Net's output stands for."""
    timesteps: TimestepsConfig = TimestepsConfig()

    @model_validator(mode="after")
    def _timesteps_exist(self) -> Self:
        _check_timesteps(self.timesteps, self.schedule.num_timesteps)
        return self


def _check_timesteps(timesteps: TimestepsConfig, num_timesteps: int) -> None:
    if timesteps.unit == "timestep" and timesteps.edges[-1] > num_timesteps:
        raise ValueError(
            f"timesteps.edges must lie inside [0, {num_timesteps}], got {timesteps.edges[-1]:g}"
        )
