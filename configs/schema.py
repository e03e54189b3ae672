"""What a run is: every field, its unit, and every rule between fields.

A `RunConfig` is a frozen value. It is built by `configs.loading` from YAML and never written to
afterwards. Rules that need a bucket, a world size or a weights file are not here: they are checked
by `pretrain.preflight` and `pretrain.run_plan` before a run starts.
"""

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.task import (
    BaselineTask,
    DenoiserTask,
    DiffAeTask,
    DiffusersConfig,
    DitiTask,
    MaskedTask,
    ResNet10Config,
    SimSiamTask,
)
from configs.values import (
    Amount,
    Endpoint,
    Fraction,
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    SourceName,
    Url,
)


class StoreConfig(Section):
    """How object storage is reached. Credentials come from the AWS_* environment only."""

    endpoint_url: Endpoint | None = None
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

    folder: Annotated[str, Field(min_length=1)]
    limit_gib: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)]
    """The least recently used ranges go beyond it."""


class DataConfig(Section):
    """Which images, and how they are dealt out."""

    shards: Url | None = None
    """Folder of WebDataset tars with their index (s3://bucket/prefix or a local path)."""
    sources: dict[SourceName, SourceConfig] = Field(default_factory=dict)
    """Instead of `shards`: several such folders by names of your choice, mixed by weight."""
    image_size_px: PositiveInt
    """Side of the square the encoder and the backbone see; images are resized to it."""
    lanes: Amount | None = None
    """Places in the epoch that are read side by side; more mix better. Null means one per image of
    the global batch: then a rank reads windows that no other rank reads."""
    window_rows: Amount = 128
    """Consecutive rows of a shard fetched by one ranged GET and shuffled together."""
    decode_threads: Amount = 2
    """Threads that decode images, per rank."""
    cache: CacheConfig | None = None
    encoded: Url | None = None
    """Folder of what `diti data encode` made of `shards` for a backbone of diffusers: latents, and
    embeddings of captions. Null makes latents as they are needed."""
    crop: Literal["centre", "random"] = "centre"
    """Which square of an image that is none: the middle, or a place decided by its position."""
    horizontal_flip: bool = False
    """Mirror every other image, decided by its position like the noise."""
    error_budget: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.001
    """Share of the samples read (of an epoch, in the first one) that may be replaced, because they
    cannot be used, before the run stops."""
    prefetch_batches: Amount = 4
    """Decoded micro-batches held ready, per rank; bounds the loader's memory."""

    @model_validator(mode="after")
    def _one_way_to_say_which(self) -> Self:
        if (self.shards is None) == (not self.sources):
            raise ValueError(
                "give either shards (one folder) or sources (several: "
                "{NAME: {shards: URL, weight: 1}, ...}, with shards: null)"
            )
        return self

    @model_validator(mode="after")
    def _encoded_as_they_are(self) -> Self:
        if self.encoded is None:
            return self
        if self.shards is None:
            raise ValueError("encoded goes with shards, not with several sources; join these first")
        if self.crop != "centre":
            raise ValueError(
                "encoded latents are of centre squares; use crop centre, or no encoded"
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
        own = {
            name: None if url is None else move(url)
            for name, url in (("shards", self.shards), ("encoded", self.encoded))
        }
        return self.model_copy(update={**own, "sources": sources})


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
    if_damaged: Literal["stop", "go_back"] = "stop"
    """When the newest checkpoint is no longer what was published: end the run and name the next
    older one, or set it aside and go back to that one."""
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
    def _offloads_only_under_zero(self) -> Self:
        """At stage 0 DeepSpeed would take no notice of it."""
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs zero_stage 1, 2 or 3, got 0: without ZeRO the optimizer "
                "stays where the weights are"
            )
        return self

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
    stall_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300.0
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
    task: Annotated[DitiTask | DenoiserTask | BaselineTask, Field(discriminator="kind")]
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
    def _encoded_for_a_backbone(self) -> Self:
        backbone = self.task.backbone if isinstance(self.task, DitiTask) else None
        encoded = self.data.encoded
        if not isinstance(backbone, DiffusersConfig):
            if encoded is not None:
                raise ValueError("data.encoded needs task.backbone.kind diffusers: it is for one")
        elif backbone.condition == "caption" and encoded is None:
            raise ValueError(
                "task.backbone.condition caption needs data.encoded: captions are embedded "
                "beforehand, by `diti data encode`"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_is_fp32(self) -> Self:
        task = self.task
        if isinstance(task, DenoiserTask) or self.engine.precision == "fp32":
            return self
        if isinstance(task, SimSiamTask) or isinstance(task.encoder, ResNet10Config):
            which = "encoder.kind resnet10" if task.encoder.kind == "resnet10" else "kind simsiam"
            raise ValueError(
                f"task.{which} needs engine.precision fp32, got {self.engine.precision}: "
                f"BatchNorm's averages stand still in fewer digits"
            )
        return self

    @model_validator(mode="after")
    def _images_fit_patches(self) -> Self:
        task, size = self.task, self.data.image_size_px
        if isinstance(task, MaskedTask) and size % task.patch_size_px:
            raise ValueError(
                f"data.image_size_px must be divisible by task.patch_size_px "
                f"({task.patch_size_px}), got {size}"
            )
        return self

    @model_validator(mode="after")
    def _images_fit_unet(self) -> Self:
        if isinstance(self.task, DenoiserTask | DiffAeTask):
            unet = self.task.unet
            divisor = unet.patch_size_px * 2 ** (len(unet.channel_multipliers) - 1)
            if self.data.image_size_px % divisor:
                raise ValueError(
                    f"data.image_size_px must be divisible by {divisor} (the U-Net's patches and "
                    f"down-sampling), got {self.data.image_size_px}"
                )
        return self
