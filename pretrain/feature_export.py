"""What an export leaves in its folder, step by step; who computes it, and where, is not told here.

    intent      which encoder, shards, columns and dtype a folder is for; written first
    parts       one for each shard
    commits     beside a part, once it is whole: this shard is done, and what its part holds
    manifest    the sum of the commits, written last

A part appears whole or not at all and is never written twice, so an export that was stopped goes
on where it was, and ends in the same bytes as one that was not.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from configs.loading import sealed, unsealed
from data_pipelines.bad_samples import ranked_causes
from data_pipelines.feature_layout import Dtype, FeatureLayout, layout_from_json
from data_pipelines.feature_part import (
    FeatureMismatchError,
    PartOrigin,
    PartSummary,
    mean_and_std,
    open_part,
    summary_of,
)
from data_pipelines.feature_store import (
    COMMITS,
    FeatureManifest,
    part_name,
    parts_listed,
    parts_of,
    stem_of,
)
from data_pipelines.object_store import (
    AlreadyExistsError,
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    join,
)
from data_pipelines.shard_index import Shard, ShardIndex
from pretrain.shard_features import (
    EncoderOnDevice,
    Precision,
    encode_shard,
    measured_scales,
    refuse_absent_fields,
)
from pretrain.trained import TrainedEncoder

INTENT_NAME = "export.json"
_COMMIT_THREADS = 16
_INTENT_SAYS = {
    "encoder_sha256": "encoder",
    "index_digest": "shard set",
    "columns": "range of time-steps",
    "dtype": "dtype",
    "copied": "choice of copied columns",
    "precision": "precision",
}


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
        return part_name(self.source, stem_of(shard))

    def part_url(self, shard: Shard) -> str:
        return join(self.out_url, self.part_name(shard))

    @property
    def commits_url(self) -> str:
        return join(self.out_url, COMMITS, self.source)

    def commit_url(self, shard: Shard) -> str:
        return join(self.commits_url, f"{stem_of(shard)}.json")

    def origin(self, shard: Shard) -> PartOrigin:
        return PartOrigin(self.encoder_sha256, shard.name, shard.sha256)

    def commit(self, shard: Shard, summary: PartSummary) -> bytes:
        """What says that a shard is done, and for which export."""
        value = sealed(self._of(shard) | {"summary": summary.to_json()})
        return json.dumps(value, allow_nan=False).encode()

    def summary_in(self, shard: Shard, commit: bytes) -> PartSummary:
        """Raises ValueError, KeyError, TypeError, ... where it is no commit of this export."""
        value = unsealed(json.loads(commit))
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


@dataclass(frozen=True, slots=True)
class ExportStart:
    """What an export begins with."""

    encoder: TrainedEncoder
    images: int
    shards: int
    done: int
    """Shards that were exported before."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is there of an export."""

    done: int
    """Shards that are committed, with their parts."""
    lost: list[str]
    """URLs of commits whose parts are gone: they are to be taken back, the parts made anew."""


def claim(
    store: ObjectStore, unscaled: Export, dtype: Dtype, trained: TrainedEncoder, index: ShardIndex
) -> Export:
    """Claim the folder for this export, or go on with the claim that is there.

    The scales of int8 are measured once, before the first part, and are part of the claim.

    Raises:
        ValueError: the folder is claimed for other features, or samples lack what is to be copied.
    """
    if (claimed := _check_claim(store, unscaled, dtype)) is not None:
        return claimed
    layout = unscaled.layout
    if layout.copied:
        refuse_absent_fields(store, index.shards[0], layout.copied)
    scales = None
    if dtype == "int8":
        encoder = EncoderOnDevice(trained, use_gpu=False)
        scales = measured_scales(store, encoder, index, layout.columns)
    export = replace(unscaled, layout=replace(layout, dtype=dtype, scales=scales))
    try:
        data = json.dumps(sealed(export.intent()), indent=1).encode()
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
        found = unsealed(json.loads(store.read(where)))
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
    others = {key: what for key, what in _INTENT_SAYS.items() if found.get(key) != intent[key]}
    if others:
        was, now = (", ".join(_shown(key, said[key]) for key in others) for said in (found, intent))
        raise ValueError(
            f"{unscaled.out_url} holds features of another {' and '.join(others.values())} "
            f"({was}; this is {now}). Export into another folder, delete that one, or give the "
            f"options that it was begun with"
        )
    return replace(unscaled, layout=layout)


def _shown(key: str, value: Any) -> str:
    """One entry of an intent, in a few words."""
    if key == "columns":
        return f"{value[0]['timesteps'][0]}:{value[-1]['timesteps'][1]}"
    if key == "copied":
        return " ".join(f"{name}:{kind}" for name, kind in value.items()) or "none"
    return str(value)[:12]


def look_into(store: ObjectStore, export: Export, index: ShardIndex) -> Found:
    """What the folder of an export has already.

    Raises:
        ValueError: Parquet files that no manifest of this export could name.
    """
    commits = store.list(export.commits_url)  # before the parts: another driver may be at work
    parts = parts_listed(store, export.out_url)
    if foreign := sorted(parts.keys() - parts_of(index, export.source).keys()):
        raise ValueError(
            f"{export.out_url} has {len(foreign)} Parquet files that are no part of this export, "
            f"first {foreign[0]}; readers would take them for features: export into another folder"
        )
    there = {commit.url for commit in commits}
    ours = {export.commit_url(shard): export.part_name(shard) for shard in index.shards}
    lost = [url for url, name in ours.items() if url in there and name not in parts]
    return Found(len(there & ours.keys()) - len(lost), lost)


def summarise(
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
        allowed = f"{int(error_budget * index.num_samples)} are allowed" if rows else "none is left"
        remedy = "Raise --error-budget to leave them out" if rows else "Mend the shard set"
        raise ExportFailedError(
            f"{skipped} of {index.num_samples} samples could not be used "
            f"({ranked_causes(causes)}), {allowed}; first {first}. {export.commits_url} names them "
            f"all. {remedy}; finished parts are kept."
        )
    mean, std = mean_and_std(total, squares, rows)
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
        std=std.tolist(),
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
    data = encode_shard(store, encoder, shard, export.layout, origin)
    try:
        store.write(where, data, only_if_absent=True)
    except AlreadyExistsError:  # its worker died before the commit, or was slower than its lease
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
