"""Everything that can be refused before a single worker is started."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.schema import EngineConfig, RunConfig
from configs.task import DenoiserTask, DitiTask, LabelsTask
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.range_cache import RangeCache
from data_pipelines.sample_labels import LABELS_EXTENSION, labels_in
from data_pipelines.sample_mix import Order, SampleMix
from data_pipelines.sample_order import SampleOrder
from data_pipelines.sample_reader import read_sample
from data_pipelines.shard_index import (
    ShardIndex,
    changed_shards,
    listing_of,
    read_index,
    read_members,
    read_sets,
    shards_changed,
    verify_listing,
)
from pretrain import checkpoint
from pretrain.attention import DTYPES, choose_kernel
from pretrain.baselines import make_baseline
from pretrain.diti import DiTi
from pretrain.encoded import open_encoded
from pretrain.frozen import load_frozen
from pretrain.resumable import changed_settings, check_resumable
from pretrain.run_plan import RunPlan, plan_run
from pretrain.trained import initial_weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found on the way, so that it need not be read twice."""

    index: ShardIndex
    plan: RunPlan
    resumes_at: int
    """Step of the newest complete checkpoint; 0 for a new run."""
    changed: tuple[str, ...]
    """Settings that are no longer what they were at that checkpoint, and may be."""

    @property
    def is_done(self) -> bool:
        """Nothing is left to be trained."""
        return self.resumes_at >= self.plan.total_steps


def open_store(config: RunConfig) -> ObjectStore:
    """The object store as the run's configuration describes it."""
    return ObjectStore(
        endpoint_url=config.store.endpoint_url,
        deadline_seconds=config.store.deadline_seconds,
        request_timeout_seconds=config.store.request_timeout_seconds,
    )


def run_url(config: RunConfig) -> str:
    """The run's own folder."""
    return join(config.output, config.name)


def sample_order(config: RunConfig, index: ShardIndex) -> Order:
    """The order in which this run sees the samples of `index`.

    Raises:
        ValueError: there are fewer lanes than the weights of `data.sources` need.
    """
    data = config.data
    lanes = data.lanes or config.train.global_batch
    if not data.sources:
        return SampleOrder(index.sizes, seed=config.seed, lanes=lanes, window_rows=data.window_rows)
    ends = np.cumsum([shards for _, shards in index.folders])
    return SampleMix(
        np.split(index.sizes, ends[:-1]),
        data.weights,
        seed=config.seed,
        lanes=lanes,
        window_rows=data.window_rows,
    )


def load_start(model: DiTi, store: ObjectStore) -> None:
    """Give a fresh model the weights of `task.start_from`, where the run names any.

    Raises:
        ValueError, OSError: there are none, or they have other names or shapes than the model's.
    """
    if model.task.start_from is None:
        return
    model.load_state_dict(initial_weights(model.task.start_from, store, model))


def preflight(
    config: RunConfig,
    world_size: int,
    allow_change: Sequence[str] = (),
    from_step: int | None = None,
) -> Preflight:
    """Check the batch split, the store, the shards, the backbone and an existing checkpoint.

    Args:
        allow_change: settings that may differ from those of the checkpoint, see `resumable`.
        from_step: of the checkpoint, if it is not to be the newest one.

    Raises:
        ValueError, OSError: the first thing that is wrong, with its remedy.
    """
    plan = plan_run(config.train, world_size)
    store = open_store(config)
    store.check_access(run_url(config), write=True)
    index = read_sets(store, config.data.folders)
    _warn_of_rounding(sample_order(config, index), config.data.weights)
    _check_machine(config)
    _check_listing(config, store, index)
    if config.train.global_batch > index.num_samples:
        raise ValueError(
            f"train.global_batch is {config.train.global_batch}, but {index.url} has only "
            f"{index.num_samples} images; use a smaller batch or a larger set"
        )
    if isinstance(config.task, LabelsTask):
        _check_labels(config.task, store, index)
    if from_step is None:
        newest = checkpoint.newest(store, run_url(config))
    else:
        newest = checkpoint.find(store, run_url(config), from_step)
    backbone = None
    if isinstance(config.task, DitiTask):
        size = config.data.image_size_px
        backbone = load_frozen(store, config.task.backbone, image_size_px=size)
        model = DiTi(config.task, backbone, image_size_px=size)
        if config.data.encoded is not None:
            open_encoded(store, config, index, backbone)
            verify_listing(store, read_index(store, config.data.encoded))
        if newest is None:
            load_start(model, store)
    elif not isinstance(config.task, DenoiserTask):
        make_baseline(config.task, image_size_px=config.data.image_size_px)
    if newest is not None:
        checkpoint.check_files(store, run_url(config), newest)
        check_resumable(
            newest,
            config,
            index_digest=index.digest,
            backbone_sha256=backbone and backbone.sha256,
            backbone_card_sha256=backbone and backbone.card_sha256,
            allow_change=allow_change,
        )
    if newest is None:
        return Preflight(index, plan, resumes_at=0, changed=())
    changed = tuple(changed_settings(newest, config))
    _warn_of_decay(newest, config)
    return Preflight(index, plan, newest.step, changed)


