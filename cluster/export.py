"""Features of every image of a shard set, computed on Ray: one Parquet part per shard.

    intent      which encoder, shards, columns and dtype a folder is for; written first
    parts       workers lease shards, read them straight from storage, and publish a part each
    commits     beside a part, once it is whole: this shard is done, and what its part holds
    manifest    the sum of the commits, written last

A part appears whole or not at all and is never written twice, so an export that was stopped goes
on where it was, and ends in the same bytes as one that was not.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from cluster.coordinator import NamedCoordinator, Work
from cluster.leases import QueueState
from cluster.session import last_line, ray_session
from cluster.work import run_workers, work_off
from configs.loading import digest_of_json
from data_pipelines.bad_samples import ranked_causes
from data_pipelines.feature_part import (
    CopiedKind,
    Dtype,
    FeatureLayout,
    FeatureMismatchError,
    PartOrigin,
    PartSummary,
    open_part,
    select_columns,
    summary_of,
)
from data_pipelines.feature_store import (
    COMMITS,
    FeatureManifest,
    layout_from_json,
    part_name,
    parts_listed,
    publish_manifest,
)
from data_pipelines.object_store import (
    AlreadyExistsError,
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    StoreError,
    absolute,
    join,
)
from data_pipelines.shard_index import Shard, ShardIndex, read_index, verify_listing
from pretrain.published import ConfigSource
from pretrain.shard_features import (
    EncoderOnDevice,
    Precision,
    columns_of,
    encode_shard,
    measured_scales,
)
from pretrain.trained import TrainedEncoder, load_encoder, load_published_encoder

CPU_LANES = 2
"""Shards that a worker has in hand: one computes while the other is read or written."""
GPU_LANES = 8
"""On a GPU each of them also decodes, on a core of its own."""
INTENT_NAME = "export.json"
MOST_NAMED = 10
"""Shards that a message names."""
_COMMIT_THREADS = 16
_INTENT_SAYS = {
    "encoder_sha256": "encoder",
    "index_digest": "shard set",
    "columns": "range of time-steps",
    "dtype": "dtype",
    "copied": "choice of copied columns",
    "precision": "precision",
}

EncoderLoader = Callable[..., TrainedEncoder]
"""Takes `store=`; all else about the encoder is bound, so that it can be sent to workers."""


class ExportFailedError(RuntimeError):
    """Some shards could not be exported; the finished parts are kept."""


@dataclass(frozen=True, slots=True)
class Export:
    """What all workers of an export have in common."""

    out_url: str
    source: str
    """Folder of the parts."""
    encoder_sha256: str
    checkpoint: str
    index_digest: str
    precision: Precision
    layout: FeatureLayout

    def part_name(self, shard: Shard) -> str:
        return part_name(self.source, _stem(shard))

    def part_url(self, shard: Shard) -> str:
        return join(self.out_url, self.part_name(shard))

    @property
    def commits_url(self) -> str:
        return join(self.out_url, COMMITS, self.source)

    def commit_url(self, shard: Shard) -> str:
        return join(self.commits_url, f"{_stem(shard)}.json")

    def origin(self, shard: Shard) -> PartOrigin:
        return PartOrigin(self.encoder_sha256, shard.name, shard.sha256)

    def commit(self, shard: Shard, summary: PartSummary) -> bytes:
        """What says that a shard is done, and for which export."""
        value = self._of(shard) | {"summary": summary.to_json()}
        return json.dumps(value | {"sha256": digest_of_json(value)}, allow_nan=False).encode()

    def summary_in(self, shard: Shard, commit: bytes) -> PartSummary:
        """Raises ValueError, KeyError, TypeError, ... where it is no commit of this export."""
        value = json.loads(commit)
        digest = value.pop("sha256")
        if digest_of_json(value) != digest:
            raise ValueError("it was changed")
        summary = PartSummary.from_json(value.pop("summary"))
        if value != self._of(shard):
            raise ValueError("it is that of another encoder, layout or tar")
        return summary

    def _of(self, shard: Shard) -> dict[str, Any]:
        return asdict(self.origin(shard)) | {"layout_sha256": self.layout.digest}

    def intent(self) -> dict[str, Any]:
        """Plain values that claim a folder for it."""
        names = ("encoder_sha256", "checkpoint", "index_digest", "precision")
        value = {name: getattr(self, name) for name in names} | asdict(self.layout)
        return json.loads(json.dumps(value))


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
    on_start: Callable[[TrainedEncoder], None] = lambda encoder: None,
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
        on_start: called with the encoder once nothing is left to be refused.

    Raises:
        ValueError, OSError: refused before start: no such checkpoint, shards that do not match
            their index, or an `out_url` that holds other features.
        ExportFailedError: naming the shards that failed, and why.
    """
    shards_url, out_url = absolute(shards_url), absolute(out_url)
    load, trained = _choose_encoder(store, run_url, step, checkpoint_url, config, ema=ema)
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
    _refuse_foreign_parts(store, unscaled, index)
    export = _claim(store, unscaled, dtype, trained, index)
    on_start(trained)
    if _uncommitted(store, export, index):
        _work_off(store, load, export, index, num_workers, on_progress)
    manifest = _summarise(store, export, trained, index, error_budget)
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
    work = Work(tuple(_stem(shard) for shard in index.shards), export.commits_url, ".json")
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
        more = f" and {len(causes) - MOST_NAMED} more" if len(causes) > MOST_NAMED else ""
        raise ExportFailedError(
            f"{len(causes)} of {len(index.shards)} shards could not be exported: "
            f"{'; '.join(causes[:MOST_NAMED])}{more}. Mend them and run the same command again; "
            f"finished parts are kept."
        )


