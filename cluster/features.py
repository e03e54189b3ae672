"""Verifying, comparing and converting exported features on Ray: a worker reads a part once."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from cluster.batch import on_each
from cluster.leases import QueueState
from data_pipelines.feature_check import (
    ColumnDiff,
    PartCheck,
    PartDiff,
    check_part,
    common_columns,
    common_copied,
    diff_part,
    set_problems,
    total_problems,
)
from data_pipelines.feature_store import (
    FeatureManifest,
    FeatureSet,
    listing_problems,
    open_features,
    parts_listed,
    parts_of,
    tar_of,
)
from data_pipelines.object_store import ObjectMissingError, ObjectStore, absolute, join
from data_pipelines.shard_index import INDEX_NAME, Shard, ShardIndex, read_index, write_index

OnProgress = Callable[[QueueState], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """Of a feature set: what was looked at, and what is wrong."""

    manifest: FeatureManifest
    problems: list[str]


def verify_features(
    store: ObjectStore,
    url: str,
    *,
    num_workers: int,
    shards_url: str | None = None,
    with_shards: bool = True,
    on_progress: OnProgress = lambda state: None,
) -> Verified:
    """Read every part and compare it with the manifest, and its rows with the shards.

    Args:
        shards_url: where the shard set lies now; by default where it was exported from.
        with_shards: False does without them.

    Raises:
        StoreError, FeatureMismatchError, ShardMismatchError: no manifest, or no index to join with.
        BatchFailedError: the store or Ray failed.
    """
    url = absolute(url)
    manifest = open_features(url, store=store).manifest
    problems = listing_problems(manifest, parts_listed(store, url))
    shards: dict[str, Shard] = {}
    if with_shards:
        index = _index_of(store, absolute(shards_url or manifest.source_url), url)
        source = next(iter(manifest.parts)).split("/", 1)[0]
        shards = parts_of(index, source)
        problems += set_problems(store, manifest, index, shards)
    listed = [name for name in manifest.parts if not with_shards or name in shards]
    checks: dict[str, PartCheck] = on_each(
        store, url, listed, num_workers, partial(_check, manifest, shards), on_progress
    )
    problems += [problem for name in listed for problem in checks[name].problems]
    return Verified(manifest, problems + total_problems(manifest, checks))


def _index_of(store: ObjectStore, shards_url: str, url: str) -> ShardIndex:
    try:
        return read_index(store, shards_url)
    except ObjectMissingError as error:
        raise ObjectMissingError(
            f"the shards that {url} is joined with are not there: {error}. Say where they are now "
            f"(--shards), or do without them (--without-shards)"
        ) from error


@dataclass(frozen=True, slots=True)
class FeaturesDiff:
    """How two feature sets differ."""

    manifests: list[str]
    """What their manifests say differently."""
    only_first: int
    """Rows."""
    only_second: int
    columns: dict[str, ColumnDiff]
    copied: dict[str, ColumnDiff]
    """Only rows are counted in these."""

    @property
    def is_none(self) -> bool:
        return not (
            self.manifests
            or self.only_first
            or self.only_second
            or any(c.equal != c.rows for c in (*self.columns.values(), *self.copied.values()))
        )


def diff_features(
    store: ObjectStore,
    first_url: str,
    second_url: str,
    *,
    num_workers: int,
    on_progress: OnProgress = lambda state: None,
) -> FeaturesDiff:
    """Compare two sets row by row, joined by shard and row.

    Raises:
        StoreError, FeatureMismatchError: one is no feature set, or damaged.
        BatchFailedError: the store or Ray failed.
    """
    first, second = (open_features(url, store=store) for url in (first_url, second_url))
    one, other = first.manifest, second.manifest
    theirs = {tar_of(name): name for name in other.parts}  # the folders may be called differently
    both = {name: theirs[tar_of(name)] for name in one.parts if tar_of(name) in theirs}
    diffs: dict[str, PartDiff] = {}
    if both:
        task = partial(_diff, first, second, both)
        diffs = on_each(store, first.url, list(both), num_workers, task, on_progress)
    columns = {
        column.name: sum((diffs[name].columns[column.name] for name in both), ColumnDiff())
        for column in common_columns(one, other)
    }
    copied = {
        field: sum((diffs[name].copied[field] for name in both), ColumnDiff())
        for field in common_copied(one, other)
    }
    return FeaturesDiff(
        manifests=_said_differently(one, other),
        only_first=sum(diff.only_first for diff in diffs.values()) + _rows_beside(one, both),
        only_second=sum(diff.only_second for diff in diffs.values())
        + _rows_beside(other, both.values()),
        columns=columns,
        copied=copied,
    )


def features_to_shards(
    store: ObjectStore,
    url: str,
    out_url: str,
    *,
    num_workers: int,
    timesteps: tuple[int, int] | None = None,
    on_progress: OnProgress = lambda state: None,
) -> ShardIndex:
    """Write a feature set as WebDataset tars, indexed, with the names and keys of its shards.

    Raises:
        FileExistsError: there is a shard set already.
        StoreError, FeatureMismatchError, ValueError: no such features, or time-steps.
        BatchFailedError: the store or Ray failed.
    """
    features, out_url = open_features(url, timesteps, store=store), absolute(out_url)
    there = [info.url for info in store.list(out_url)]
    if any(url.endswith(".tar") for url in there) or join(out_url, INDEX_NAME) in there:
        raise FileExistsError(
            f"{out_url} holds a shard set already, or one that was not finished; choose another "
            f"folder, or delete that one"
        )
    names = list(features.manifest.parts)
    task = partial(_convert, features, out_url)
    made = on_each(store, features.url, names, num_workers, task, on_progress)
    return write_index(store, out_url, [made[name] for name in names if made[name] is not None])


def _check(
    manifest: FeatureManifest, shards: dict[str, Shard], store: ObjectStore, url: str, name: str
) -> PartCheck:
    return check_part(store, url, name, manifest, shards.get(name))


def _diff(
    first: FeatureSet,
    second: FeatureSet,
    both: Mapping[str, str],
    store: ObjectStore,
    url: str,
    name: str,
) -> PartDiff:
    manifests = first.manifest, second.manifest
    columns, copied = common_columns(*manifests), common_copied(*manifests)
    return diff_part(first.part(name), second.part(both[name]), columns, copied)


def _convert(
    features: FeatureSet, out_url: str, store: ObjectStore, url: str, name: str
) -> Shard | None:
    # webdataset's writer imports torch, which those who only verify need not wait for.
    from data_pipelines.feature_shards import write_feature_shard

    return write_feature_shard(store, features, name, out_url)


def _rows_beside(manifest: FeatureManifest, both: Collection[str]) -> int:
    return sum(part.rows for name, part in manifest.parts.items() if name not in both)


def _said_differently(one: FeatureManifest, other: FeatureManifest) -> list[str]:
    said = [
        (what, getattr(one, field), getattr(other, field))
        for what, field in (
            ("encoder", "encoder_sha256"),
            ("shard set", "index_digest"),
            ("precision", "precision"),
        )
    ]
    said.append(("dtype", one.layout.dtype, other.layout.dtype))
    said.append(("columns", one.columns, other.columns))
    said.append(("copied columns", one.layout.copied, other.layout.copied))
    return [what for what, a, b in said if a != b]
