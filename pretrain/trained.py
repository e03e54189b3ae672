"""What training has made, ready for use: from a run of this project, or from an authors' file."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from configs.task import (
    BaselineTask,
    DenoiserTask,
    DiffAeTask,
    DitiTask,
    EncoderConfig,
    StagedPartition,
)
from data_pipelines.object_store import ObjectStore, absolute
from pretrain import checkpoint
from pretrain.backbone import digest_of_state, shapes_of, state_problems
from pretrain.diti import DiTi
from pretrain.encoder import AnyEncoder, make_encoder
from pretrain.frozen import load_frozen
from pretrain.partition import Partition, make_partition
from pretrain.published import (
    AuthorsCheckpoint,
    ConfigSource,
    PublishedCheckpointError,
    load_authors_checkpoint,
)
from pretrain.shift_decoder import ShiftDecoder

EncoderLoader = Callable[..., "TrainedEncoder"]
"""Takes `store=`; all else about the encoder is bound, so that it can be sent to workers."""
_log = logging.getLogger(__name__)
_FILE_ENDINGS = (".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class TrainedEncoder:
    """An encoder in eval mode, without the backbone it was trained against."""

    encoder: AnyEncoder
    partition: Partition
    image_size_px: int
    checkpoint: str
    """Name of the checkpoint (step-00001000), or of the authors' file."""
    step: int | None
    """None when an authors' file does not say."""
    backbone_sha256: str | None
    """Of the backbone's file; of an authors' file, over the tensors of its frozen part. None where
    the encoder was trained without one."""
    config: dict[str, Any]
    """Plain values: what the encoder was trained with, for the manifest of its features."""
    sha256: str
    """Over the encoder's weights."""


def load_encoder(
    store: ObjectStore, run_url: str, *, step: int | None = None, ema: bool = True
) -> TrainedEncoder:
    """The encoder of a run at `step`, or at its newest complete checkpoint.

    Args:
        ema: the averaged weights; False takes those of the last step.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another kind of run.
    """
    manifest = checkpoint.find(store, run_url, step)
    config = checkpoint.run_of(manifest)
    task = config.task
    if isinstance(task, DenoiserTask):
        raise checkpoint.CheckpointError(
            f"{run_url} is a run of kind {task.kind!r}; it trains no encoder"
        )
    partition = _partition_of(task)
    encoder = make_encoder(
        task.encoder, image_size_px=config.data.image_size_px, dim_ends=partition.dim_ends
    )
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in checkpoint.read_tensors(store, run_url, manifest, ema=ema).items()
        if name.startswith("encoder.")
    }
    _load_exactly(encoder, state, run_url)
    return TrainedEncoder(
        encoder=encoder.requires_grad_(False).eval(),
        partition=partition,
        image_size_px=config.data.image_size_px,
        checkpoint=manifest.name,
        step=manifest.step,
        backbone_sha256=manifest.backbone_sha256,
        config=manifest.config,
        sha256=digest_of(encoder),
    )


def _partition_of(task: DitiTask | BaselineTask) -> Partition:
    """What was trained without a partition is one subset."""
    dims = task.encoder.latent_dim
    if isinstance(task, DitiTask):
        return make_partition(task.partition, dims)
    end = task.schedule.num_timesteps if isinstance(task, DiffAeTask) else 1000
    return make_partition(
        StagedPartition(stage_ends=(end,), stage_dims=(dims,), stage_subsets=(1,)), dims
    )


def load_published_encoder(
    path: str | Path,
    config: ConfigSource | None = None,
    *,
    store: ObjectStore | None = None,
    ema: bool = True,
) -> TrainedEncoder:
    """The encoder of a checkpoint file that the authors' code, or PDAE's, wrote.

    Args:
        config: as `load_authors_checkpoint` takes it.
        store: reads the file; by default one with standard settings.
        ema: the averaged weights; False takes the online ones.

    Raises:
        PublishedCheckpointError: the file cannot be used, or holds a denoiser only.
    """
    authors = load_authors_checkpoint(path, config=config, ema=ema, store=store)
    encoder = authors.build_encoder()
    assert authors.partition is not None
    name = authors.source.rpartition("/")[2]
    return TrainedEncoder(
        encoder=encoder,
        partition=authors.partition,
        image_size_px=encoder.image_size_px,
        checkpoint=name,
        step=authors.step,
        backbone_sha256=authors.backbone_sha256,
        config={
            "name": name,
            "data": {"image_size_px": encoder.image_size_px},
            "checkpoint": {
                "source": authors.source,
                "sha256": authors.sha256,
                "kind": authors.kind,
                "step": authors.step,
                "ema": authors.ema,
                "mode": authors.mode,
                "config": authors.config.values,
            },
        },
        sha256=digest_of(encoder),
    )