def export_shard(
    store: ObjectStore, encoder: EncoderOnDevice, export: Export, shard: Shard
) -> None:
    """Publish and commit the part of one shard; one that is there already is only committed.

    Raises:
        ShardMismatchError: the tar is not the one that was indexed.
        FeatureMismatchError: a part is there already, and it is another export's.
        ValueError: a feature is no finite number.
    """
    where, origin = export.part_url(shard), export.origin(shard)
    if store.exists(where):  # its worker died before the commit, or was slower than its lease
        data = store.read(where)
    else:
        data = encode_shard(store, encoder, shard, export.layout, origin)
        try:
            store.write(where, data, only_if_absent=True)
        except AlreadyExistsError:
            data = store.read(where)
    try:
        table = open_part(data, export.layout, origin, where)
        summary = summary_of(data, table, export.layout, where)
        found = summary.info
        if found.rows + found.skipped != shard.num_samples:
            raise FeatureMismatchError(
                f"{where} has {found.rows} rows and {found.skipped} skipped ones, {shard.name} has "
                f"{shard.num_samples} samples"
            )
    except FeatureMismatchError as error:
        raise FeatureMismatchError(f"{error}; delete it, and this export makes it anew") from error
    store.write(export.commit_url(shard), export.commit(shard, summary))


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
        self._lanes = GPU_LANES if use_gpu else CPU_LANES

    def work(self, name: str, coordinator: NamedCoordinator) -> None:
        index: ShardIndex = coordinator.ask(lambda actor: actor.index.remote())
        shards = {_stem(shard): shard for shard in index.shards}

        def export(stem: str) -> None:
            export_shard(self._store, self._encoder, self._export, shards[stem])

        work_off(name, coordinator, export, lanes=self._lanes)


def _start_worker(store: ObjectStore, load: EncoderLoader, export: Export) -> Any:
    use_gpu = export.precision == "bf16"
    actor: Any = ray.remote(
        num_cpus=1, num_gpus=1 if use_gpu else 0, max_restarts=3, max_task_retries=3
    )(_ExportWorker)
    return actor.remote(store, load, export)


def _claim(
    store: ObjectStore, unscaled: Export, dtype: Dtype, trained: TrainedEncoder, index: ShardIndex
) -> Export:
    """Claim the folder for this export, or go on with the claim that is there.

    The scales of int8 are measured once, before the first part, and are part of the claim.
    """
    if (claimed := _check_claim(store, unscaled, dtype)) is not None:
        return claimed
    layout = unscaled.layout
    scales = None
    if dtype == "int8":
        encoder = EncoderOnDevice(trained, use_gpu=False)
        scales = measured_scales(store, encoder, index, layout.columns)
    export = replace(unscaled, layout=replace(layout, dtype=dtype, scales=scales))
    try:
        data = json.dumps(export.intent(), indent=1).encode()
        store.write(join(export.out_url, INTENT_NAME), data, only_if_absent=True)
    except AlreadyExistsError:
        return _check_claim(store, unscaled, dtype) or export
    return export


