"""What a run is: every field, its unit, and every rule between fields.

A `RunConfig` is a frozen value. It is built by `configs.loading` from YAML and never written to
afterwards. Rules that need a bucket, a world size or a weights file are not here: they are checked
by `pretrain.preflight` and `pretrain.run_plan` before a run starts.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _without_credentials(url: str) -> str:
    """Settings are stored beside every checkpoint, so they may hold no secret."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "holds credentials before an '@'; take them out and set the AWS_* variables instead"
        )
    return url


def _matching(pattern: str, rule: str) -> AfterValidator:
    """Text of a form that a person is told in words, not as a pattern."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{rule}; got {text!r}")
        return text

    return AfterValidator(check)


Name = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]*",
        "must be letters, digits, dots, dashes and underscores, and begin with a letter or digit, "
        "because it names a folder",
    ),
]
SourceName = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9_-]+",
        "must be letters, digits, dashes and underscores, because it stands in settings' paths",
    ),
]
Sha256 = Annotated[
    str,
    _matching(
        r"[0-9a-f]{64}",
        "must be 64 hexadecimal digits in lower case, as `sha256sum FILE` prints them",
    ),
]
Url = Annotated[
    str,
    AfterValidator(_without_credentials),
    _matching(
        r"s3://[^/]+/.+|file:///.+|[^:]+",
        "must be s3://BUCKET/PREFIX, a local path or file:///PATH",
    ),
]


def _check_rising(name: str, values: Sequence[float]) -> None:
    for before, after in pairwise(values):
        if after <= before:
            raise ValueError(f"{name} must rise, got {after:g} after {before:g}")


def _kind_or(default: str) -> Discriminator:
    """Tells the sections of a union apart by `kind`, which run files may leave out."""

    def kind_of(value: Any) -> str:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", "")

    return Discriminator(kind_of)


class Section(BaseModel):
    """A part of the schema: unknown keys refused, no coercion, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoreConfig(Section):
    """How object storage is reached. Credentials come from the AWS_* environment only."""

    endpoint_url: Annotated[str, AfterValidator(_without_credentials)] | None = None
    """S3 endpoint; null means AWS_ENDPOINT_URL, or AWS itself where that is unset."""
    deadline_seconds: PositiveFloat = 60.0
    """A request is retried for this long before the run stops with one error."""
    request_timeout_seconds: PositiveFloat = 10.0
    """A single attempt may take this long."""


class SourceConfig(Section):
    """One of several shard sets that are trained on together."""

    shards: Url
    weight: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = 1.0
    """Its share of every batch, in proportion to the other sources' weights."""