def choose_encoder(
    store: ObjectStore,
    run_url: str | None,
    step: int | None,
    checkpoint_url: str | None,
    config: ConfigSource | None,
    *,
    ema: bool,
) -> tuple[EncoderLoader, TrainedEncoder]:
    """How any process gets the encoder of a run, or of an authors' file, and the encoder.

    Raises:
        ValueError: not exactly one of both is given, or something that belongs to the other one.
        CheckpointError, PublishedCheckpointError: it cannot be used.
    """
    if (run_url is None) == (checkpoint_url is None):
        raise ValueError(
            f"exactly one of a run and a checkpoint file must be given, got "
            f"{'neither' if run_url is None else f'{run_url} and {checkpoint_url}'}"
        )
    if run_url is not None:
        if config is not None:
            raise ValueError(
                f"a config belongs to a checkpoint file; {run_url} is a run, which holds its own"
            )
        trained = load_encoder(store, absolute(run_url), step=step, ema=ema)
        load = partial(load_encoder, run_url=absolute(run_url), step=trained.step, ema=ema)
        return load, trained
    assert checkpoint_url is not None
    if step is not None:
        raise ValueError(
            f"a step chooses among the checkpoints of a run; {checkpoint_url} is one checkpoint, "
            f"so give no step"
        )
    if isinstance(config, str | Path):
        config = absolute(str(config))
    load = partial(load_published_encoder, absolute(checkpoint_url), config, ema=ema)
    return load, load(store=store)


def load_diti(
    store: ObjectStore, run_url: str, *, step: int | None = None
) -> tuple[DiTi, RunConfig, checkpoint.Manifest]:
    """The whole model of a run, backbone included, in eval mode without gradients.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another kind of run.
        BackboneError: the backbone is not the pinned one.
    """
    manifest = checkpoint.find(store, run_url, step)
    config, task = _diti_run(manifest, run_url)
    size = config.data.image_size_px
    backbone = load_frozen(store, task.backbone, image_size_px=size)
    model = DiTi(task, backbone, image_size_px=size)
    weights = checkpoint.read_tensors(store, run_url, manifest, ema=True)
    _load_exactly(model, weights, run_url)
    return model.requires_grad_(False).eval(), config, manifest


def load_published_diti(
    path: str | Path, config: ConfigSource | None = None, *, store: ObjectStore | None = None
) -> tuple[DiTi, DitiTask]:
    """The whole model of an authors' checkpoint file, in eval mode without gradients, and its task.

    Raises:
        PublishedCheckpointError: the file cannot be used, or holds a denoiser only.
    """
    model = load_authors_checkpoint(path, config=config, store=store).build_diti()
    return model, model.task


def load_denoiser_weights(
    store: ObjectStore, run_url: str, manifest: checkpoint.Manifest
) -> dict[str, Tensor]:
    """The averaged U-Net weights of a denoiser run's checkpoint, by the U-Net's own names."""
    weights = checkpoint.read_tensors(store, run_url, manifest, ema=True)
    return {name.removeprefix("unet."): tensor for name, tensor in weights.items()}


