"""What is wrong with an exported feature set, and how two of them differ: part by part.

Letters: N samples, D dimensions stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipelines.feature_layout import FeatureColumn
from data_pipelines.feature_part import (
    FeatureMismatchError,
    PartOrigin,
    PartSummary,
    mean_and_std,
    open_part,
    summary_of,
)
from data_pipelines.feature_store import FeatureManifest, Features, tar_of
from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from data_pipelines.shard_index import Shard, ShardIndex, changed_shards, listing_of, read_members
from data_pipelines.tar_members import ShardMismatchError

MAX_PROBLEMS_A_PART = 3


@dataclass(frozen=True, slots=True)
class PartCheck:
    """Of one part; `summary` and the rest are None where it cannot be read."""

    problems: tuple[str, ...]
    summary: PartSummary | None = None
    least: NDArray[np.float32] | None = None  # (D,)
    most: NDArray[np.float32] | None = None  # (D,)


def check_part(
    store: ObjectStore, url: str, name: str, manifest: FeatureManifest, shard: Shard | None
) -> PartCheck:
    """Read a whole part and compare it with the manifest and with the shard that it was made of.

    Args:
        shard: as it is indexed now; None does without.
    """
    where, said = join(url, name), manifest.parts[name]
    origin = PartOrigin(manifest.encoder_sha256, tar_of(name), shard.sha256 if shard else None)
    try:
        data = store.read(where)
        table = open_part(data, manifest.layout, origin, where)
        summary = summary_of(data, table, manifest.layout, where)
        joined = _join_problems(store, table, summary, shard) if shard else []
    except ObjectMissingError:
        return PartCheck(())  # the listing says so
    except (FeatureMismatchError, ShardMismatchError) as error:
        return PartCheck((str(error),))
    problems = [
        f"{where} has {what} {getattr(summary.info, what)}, the manifest says {getattr(said, what)}"
        for what in ("size_bytes", "sha256", "rows", "skipped")
        if getattr(summary.info, what) != getattr(said, what)
    ]
    problems += [f"{where}: {problem}" for problem in joined]
    if not len(table):
        return PartCheck(tuple(problems), summary)
    values = [manifest.layout.values(table, column) for column in manifest.columns]
    least = np.concatenate([block.min(axis=0) for block in values])
    most = np.concatenate([block.max(axis=0) for block in values])
    return PartCheck(tuple(problems), summary, least, most)


def set_problems(
    store: ObjectStore, manifest: FeatureManifest, index: ShardIndex, shards: Mapping[str, Shard]
) -> list[str]:
    """What is wrong with the shard set that the features were exported from.

    Args:
        shards: those of the index, by the names of their parts.
    """
    problems = []
    if index.digest != manifest.index_digest:
        problems.append(
            f"the shards at {index.url} are others than those exported: their index is "
            f"{index.digest[:12]}, the manifest says {manifest.index_digest[:12]}"
        )
    changed = changed_shards(store, index, listing_of(store, index))
    problems += [f"{shard.url} {problem}" for shard, problem in changed.items()]
    problems += [f"{name} has no part" for name in sorted(shards.keys() - manifest.parts.keys())]
    gone = sorted(manifest.parts.keys() - shards.keys())
    return problems + [f"{name} belongs to no shard of {index.url}" for name in gone]


def total_problems(manifest: FeatureManifest, checks: Mapping[str, PartCheck]) -> list[str]:
    """What only all parts together tell: constant dimensions, mean and standard deviation."""
    found = [check for check in checks.values() if check.summary is not None]
    if len(found) < len(manifest.parts) or not manifest.rows:
        return []
    summaries = [check.summary for check in found if check.summary]
    sums = np.sum([summary.sum for summary in summaries], axis=0)
    squares = np.sum([summary.sum_of_squares for summary in summaries], axis=0)
    mean, std = mean_and_std(sums, squares, manifest.rows)
    problems = [
        f"the manifest's {what} is not that of the parts, first in dimension "
        f"{manifest.layout.dims[0] + int(np.argmax(wrong))}"
        for what, wrong in (
            ("mean", ~np.isclose(mean, manifest.mean, rtol=1e-6, atol=1e-9)),
            ("standard deviation", ~np.isclose(std, manifest.std, rtol=1e-6, atol=1e-6)),
        )
        if wrong.any()
    ]
    if manifest.rows == 1:
        return problems
    least = np.min([check.least for check in found if check.least is not None], axis=0)
    most = np.max([check.most for check in found if check.most is not None], axis=0)
    return problems + [
        f"dimension {manifest.layout.dims[0] + dim} is {least[dim]:g} in every row"
        for dim in np.flatnonzero(least == most).tolist()
    ]


@dataclass(frozen=True, slots=True)
class ColumnDiff:
    """One column of rows that two sets have both; adds up over parts."""

    rows: int = 0
    equal: int = 0
    """Rows with the same values."""
    largest: float = 0.0
    """Absolute difference of two values."""
    cosine: float = 0.0
    """Sum over the rows."""

    def __add__(self, other: "ColumnDiff") -> "ColumnDiff":
        return ColumnDiff(
            self.rows + other.rows,
            self.equal + other.equal,
            max(self.largest, other.largest),
            self.cosine + other.cosine,
        )


@dataclass(frozen=True, slots=True)
class PartDiff:
    """One part that two sets have both."""

    only_first: int
    """Rows."""
    only_second: int
    columns: dict[str, ColumnDiff]
    copied: dict[str, ColumnDiff]


def diff_part(
    one: Features, other: Features, columns: Iterable[FeatureColumn], copied: Iterable[str]
) -> PartDiff:
    """Compare a shard's rows in two sets, in columns and copied columns that both have."""
    _, at, to = np.intersect1d(one.rows, other.rows, assume_unique=True, return_indices=True)
    found = {}
    for column in columns:
        a, b = (
            part.values[rows][:, _within(part.columns, column)]
            for part, rows in ((one, at), (other, to))
        )
        found[column.name] = _compare(a, b)
    found_copied = {
        name: _compare_copied(one.copied[name].take(at), other.copied[name].take(to))
        for name in copied
    }
    return PartDiff(len(one.rows) - len(at), len(other.rows) - len(at), found, found_copied)


