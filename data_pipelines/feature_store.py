"""Exported features: one Parquet file per input shard, one column per time-step subset.

    URL/<source>/<stem>.parquet          a part, see `feature_part`
    URL/_commits/<source>/<stem>.json    written after it: this shard is done
    URL/manifest.json                    which time-steps and dimensions each column holds, where
                                         the features come from; rows, bytes and SHA-256 of parts

The manifest is written last; without it there is no feature set.

Letters: N samples, d dimensions selected.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.loading import sealed, unsealed
from data_pipelines.feature_layout import (
    LAYOUT_FIELDS,
    FeatureColumn,
    FeatureLayout,
    layout_from_json,
    select_columns,
)
from data_pipelines.feature_part import FeatureMismatchError, PartInfo, PartOrigin, read_part
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    absolute,
    join,
)
from data_pipelines.shard_index import Shard, ShardIndex, first_ten

MANIFEST_NAME = "manifest.json"
COMMITS = "_commits"  # readers of a folder of Parquet files pass over names with an underscore
FORMAT_VERSION = 2
_PART_THREADS = 8  # a small part costs S3 round trips, not bandwidth


@dataclass(frozen=True, slots=True)
class FeatureManifest:
    """What a feature set is; `parts` maps `part_name`s in the order that readers follow.

    Raises:
        ValueError: it contradicts itself.
    """

    layout: FeatureLayout
    encoder_sha256: str
    checkpoint: str
    precision: str
    """What the encoder computed in."""
    backbone_sha256: str | None
    """None of an encoder that was trained without one."""
    config: dict[str, Any]
    source_url: str
    index_digest: str
    rows: int
    skipped: int
    """Samples of the shard set that could not be used, and so have no row."""
    parts: dict[str, PartInfo]
    mean: list[float]
    """Of each dimension stored, over all rows as they are read."""
    std: list[float]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a feature set needs at least one part")
        for name in self.parts:
            source, _, file = name.partition("/")
            if not file.endswith(".parquet") or part_name(source, file[: -len(".parquet")]) != name:
                raise ValueError(f"{name!r} is no name of a part, such as avatars/00007.parquet")
        for what in ("rows", "skipped"):
            counted = sum(getattr(part, what) for part in self.parts.values())
            if counted != getattr(self, what):
                raise ValueError(
                    f"the parts have {counted} {what}, but the set has {getattr(self, what)}"
                )
        wanted = self.layout.num_dims
        if len(self.mean) != wanted or len(self.std) != wanted:
            raise ValueError(
                f"mean and std need one entry for each of {wanted} dimensions, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(type(v) in (int, float) and abs(v) < 1e300 for v in (*self.mean, *self.std)):
            raise ValueError("mean and std must be finite numbers")

    @property
    def columns(self) -> tuple[FeatureColumn, ...]:
        return self.layout.columns

    def to_json(self) -> dict[str, Any]:
        """Plain values; the layout's fields stand beside the others."""
        value = asdict(self)
        return sealed({"format_version": FORMAT_VERSION} | value.pop("layout") | value)


@dataclass(frozen=True, slots=True)
class Features:
    """Samples in the order of the manifest's parts, and the columns that were asked for.

    `keys`, `shards` and `rows` join back to the shards; `copied` came from the samples' json.
    `values` is (N, d): dimensions [columns[0].dims[0], columns[-1].dims[1]) of z.
    """

    keys: list[str]
    shards: list[str]
    rows: NDArray[np.int32]
    values: NDArray[np.float32]
    copied: pa.Table
    columns: tuple[FeatureColumn, ...]


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """A feature set, and the columns to read of it. Made by `open_features`.

    What is fetched is checked: size, row count and columns of each part against the manifest, and
    the checksums of its pages. Reading raises FeatureMismatchError for a part that is not what the
    manifest says, and StoreError (also ObjectMissingError, for a part that is gone).
    """

    store: ObjectStore
    url: str
    manifest: FeatureManifest
    columns: tuple[FeatureColumn, ...]

    def arrays(self) -> Features:
        """All samples at once."""
        parts = self.manifest.parts
        first, last = self.columns[0].dims[0], self.columns[-1].dims[1]
        values = np.empty((self.manifest.rows, last - first), np.float32)

        def read(name: str, start: int) -> pa.Table:
            table = self._read(name)
            self._fill(values[start : start + table.num_rows], table)
            return table.drop_columns([column.name for column in self.columns])

        starts = accumulate((part.rows for part in parts.values()), initial=0)
        with ThreadPoolExecutor(_PART_THREADS) as pool:
            tables = pa.concat_tables(pool.map(read, parts, starts))
        return self._features(tables, values)

    def part(self, name: str) -> Features:
        """The samples of one shard; `name` is one of the manifest's parts."""
        table = self._read(name)
        first, last = self.columns[0].dims[0], self.columns[-1].dims[1]
        values = np.empty((table.num_rows, last - first), np.float32)
        self._fill(values, table)
        return self._features(table, values)

    def __iter__(self) -> Iterator[Features]:
        """Part after part, in the manifest's order, with the memory of one."""
        return map(self.part, self.manifest.parts)

    def _read(self, name: str) -> pa.Table:
        manifest = self.manifest
        where = join(self.url, name)
        origin = PartOrigin(manifest.encoder_sha256, tar_of(name), None)
        part = manifest.parts[name]
        return read_part(self.store, where, part, manifest.layout, origin, self.columns)

    def _fill(self, values: NDArray[np.float32], table: pa.Table) -> None:
        first = self.columns[0].dims[0]
        for column in self.columns:
            start, end = (dim - first for dim in column.dims)
            values[:, start:end] = self.manifest.layout.values(table, column)

    def _features(self, table: pa.Table, values: NDArray[np.float32]) -> Features:
        return Features(
            keys=table["key"].to_pylist(),
            # Interned: one string per shard, not one per sample.
            shards=[sys.intern(shard) for shard in table["shard"].to_pylist()],
            rows=table["row"].to_numpy(),
            values=values,
            copied=table.select(list(self.manifest.layout.copied)),
            columns=self.columns,
        )