def initial_weights(source: str | Path, store: ObjectStore, model: DiTi) -> Mapping[str, Tensor]:
    """Weights to start a DiTi run from: encoder and shift path, averaged, by `DiTi`'s names.

    Args:
        source: a checkpoint file in the published layout, or the folder of a run of this project,
            of which the newest complete checkpoint is taken.
        store: reads `source`.
        model: what they are for. Other names, shapes, attention heads or another backbone are
            refused; another partition or mode is meant, perhaps, and said.

    Raises:
        PublishedCheckpointError: they do not fit `model`, or as `load_authors_checkpoint`.
        CheckpointError: the run has no complete checkpoint, or a damaged one.
    """
    url = absolute(str(source))
    if url.endswith(_FILE_ENDINGS) or store.exists(url):
        authors = load_authors_checkpoint(url, store=store)
        weights = authors.trained_weights()
        _compare(authors, model)
    else:
        manifest = checkpoint.find(store, url, None)
        _compare_run(manifest, url, model)
        weights = checkpoint.read_tensors(store, url, manifest, ema=True)
    if problems := state_problems(shapes_of(weights), shapes_of(model.state_dict())):
        raise PublishedCheckpointError(
            f"{source} cannot start this run: its encoder and shift path are of another shape; "
            f"{problems}. Give task.encoder and task.backbone the shapes of that file."
        )
    return weights


def _compare_run(manifest: checkpoint.Manifest, url: str, model: DiTi) -> None:
    """What names and shapes do not tell, of a run of this project."""
    _, task = _diti_run(manifest, url)
    now = model.task
    if manifest.backbone_sha256 != now.backbone.sha256:
        raise checkpoint.CheckpointError(
            f"{url} cannot start this run: it was trained against another backbone (SHA-256 "
            f"{manifest.backbone_sha256}); set task.backbone to that one"
        )
    if task.encoder != now.encoder:
        raise checkpoint.CheckpointError(
            f"{url} cannot start this run: its encoder is {task.encoder.model_dump()}, this run's "
            f"{now.encoder.model_dump()}; give task.encoder the same values"
        )
    _warn_of_others(
        url, {"partition": (task.partition, now.partition), "mode": (task.mode, now.mode)}
    )


def _warn_of_others(source: str, settings: Mapping[str, tuple[object, object]]) -> None:
    for what, (found, wanted) in settings.items():
        if found != wanted:
            _log.warning("%s was trained with another %s than this run", source, what)


def _compare(authors: AuthorsCheckpoint, model: DiTi) -> None:
    """What names and shapes do not tell, of an authors' file."""
    encoder, found = model.task.encoder, authors.encoder_config
    if isinstance(encoder, EncoderConfig) and found and encoder.num_heads != found.num_heads:
        raise PublishedCheckpointError(
            f"{authors.source} cannot start this run: its encoder has {found.num_heads} attention "
            f"heads, the run's {encoder.num_heads}; set task.encoder.num_heads={found.num_heads}"
        )
    assert isinstance(model.decoder, ShiftDecoder)  # names and shapes have been those of the file
    backbone = model.decoder.backbone.state_dict()
    other = [
        name
        for name, tensor in authors.backbone.items()
        if name not in backbone
        or tensor.shape != backbone[name].shape
        or not torch.allclose(tensor, backbone[name].cpu(), rtol=1e-2, atol=1e-3)  # float16 passes
    ]
    if other:
        raise PublishedCheckpointError(
            f"{authors.source} cannot start this run: it was trained against another backbone, "
            f"which differs in {len(other)} tensors, first {other[0]}. Its own can be taken out of "
            f"it with `diti backbone import`."
        )
    _warn_of_others(
        authors.source,
        {
            "partition": (authors.partition, model.partition),
            "mode": (authors.mode, model.task.mode),
        },
    )


def digest_of(module: nn.Module) -> str:
    """SHA-256 over names and bytes of a module's tensors."""
    return digest_of_state(module.state_dict())


def _diti_run(manifest: checkpoint.Manifest, run_url: str) -> tuple[RunConfig, DitiTask]:
    config = checkpoint.run_of(manifest)
    if not isinstance(config.task, DitiTask):
        raise checkpoint.CheckpointError(
            f"{run_url} is a run of kind {config.task.kind!r}; a DiTi run is needed here"
        )
    return config, config.task


def _load_exactly(module: nn.Module, state: Mapping[str, Tensor], run_url: str) -> None:
    expected = module.state_dict().keys()
    if state.keys() != expected:
        raise checkpoint.CheckpointError(
            f"checkpoint of {run_url} holds other parameters than its configuration builds: "
            f"{sorted(state.keys() ^ expected)[:5]}; read it with the version that wrote it"
        )
    module.load_state_dict(state)
