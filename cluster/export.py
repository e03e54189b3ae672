"""Features of every image of a shard set, computed on Ray: one Parquet part per shard.

Workers lease shards, read them straight from storage, and publish a part and a commit each; what
these are, and when a feature set exists, is told in `pretrain.feature_export`.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from cluster.coordinator import NamedCoordinator, Work
from cluster.leases import QueueState
from cluster.session import last_line, ray_session
from cluster.work import run_workers, work_off
from data_pipelines.feature_layout import CopiedKind, Dtype, FeatureLayout, select_columns
from data_pipelines.feature_store import FeatureManifest, publish_manifest, stem_of
from data_pipelines.object_store import ObjectStore, StoreError, absolute
from data_pipelines.shard_index import ShardIndex, first_ten, read_index, verify_listing
from pretrain.feature_export import (
    Export,
    ExportFailedError,
    ExportStart,
    claim,
    export_shard,
    look_into,
    summarise,
)
from pretrain.published import ConfigSource
from pretrain.shard_features import EncoderOnDevice, columns_of
from pretrain.trained import EncoderLoader, choose_encoder

CPU_LANES = 2
"""Shards that a worker has in hand: one computes while the other is read or written."""
GPU_LANES = 8
"""On a GPU each of them also decodes, on a core of its own."""
_KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the most that glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Else each lane fetches and clears the pages of its activations again and again: up to an eighth
of the time of a worker."""


def export_features(
    store: ObjectStore,
    *,
    shards_url: str,
    out_url: str,
    num_workers: int,
    run_url: str | None = None,
    step: int | None = None,
    checkpoint_url: str | None = None,
    config: ConfigSource | None = None,
    ema: bool = True,
    timesteps: tuple[int, int] | None = None,
    dtype: Dtype = "float16",
    copied: dict[str, CopiedKind] | None = None,
    error_budget: float = 0.001,
    use_gpu: bool = False,
    on_start: Callable[[ExportStart], None] = lambda start: None,
    on_progress: Callable[[QueueState], None] = lambda state: None,
) -> FeatureManifest:
    """Encode every image at `shards_url` with a trained encoder, into `out_url`.

    Args:
        run_url, step: the encoder of a run of this project, at a step or at its newest checkpoint.
        checkpoint_url, config: instead, that of an authors' file; every worker must reach it.
        ema: the averaged weights; False takes the online ones.
        timesteps: only the subsets whose time-steps intersect this half-open range.
        copied: fields of each sample's json that become columns.
        error_budget: share of the samples that may have no row because they cannot be used.
        use_gpu: a GPU for each worker, which computes in bfloat16.
        on_start: called once nothing is left to be refused.

    Raises:
        ValueError, OSError: refused before start: no such checkpoint, shards that do not match
            their index, or an `out_url` that holds other features.
        ExportFailedError: naming the shards that failed, and why.
    """
    shards_url, out_url = absolute(shards_url), absolute(out_url)
    load, trained = choose_encoder(store, run_url, step, checkpoint_url, config, ema=ema)
    index = read_index(store, shards_url)
    verify_listing(store, index)
    columns = select_columns(columns_of(trained.partition), timesteps)
    unscaled = Export(
        out_url=out_url,
        source=shards_url.rstrip("/").rsplit("/", 1)[-1],
        encoder_sha256=trained.sha256,
        checkpoint=trained.checkpoint,
        index_digest=index.digest,
        precision="bf16" if use_gpu else "fp32",
        layout=FeatureLayout(columns, "float16", copied=copied or {}),
    )
    found = look_into(store, unscaled, index)
    export = claim(store, unscaled, dtype, trained, index)
    for url in found.lost:
        store.delete(url)
    shards = len(index.shards)
    on_start(ExportStart(trained, index.num_samples, shards, found.done))
    if found.done < shards:
        _work_off(store, load, export, index, min(num_workers, shards - found.done), on_progress)
    manifest = summarise(store, export, trained, index, error_budget)
    publish_manifest(store, out_url, manifest)
    return manifest


def _work_off(
    store: ObjectStore,
    load: EncoderLoader,
    export: Export,
    index: ShardIndex,
    num_workers: int,
    on_progress: Callable[[QueueState], None],
) -> None:
    """Have workers export what is left, beside those of other drivers of the same export."""
    work = Work(tuple(stem_of(shard) for shard in index.shards), export.commits_url, ".json")
    name = f"export-{hashlib.sha256(export.out_url.encode()).hexdigest()[:16]}"
    num_gpus = num_workers if export.precision == "bf16" else 0
    with ray_session(num_cpus=num_workers, num_gpus=num_gpus):
        workers = [_start_worker(store, load, export) for _ in range(num_workers)]
        try:
            state, _ = run_workers(name, store, work, workers, on_progress, (index.url,))
        except (StoreError, RayError) as error:
            raise ExportFailedError(
                f"export into {export.out_url} stopped: {last_line(error)}. Finished parts are "
                f"kept; run the same command again to go on."
            ) from error
    if state.failures:
        causes = [f"{stem}: {reason}" for stem, reason in sorted(state.failures.items())]
        raise ExportFailedError(
            f"{len(causes)} of {len(index.shards)} shards could not be exported: "
            f"{first_ten(causes)}. Mend them and run the same command again; finished parts are "
            f"kept."
        )


class _ExportWorker:
    """Loads the encoder once, then works until nothing is left to lease."""

    def __init__(self, store: ObjectStore, load: EncoderLoader, export: Export) -> None:
        torch.set_num_threads(1)
        self._store = store
        self._export = export
        trained = load(store=store)
        if trained.sha256 != export.encoder_sha256:
            raise ValueError(
                f"{trained.checkpoint} was replaced during the export: its encoder has SHA-256 "
                f"{trained.sha256}, not {export.encoder_sha256}; export a file that stays as it is"
            )
        use_gpu = export.precision == "bf16"
        self._encoder = EncoderOnDevice(trained, use_gpu=use_gpu)
        self._encoder.warm_up()  # a first call compiles, and leases run out meanwhile
        self._lanes = GPU_LANES if use_gpu else CPU_LANES

    def work(self, name: str, coordinator: NamedCoordinator) -> None:
        index: ShardIndex = coordinator.ask(lambda actor: actor.index.remote())
        shards = {stem_of(shard): shard for shard in index.shards}

        def export(stem: str) -> None:
            export_shard(self._store, self._encoder, self._export, shards[stem])

        work_off(name, coordinator, export, lanes=self._lanes)


def _start_worker(store: ObjectStore, load: EncoderLoader, export: Export) -> Any:
    use_gpu = export.precision == "bf16"
    actor: Any = ray.remote(
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
        max_restarts=3,
        max_task_retries=3,
        runtime_env={"env_vars": _KEEP_FREED_MEMORY},
    )(_ExportWorker)
    return actor.remote(store, load, export)
