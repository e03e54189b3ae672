"""Features of every image of a shard set, computed on Ray: one Parquet part per shard.

Workers lease shards from the coordinator, read them straight from storage and publish their parts
there. A part appears whole or not at all, so an export that was stopped goes on where it was; the
manifest is written last.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError

from cluster.coordinator import Work, start_coordinator
from cluster.leases import QueueState
from cluster.session import last_line, ray_session, result_of
from cluster.work import run_workers, work_off
from data_pipelines.feature_part import (
    FeatureColumn,
    FeatureMismatchError,
    PartInfo,
    encode_part,
    part_moments,
)
from data_pipelines.feature_store import FeatureManifest, part_name, publish_manifest
from data_pipelines.object_store import (
    AlreadyExistsError,
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    StoreError,
    absolute,
    join,
)
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_reader import read_shard
from data_pipelines.shard_index import Shard, ShardIndex, read_index, verify_listing
from pretrain.published import ConfigSource
from pretrain.trained import TrainedEncoder, load_encoder, load_published_encoder

IMAGES_PER_FORWARD = 256
DECODE_THREADS = 2
INTENT_NAME = "export.json"
_INTENT_SAYS = {"encoder_sha256": "encoder", "index_digest": "shard set"}

EncoderLoader = Callable[..., TrainedEncoder]
"""Takes `store=`; all else about the encoder is bound, so that it can be sent to workers."""


class ExportFailedError(RuntimeError):
    """Some shards could not be exported; the finished parts are kept."""


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
    on_start: Callable[[TrainedEncoder], None] = lambda encoder: None,
    on_progress: Callable[[QueueState], None] = lambda state: None,
) -> FeatureManifest:
    """Encode every image at `shards_url` with a trained encoder, into `out_url`.

    Args:
        run_url, step: the encoder of a run of this project, at a step or at its newest checkpoint.
        checkpoint_url, config: instead, that of an authors' file; every worker must reach it.
        ema: the averaged weights; False takes the online ones.
        on_start: called with the encoder once nothing is left to be refused.

    Raises:
        ValueError, OSError: refused before start: no such checkpoint, shards that do not match
            their index, or an `out_url` that holds features of another encoder or shard set.
        ExportFailedError: naming the shards that failed, and why.
    """
    shards_url, out_url = absolute(shards_url), absolute(out_url)
    load, trained = _choose_encoder(store, run_url, step, checkpoint_url, config, ema=ema)
    index = read_index(store, shards_url)
    verify_listing(store, index)
    _check_intent(store, out_url, trained, index)
    source = shards_url.rstrip("/").rsplit("/", 1)[-1]
    stems = tuple(shard.name.removesuffix(".tar") for shard in index.shards)
    work = Work(stems, join(out_url, source), ".parquet")
    with ray_session(num_cpus=num_workers):
        _declare_intent(store, out_url, trained, index)
        on_start(trained)
        name = f"export-{uuid.uuid4().hex[:8]}"
        coordinator = start_coordinator(name, store, (shards_url,), work)
        workers = [_start_worker(store, load, trained.sha256, work) for _ in range(num_workers)]
        try:
            state, _ = run_workers(workers, coordinator, on_progress)
        except (StoreError, RayError) as error:
            raise ExportFailedError(
                f"export into {out_url} stopped: {last_line(error)}. Finished parts are kept; run "
                f"the same command again to go on."
            ) from error
    if state.failures:
        causes = "; ".join(f"{stem}: {reason}" for stem, reason in sorted(state.failures.items()))
        raise ExportFailedError(
            f"{len(state.failures)} of {len(index.shards)} shards could not be exported: {causes}. "
            f"Mend them and run the same command again; finished parts are kept."
        )
    manifest = _summarise(store, trained, index, out_url, source)
    publish_manifest(store, out_url, manifest)
    return manifest


def encode_shard(store: ObjectStore, trained: TrainedEncoder, shard: Shard) -> bytes:
    """The Parquet part of one shard.

    Raises:
        ShardMismatchError: the tar is not the one that was indexed.
        DecodeError: an image cannot be used.
    """
    samples = read_shard(store, shard)
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        images = list(
            pool.map(lambda sample: decode_sample(sample, trained.image_size_px), samples)
        )
    features = [
        _encode(trained, np.stack(images[start : start + IMAGES_PER_FORWARD]))
        for start in range(0, len(images), IMAGES_PER_FORWARD)
    ]
    return encode_part(
        feature_columns(trained),
        keys=[sample["__key__"] for sample in samples],
        shard=shard.name,
        rows=[sample["__row__"] for sample in samples],
        features=np.concatenate(features),
    )


def feature_columns(trained: TrainedEncoder) -> tuple[FeatureColumn, ...]:
    """One column per subset of the encoder's partition, fine to coarse.

    Some published cuts have subsets without a dimension. A column cannot be empty, so their
    time-steps go to the column before, whose dimensions the decoder sees there too (the first
    ones to the column after), and the columns are numbered without them.
    """
    columns: list[FeatureColumn] = []
    for subset in trained.partition.subsets:
        steps, dims = subset.timesteps, subset.dims
        if dims[0] < dims[1]:
            start = steps[0] if columns else 0
            columns.append(FeatureColumn(f"z{len(columns):03d}", (start, steps[1]), dims))
        elif columns:
            last = columns[-1]
            columns[-1] = FeatureColumn(last.name, (last.timesteps[0], steps[1]), last.dims)
    return tuple(columns)


def _choose_encoder(
    store: ObjectStore,
    run_url: str | None,
    step: int | None,
    checkpoint_url: str | None,
    config: ConfigSource | None,
    *,
    ema: bool,
) -> tuple[EncoderLoader, TrainedEncoder]:
    """How every worker gets the encoder, and the encoder."""
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


class _ExportWorker:
    """Loads the encoder once, then works until nothing is left to lease."""

    def __init__(self, store: ObjectStore, load: EncoderLoader, sha256: str, work: Work) -> None:
        torch.set_num_threads(1)
        self._store = store
        self._work = work
        self._trained = load(store=store)
        if self._trained.sha256 != sha256:
            raise ValueError(
                f"{self._trained.checkpoint} was replaced during the export: its encoder has "
                f"SHA-256 {self._trained.sha256}, not {sha256}; export a file that stays as it is"
            )

    def work(self, name: str, coordinator: Any) -> None:
        index: ShardIndex = result_of(coordinator.index.remote())
        shards = {shard.name.removesuffix(".tar"): shard for shard in index.shards}

        def export(stem: str) -> None:
            part = encode_shard(self._store, self._trained, shards[stem])
            self._store.write(self._work.result_url(stem), part)

        work_off(name, coordinator, export)


def _start_worker(store: ObjectStore, load: EncoderLoader, sha256: str, work: Work) -> Any:
    actor: Any = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(_ExportWorker)
    return actor.remote(store, load, sha256, work)


@torch.inference_mode()
def _encode(trained: TrainedEncoder, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    images = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return trained.encoder(images).float().numpy()


def _declare_intent(
    store: ObjectStore, out_url: str, trained: TrainedEncoder, index: ShardIndex
) -> None:
    """Claim `out_url` for this encoder and shard set, or find that it already is ours."""
    intent = _intent(trained, index) | {"checkpoint": trained.checkpoint}
    try:
        data = json.dumps(intent).encode()
        store.write(join(out_url, INTENT_NAME), data, only_if_absent=True)
    except AlreadyExistsError:
        _check_intent(store, out_url, trained, index)


def _check_intent(
    store: ObjectStore, out_url: str, trained: TrainedEncoder, index: ShardIndex
) -> None:
    """Raises ValueError where `out_url` is claimed for another encoder or shard set."""
    where, intent = join(out_url, INTENT_NAME), _intent(trained, index)
    try:
        found = dict(json.loads(store.read(where)).items())
    except BucketMissingError:
        raise
    except ObjectMissingError:
        return
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{where} is damaged ({error}), so nobody knows whose features {out_url} holds; "
            f"delete that folder, or export into another one"
        ) from error
    which = " and ".join(
        what for key, what in _INTENT_SAYS.items() if found.get(key) != intent[key]
    )
    if which:
        raise ValueError(
            f"{out_url} holds features of another {which} ({found.get('checkpoint', 'unknown')}; "
            f"this is {trained.checkpoint}). Export into another folder, delete that one, or "
            f"choose that checkpoint with --step"
        )


def _intent(trained: TrainedEncoder, index: ShardIndex) -> dict[str, str]:
    return {"encoder_sha256": trained.sha256, "index_digest": index.digest}


def _summarise(
    store: ObjectStore, trained: TrainedEncoder, index: ShardIndex, out_url: str, source: str
) -> FeatureManifest:
    columns, parts, count = feature_columns(trained), {}, 0
    total = np.zeros(trained.partition.latent_dim)
    squares = np.zeros(trained.partition.latent_dim)
    for shard in index.shards:
        name = part_name(source, shard.name.removesuffix(".tar"))
        where = join(out_url, name)
        data = store.read(where)
        try:
            moments = part_moments(data, columns, shard=shard.name, where=where)
            if moments.count != shard.num_samples:
                raise FeatureMismatchError(
                    f"{where} has {moments.count} rows, {shard.name} has {shard.num_samples}"
                )
        except FeatureMismatchError as error:
            raise ExportFailedError(
                f"{error}; delete it, and run the same command again to make it anew"
            ) from error
        parts[name] = PartInfo(moments.count, len(data), hashlib.sha256(data).hexdigest())
        count += moments.count
        total += moments.sum
        squares += moments.sum_of_squares
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    return FeatureManifest(
        columns=columns,
        dtype="float16",
        encoder_sha256=trained.sha256,
        checkpoint=trained.checkpoint,
        backbone_sha256=trained.backbone_sha256,
        config=trained.config,
        source_url=index.url,
        index_digest=index.digest,
        rows=count,
        parts=parts,
        mean=mean.tolist(),
        std=np.sqrt(variance).tolist(),
    )