class CacheConfig(Section):
    """Fetched ranges of shards kept on a local disk, for later epochs; shared by its processes."""

    folder: str
    limit_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The least recently used ranges go beyond it."""


class DataConfig(Section):
    """Which images, and how they are dealt out."""

    shards: Url | None = None
    """Folder of WebDataset tars with their index (s3://bucket/prefix or a local path)."""
    sources: dict[SourceName, SourceConfig] = {}
    """Instead of `shards`: several such folders by names of your choice, mixed by weight."""
    image_size_px: PositiveInt
    """Side of the square the encoder and the backbone see; images are resized to it."""
    lanes: PositiveInt | None = None
    """Places in the epoch that are read side by side; more mix better. Null means one per image of
    the global batch: then a rank reads windows that no other rank reads."""
    window_rows: PositiveInt = 128
    """Consecutive rows of a shard fetched by one ranged GET and shuffled together."""
    decode_threads: PositiveInt = 2
    """Threads that decode images, per rank."""
    cache: CacheConfig | None = None
    crop: Literal["centre", "random"] = "centre"
    """Which square of an image that is none: the middle, or a place decided by its position."""
    horizontal_flip: bool = False
    """Mirror every other image, decided by its position like the noise."""
    error_budget: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.001
    """Share of the samples read (of an epoch, in the first one) that may be replaced, because they
    cannot be used, before the run stops."""
    prefetch_batches: PositiveInt = 4
    """Decoded micro-batches held ready, per rank; bounds the loader's memory."""

    @model_validator(mode="after")
    def _one_way_to_say_which(self) -> Self:
        if (self.shards is None) == (not self.sources):
            raise ValueError(
                "give either shards (one folder) or sources (several: "
                "{NAME: {shards: URL, weight: 1}, ...}, with shards: null)"
            )
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """URLs of the shard sets; sources in the order of their names."""
        if self.shards is not None:
            return (self.shards,)
        return tuple(config.shards for _, config in sorted(self.sources.items()))

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources, in the same order; none where there is only one folder."""
        return tuple(config.weight for _, config in sorted(self.sources.items()))

    def moved(self, move: Callable[[str], str]) -> Self:
        """The same with every folder's URL replaced by what `move` makes of it."""
        sources = {
            name: config.model_copy(update={"shards": move(config.shards)})
            for name, config in self.sources.items()
        }
        shards = None if self.shards is None else move(self.shards)
        return self.model_copy(update={"shards": shards, "sources": sources})


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

    weights: Url
    """safetensors file with its JSON card beside it, or `builtin/NAME` for a packaged one."""
    sha256: Sha256
    """SHA-256 of the safetensors file; a file with another hash is refused."""


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


AnyEncoderConfig = Annotated[
    Annotated[EncoderConfig, Tag("conv")] | Annotated[ResNet10Config, Tag("resnet10")],
    _kind_or("conv"),
]


class StagedPartition(Section):
    """How z is cut by time-step (METHOD section 2), stage by stage.

    Each stage is cut evenly in time-steps and in dimensions. One stage with one subset is PDAE.
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
        _check_rising("stage_ends", self.stage_ends)
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
        _check_rising("stage_ends", self.stage_ends)
        if self.stage_ends[-1] != self.num_timesteps:
            raise ValueError(
                f"stage_ends must end at num_timesteps ({self.num_timesteps}), "
                f"got {self.stage_ends[-1]}"
            )
        return self


PartitionConfig = Annotated[
    Annotated[StagedPartition, Tag("stages")] | Annotated[PublishedPartition, Tag("published")],
    _kind_or("stages"),
]


class TimestepsConfig(Section):
    """Which time-steps are trained on: pieces between edges, each drawn from evenly.

    The default is the paper's: uniform over all of them.
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
            _check_rising("log-SNR edges, negated,", [-edge for edge in self.edges])
            return self
        _check_rising("edges", self.edges)
        if self.edges[0] < 0 or any(edge != int(edge) for edge in self.edges):
            raise ValueError(f"edges in time-steps must be whole and not negative: {self.edges}")
        return self


class DitiTask(Section):
    """Train the encoder and the shift decoder against a frozen backbone (METHOD section 3)."""

    kind: Literal["diti"]
    backbone: BackboneConfig
    encoder: AnyEncoderConfig = EncoderConfig()
    partition: PartitionConfig = StagedPartition()
    mode: Literal["base", "stop_grad", "dual"] = "base"
    """What the decoder sees at t: all subsets up to t's own; the same with gradients to the own
    subset only; or both, with the losses added."""
    weight: Literal["snr", "constant", "min_snr"] = "snr"
    """Loss weight: the paper's SNR^gamma / (1 + SNR), 1, or min(SNR, cap) / SNR."""
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


class OptimizerConfig(Section):
    """AdamW (decay 0 is Adam) with a linear warm-up."""

    learning_rate: PositiveFloat = 1e-4
    """For the global batch; it does not change with the number of workers."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises linearly from 0."""
    decay_images: NonNegativeInt = 0
    """Images before the end over which the learning rate falls along a cosine to 0."""
    clip_norm: PositiveFloat | None = None
    """Global gradient norm is clipped to this; null means no clipping."""


class TrainConfig(Section):
    """The loop: how long, how large, how often."""

    total_images: PositiveInt
    """The run ends with the first batch that reaches this many images."""
    global_batch: PositiveInt
    """Images per optimizer step over all ranks; fixed whatever the world size."""
    max_micro_batch: PositiveInt = 128
    """Most images per rank in one forward pass; more are accumulated over several."""
    ema_decay: Fraction = 0.9999
    """Decay per step of the exponential moving average of the trained weights."""
    checkpoint_every_images: PositiveInt
    """A checkpoint is published after each such number of images, at the start and the end."""
    keep_last: PositiveInt | None = None
    """Complete checkpoints that are kept whole, the newest ones; of others, only what they say of
    the run's history stays. Null keeps all."""
    keep_every_images: PositiveInt | None = None
    """With `keep_last`, keep those at each such number of images too."""
    publish_deadline_seconds: PositiveFloat = 600.0
    """A checkpoint whose parts have not arrived in storage by then is given up; the run goes on."""
    log_every_steps: PositiveInt = 10
    """Steps per line of metrics."""


class EngineConfig(Section):
    """DeepSpeed ZeRO and numerics."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of what the model computes with; the optimizer and the average keep float32."""
    offload_optimizer: bool = False
    """Keep the optimizer's state, and take its steps, in the CPU's memory."""
    backbone: Literal["replicated", "partitioned", "offloaded"] = "replicated"
    """Where the frozen weights are: whole on every rank; or one part on each rank, every layer
    being gathered when it computes and let go after; or such parts in the CPU's memory."""
    recompute_activations: bool = False
    """Compute what the trained U-Net blocks keep for the backward pass a second time instead: less
    memory, more time."""
    compile: Literal["nothing", "frozen", "trained", "both"] = "nothing"
    """What torch.compile makes kernels of at the start, which takes minutes, and on a CPU a C++
    compiler: the frozen backbone, and encoder with shift path."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """Attention kernel; `xformers` refuses to start where the kernel does not work."""

    @model_validator(mode="after")
    def _compiles_only_what_is_whole(self) -> Self:
        """ZeRO-3 gathers weights in hooks, which a compiled module does not run."""
        if self.compile in ("frozen", "both") and self.backbone != "replicated":
            raise ValueError(
                f"compile {self.compile!r} needs backbone 'replicated', got {self.backbone!r}: "
                f"a backbone in parts is gathered layer by layer, which cannot be compiled"
            )
        if self.compile in ("trained", "both") and self.zero_stage == 3:
            raise ValueError(
                f"compile {self.compile!r} needs zero_stage 0, 1 or 2, got 3: weights in parts "
                f"are gathered layer by layer, which cannot be compiled; use stage 2"
            )
        return self


class ClusterConfig(Section):
    """What the run asks of Ray."""

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """With it, the run starts, and goes on, with as many of `num_workers` as the cluster has room
    for, down to this number; those that split the global batch only. Null waits for all."""
    use_gpu: bool = False
    cpus_per_worker: PositiveInt = 1
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group from the last complete checkpoint before the run fails. Nodes
    that are taken away with notice do not count."""
    resize_seconds: PositiveFloat = 60.0
    """With `min_workers`: how often to look whether the cluster has room for more workers."""
    stall_seconds: PositiveFloat = 300.0
    """A collective that waits this long for a rank fails the worker group, which is restarted."""
    stop_seconds: PositiveFloat = 60.0
    """After SIGTERM, how long the run has to publish a checkpoint before it is ended."""


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = "offline"
    project: str = "diti"


class RunConfig(Section):
    """A whole run."""

    name: Name
    """Names the run in storage and in wandb: letters, digits, dot, dash, underscore."""
    output: Url
    """Folder for checkpoints and logs; the run's own folder is output/name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: Annotated[DitiTask | DenoiserTask, Field(discriminator="kind")]
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    store: StoreConfig = StoreConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        train = self.train
        if train.total_images < train.global_batch:
            raise ValueError(
                f"train.total_images ({train.total_images}) must be at least "
                f"train.global_batch ({train.global_batch})"
            )
        ramps = self.optimizer.warmup_images + self.optimizer.decay_images
        if ramps > train.total_images:
            raise ValueError(
                f"optimizer.warmup_images + optimizer.decay_images ({ramps}) must not exceed "
                f"train.total_images ({train.total_images}); lower them with it"
            )
        return self

    @model_validator(mode="after")
    def _workers_split_the_batch(self) -> Self:
        least, most = self.cluster.min_workers, self.cluster.num_workers
        if least is not None and least > most:
            raise ValueError(
                f"cluster.min_workers ({least}) must not exceed cluster.num_workers ({most})"
            )
        return self

    @model_validator(mode="after")
    def _kept_checkpoints_exist(self) -> Self:
        train = self.train
        if train.keep_every_images is None:
            return self
        if train.keep_last is None:
            raise ValueError("train.keep_every_images needs train.keep_last: without, all are kept")
        if train.keep_every_images % train.checkpoint_every_images:
            raise ValueError(
                f"train.keep_every_images ({train.keep_every_images}) must be a multiple of "
                f"train.checkpoint_every_images ({train.checkpoint_every_images})"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_is_fp32(self) -> Self:
        if (
            isinstance(self.task, DitiTask)
            and isinstance(self.task.encoder, ResNet10Config)
            and self.engine.precision != "fp32"
        ):
            raise ValueError(
                f"task.encoder.kind resnet10 needs engine.precision fp32, "
                f"got {self.engine.precision}: BatchNorm's averages stand still in fewer digits"
            )
        return self

    @model_validator(mode="after")
    def _images_fit_unet(self) -> Self:
        if isinstance(self.task, DenoiserTask):
            unet = self.task.unet
            divisor = unet.patch_size_px * 2 ** (len(unet.channel_multipliers) - 1)
            if self.data.image_size_px % divisor:
                raise ValueError(
                    f"data.image_size_px must be divisible by {divisor} (the U-Net's patches and "
                    f"down-sampling), got {self.data.image_size_px}"
                )
        return self


def _check_timesteps(timesteps: TimestepsConfig, num_timesteps: int) -> None:
    if timesteps.unit == "timestep" and timesteps.edges[-1] > num_timesteps:
        raise ValueError(
            f"timesteps.edges must lie inside [0, {num_timesteps}], got {timesteps.edges[-1]:g}"
        )