def _check_claim(store: ObjectStore, unscaled: Export, dtype: Dtype) -> Export | None:
    """The export that the folder is claimed for; None where it is free.

    Raises:
        ValueError: it is claimed for other features.
    """
    where = join(unscaled.out_url, INTENT_NAME)
    try:
        found = dict(json.loads(store.read(where)).items())
        layout = layout_from_json(found)
    except BucketMissingError:
        raise
    except ObjectMissingError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where} is damaged ({error}), so nobody knows whose features {unscaled.out_url} "
            f"holds; delete that folder, or export into another one"
        ) from error
    intent = unscaled.intent() | {"dtype": dtype}
    which = " and ".join(
        what for key, what in _INTENT_SAYS.items() if found.get(key) != intent[key]
    )
    if which:
        raise ValueError(
            f"{unscaled.out_url} holds features of another {which} "
            f"({found.get('checkpoint', 'unknown')}, {layout.dtype}; this is "
            f"{unscaled.checkpoint}, {dtype}). Export into another folder, delete that one, or "
            f"give the options that it was begun with"
        )
    return replace(unscaled, layout=layout)


def _refuse_foreign_parts(store: ObjectStore, export: Export, index: ShardIndex) -> None:
    """Raises ValueError where the folder has Parquet files that no manifest of ours could name."""
    ours = {export.part_name(shard) for shard in index.shards}
    if foreign := sorted(parts_listed(store, export.out_url).keys() - ours):
        raise ValueError(
            f"{export.out_url} has {len(foreign)} Parquet files that are no part of this export, "
            f"first {foreign[0]}; readers would take them for features: export into another folder"
        )


def _uncommitted(store: ObjectStore, export: Export, index: ShardIndex) -> bool:
    """Whether a shard is left to do. The commit of a part that is gone is taken back."""
    commits = store.list(export.commits_url)  # before the parts: another driver may be at work
    parts = parts_listed(store, export.out_url)
    done = 0
    for commit in commits:
        stem = commit.url.removeprefix(export.commits_url + "/").removesuffix(".json")
        if part_name(export.source, stem) in parts:
            done += 1
        else:
            store.delete(commit.url)
    return done < len(index.shards)


def _summarise(
    store: ObjectStore,
    export: Export,
    trained: TrainedEncoder,
    index: ShardIndex,
    error_budget: float,
) -> FeatureManifest:
    """The manifest of a finished export, from its commits.

    Raises:
        ExportFailedError: a commit is damaged, or too many samples were skipped.
    """
    layout, causes, first = export.layout, Counter[str](), ""
    parts, total, squares = {}, np.zeros(layout.num_dims), np.zeros(layout.num_dims)
    with ThreadPoolExecutor(_COMMIT_THREADS) as pool:
        commits = pool.map(partial(_read_commit, store, export), index.shards)
        for shard, commit in zip(index.shards, commits, strict=True):
            parts[export.part_name(shard)] = commit.info
            causes.update(reason.partition(":")[0] for reason in commit.skipped.values())
            for row, reason in list(commit.skipped.items())[:1]:
                first = first or f"row {row} of {shard.name}: {reason}"
            total += commit.sum
            squares += commit.sum_of_squares
    rows, skipped = index.num_samples - causes.total(), causes.total()
    if skipped > error_budget * index.num_samples or not rows:
        raise ExportFailedError(
            f"{skipped} of {index.num_samples} samples could not be used "
            f"({ranked_causes(causes)}), {int(error_budget * index.num_samples)} are allowed; "
            f"first {first}. {export.commits_url} names them all. Raise --error-budget to leave "
            f"them out; finished parts are kept."
        )
    mean = total / rows
    return FeatureManifest(
        layout=layout,
        encoder_sha256=export.encoder_sha256,
        checkpoint=export.checkpoint,
        precision=export.precision,
        backbone_sha256=trained.backbone_sha256,
        config=trained.config,
        source_url=index.url,
        index_digest=index.digest,
        rows=rows,
        skipped=skipped,
        parts=parts,
        mean=mean.tolist(),
        std=np.sqrt(np.maximum(squares / rows - mean**2, 0)).tolist(),
    )


def _read_commit(store: ObjectStore, export: Export, shard: Shard) -> PartSummary:
    where = export.commit_url(shard)
    try:
        return export.summary_in(shard, store.read(where))
    except (
        *(KeyError, TypeError, ValueError, AttributeError, RecursionError),
        ObjectMissingError,
    ) as error:
        raise ExportFailedError(
            f"{where} is damaged, or another export's ({error}); delete it and its part, and run "
            f"the same command again"
        ) from error


def _stem(shard: Shard) -> str:
    return shard.name.removesuffix(".tar")