def common_columns(first: FeatureManifest, second: FeatureManifest) -> tuple[FeatureColumn, ...]:
    """Columns of the same name, time-steps and dimensions."""
    return tuple(column for column in first.columns if column in second.columns)


def common_copied(first: FeatureManifest, second: FeatureManifest) -> tuple[str, ...]:
    """Copied columns of the same name and kind."""
    kinds = second.layout.copied
    return tuple(name for name, kind in first.layout.copied.items() if kinds.get(name) == kind)


def _within(columns: tuple[FeatureColumn, ...], column: FeatureColumn) -> slice:
    first = columns[0].dims[0]
    return slice(column.dims[0] - first, column.dims[1] - first)


def _compare(a: NDArray[np.float32], b: NDArray[np.float32]) -> ColumnDiff:
    if not len(a):
        return ColumnDiff()
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = (a.astype(np.float64) * b).sum(axis=1)
    equal = (a == b).all(axis=1)
    # Two rows of zeros have no direction, but are the same.
    cosine = np.where(lengths > 0, products / np.maximum(lengths, 1e-30), equal)
    return ColumnDiff(len(a), int(equal.sum()), float(np.abs(a - b).max()), float(cosine.sum()))


def _compare_copied(a: pa.ChunkedArray, b: pa.ChunkedArray) -> ColumnDiff:
    """Counts only; a value that is null, or NaN, in both is the same."""
    nothing = [column.is_null(nan_is_null=True).to_numpy() for column in (a, b)]
    equal = pc.fill_null(pc.call_function("equal", [a, b]), False).to_numpy() | (
        nothing[0] & nothing[1]
    )
    return ColumnDiff(len(a), int(equal.sum()))


def _join_problems(
    store: ObjectStore, table: pa.Table, summary: PartSummary, shard: Shard
) -> list[str]:
    """Rows of a part against the samples of its shard: each once, under its key."""
    keys = read_members(store, shard).keys
    there = dict(zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True))
    problems = [
        f"row {row} has key {key}, {shard.url} says {keys[row] if row < len(keys) else 'no row'}"
        for row, key in there.items()
        if row >= len(keys) or keys[row] != key
    ]
    missing = sorted(set(range(len(keys))) - there.keys() - summary.skipped.keys())
    if missing:
        problems.append(f"{len(missing)} samples of {shard.url} have no row, first {missing[0]}")
    more = len(problems) - MAX_PROBLEMS_A_PART
    return problems[:MAX_PROBLEMS_A_PART] + ([f"and {more} rows more"] if more > 0 else [])