def open_features(
    url: str, timesteps: tuple[int, int] | None = None, *, store: ObjectStore | None = None
) -> FeatureSet:
    """The feature set at `url`, for the subsets whose time-steps intersect [start, end).

    Reads the manifest; later, of each part, the bytes of those columns only.

    Raises:
        ValueError: an impossible time-step range.
        FeatureMismatchError: the manifest cannot be used.
        StoreError: also ObjectMissingError, for another folder or an unfinished export.
    """
    store, url = store or ObjectStore(), absolute(url)
    manifest = read_manifest(store, url)
    return FeatureSet(store, url, manifest, select_columns(manifest.columns, timesteps))


def part_name(source: str, stem: str) -> str:
    """`avatars/00007.parquet`: the part of shard `stem` of `source`, relative to the set's URL.

    Raises:
        ValueError: one of them is not the name of a single folder or file.
    """
    for name in (source, stem):
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"a part needs plain names of source and shard, got {name!r}")
    return f"{source}/{stem}.parquet"


def parts_of(index: ShardIndex, source: str) -> dict[str, Shard]:
    """Every shard by the name of its part."""
    return {part_name(source, stem_of(shard)): shard for shard in index.shards}


def stem_of(shard: Shard) -> str:
    """`00007` of `00007.tar`."""
    return shard.name.removesuffix(".tar")


def tar_of(name: str) -> str:
    """`00007.tar`, of which `avatars/00007.parquet` is the part."""
    return name.rpartition("/")[2].removesuffix(".parquet") + ".tar"


def parts_listed(store: ObjectStore, url: str) -> dict[str, int]:
    """Every Parquet file below `url` by its name there, and its bytes."""
    prefix = url.rstrip("/") + "/"
    return {
        info.url.removeprefix(prefix): info.size_bytes
        for info in store.list(url)
        if info.url.endswith(".parquet")
    }


def listing_problems(manifest: FeatureManifest, listed: dict[str, int]) -> list[str]:
    """What is missing, of another size, or there without being in the manifest."""
    problems = []
    for name, part in manifest.parts.items():
        size_bytes = listed.get(name)
        if size_bytes is None:
            problems.append(f"{name} is missing")
        elif size_bytes != part.size_bytes:
            problems.append(f"{name} has {size_bytes} bytes instead of {part.size_bytes}")
    foreign = sorted(listed.keys() - manifest.parts.keys())
    return problems + [f"{name} is no part of this set" for name in foreign]


def publish_manifest(store: ObjectStore, url: str, manifest: FeatureManifest) -> None:
    """Write the manifest; the feature set exists from here on.

    Raises:
        FeatureMismatchError: a part is missing at `url` or has another size, or a file is none.
    """
    if problems := listing_problems(manifest, parts_listed(store, url)):
        raise FeatureMismatchError(
            f"features at {url} are not complete: {first_ten(problems)}. Delete what "
            f"does not belong there, and run the same command again: it makes what is missing."
        )
    text = json.dumps(manifest.to_json(), indent=1, allow_nan=False)
    store.write(join(url, MANIFEST_NAME), text.encode())


def read_manifest(store: ObjectStore, url: str) -> FeatureManifest:
    """The manifest of the feature set at `url`.

    Raises:
        ObjectMissingError: there is none: another folder, or an export that has not finished.
        FeatureMismatchError: it cannot be read, or contradicts itself.
    """
    where = join(url, MANIFEST_NAME)
    try:
        data = store.read(where)
    except BucketMissingError:
        raise
    except ObjectMissingError as error:
        raise ObjectMissingError(
            f"no feature manifest at {where}: this is no feature set, or an export that has not "
            f"finished (its manifest is written last). Check the URL, or run that `diti export` "
            f"again"
        ) from error
    try:
        return _manifest_from_json(json.loads(data))
    except KeyError as error:
        raise FeatureMismatchError(f"feature manifest {where} lacks {error}") from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise FeatureMismatchError(
            f"feature manifest {where} cannot be used: {error}. Run that `diti export` again: it "
            f"writes it anew."
        ) from error


def _manifest_from_json(value: Any) -> FeatureManifest:
    if not isinstance(value, dict) or "format_version" not in value:
        raise ValueError("it is not a JSON object with a format_version")
    if value["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"its format_version is {value['format_version']}, this code reads {FORMAT_VERSION}; "
            f"read it with the release that wrote it"
        )
    fields = unsealed(value)
    layout = layout_from_json(fields)
    for name in ("format_version", *LAYOUT_FIELDS):
        del fields[name]
    parts = {name: PartInfo(**part) for name, part in dict(fields.pop("parts")).items()}
    return FeatureManifest(**fields, layout=layout, parts=parts)