def _check_labels(task: LabelsTask, store: ObjectStore, index: ShardIndex) -> None:
    """The first sample must have them; others that do not are bad samples."""
    shard = index.shards[0]
    table = read_members(store, shard)
    labels_in(read_sample(store, shard.url, table, 0, (LABELS_EXTENSION,)), task.attributes)


def _warn_of_rounding(order: Order, weights: Sequence[float]) -> None:
    """Weights are rounded to whole lanes; that may be far from what was asked for."""
    if isinstance(order, SampleMix):
        asked = [weight / sum(weights) for weight in weights]
        found = [count / order.lanes for count in order.lane_counts]
        if any(abs(a - b) > 0.05 * a for a, b in zip(asked, found, strict=True)):
            _log.warning(
                "the weights of data.sources become %s of %d lanes, so their shares are %s instead "
                "of %s; more data.lanes come nearer",
                ", ".join(map(str, order.lane_counts)),
                order.lanes,
                ", ".join(f"{share:.1%}" for share in found),
                ", ".join(f"{share:.1%}" for share in asked),
            )


def _warn_of_decay(newest: checkpoint.Manifest, config: RunConfig) -> None:
    before = checkpoint.run_of(newest)
    begin = before.train.total_images - before.optimizer.decay_images
    lengths = {(run.train.total_images, run.optimizer.decay_images) for run in (before, config)}
    if newest.images > begin and len(lengths) == 2:
        _log.warning(
            "the learning rate had begun to fall after %d images, and this run's falls elsewhere: "
            "the %d images done keep the rates that they had",
            begin,
            newest.images,
        )


def _check_machine(config: RunConfig) -> None:
    """What the workers will need besides data, as far as it can be tried here."""
    if not config.cluster.use_gpu:
        _check_cpu(config.engine)
    if config.data.cache is not None:
        RangeCache(Path(config.data.cache.folder), int(config.data.cache.limit_gib * 2**30))
    if config.wandb.mode == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise ValueError(
                "wandb.mode is 'online', but there are no credentials for it; run `wandb login`, "
                "set WANDB_API_KEY, or set wandb.mode=offline"
            )


def _check_cpu(engine: EngineConfig) -> None:
    choose_kernel(engine.attention, device=torch.device("cpu"), dtype=DTYPES[engine.precision])
    if engine.precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ValueError(
            "engine.precision is 'fp16', which this CPU has no instructions for; use fp32 or bf16, "
            "or a GPU (cluster.use_gpu=true)"
        )
    compiler = os.environ.get("CXX", "g++")  # as torch.compile looks for it
    if engine.compile != "nothing" and shutil.which(compiler) is None:
        raise ValueError(
            f"engine.compile is {engine.compile!r}, which on a CPU needs the C++ compiler "
            f"{compiler!r}, and there is none; install it (Debian, Ubuntu: apt install g++), name "
            f"another one in CXX, or set engine.compile=nothing"
        )


def _check_listing(config: RunConfig, store: ObjectStore, index: ShardIndex) -> None:
    """Refuse changed shards, unless the run's budget for bad samples has room for all of theirs."""
    changed = changed_shards(store, index, listing_of(store, index))
    lost = sum(shard.num_samples for shard in changed)
    if lost > config.data.error_budget * index.num_samples:
        raise shards_changed(index, changed)
    for shard, problem in changed.items():
        _log.warning("%s %s; its samples will be replaced (data.error_budget)", shard.url, problem)
