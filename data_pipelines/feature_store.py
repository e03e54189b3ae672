"""Exported features: one Parquet file per input shard, one column per time-step subset.

    URL/<source>/<stem>.parquet   a part, see `feature_part`
    URL/manifest.json             which time-steps and dimensions each column holds, where the
                                  features come from, rows, bytes and SHA-256 of each part

The manifest is written last; without it there is no feature set.

Letters: N samples, d dimensions selected.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipelines.feature_part import (
    DTYPE,
    JOIN_COLUMNS,
    FeatureColumn,
    FeatureMismatchError,
    PartInfo,
    check_columns,
    matrix,
    read_part,
    select_columns,
)
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    join,
)

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_PART_THREADS = 8  # a small part costs S3 round trips, not bandwidth


@dataclass(frozen=True, slots=True)
class FeatureManifest:
    """What a feature set is; `parts` maps `part_name`s in the order that readers follow.

    `mean` and `std` have one entry per dimension of z, over all rows as stored.

    Raises:
        ValueError: the columns do not tile time-steps and dimensions from 0 on, or counts differ.
    """

    columns: tuple[FeatureColumn, ...]
    dtype: str
    encoder_sha256: str
    checkpoint: str
    backbone_sha256: str
    config: dict[str, Any]
    source_url: str
    index_digest: str
    rows: int
    parts: dict[str, PartInfo]
    mean: list[float]
    std: list[float]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_columns(self.columns)
        if self.dtype != DTYPE:
            raise ValueError(f"features are stored as {DTYPE}, the manifest says {self.dtype}")
        if not self.parts:
            raise ValueError("a feature set needs at least one part")
        counted = sum(part.rows for part in self.parts.values())
        if counted != self.rows:
            raise ValueError(f"the parts have {counted} rows, but the set has {self.rows}")
        wanted = self.columns[-1].dims[1]
        if len(self.mean) != wanted or len(self.std) != wanted:
            raise ValueError(
                f"mean and std need one entry for each of {wanted} dimensions, "
                f"got {len(self.mean)} and {len(self.std)}"
            )


@dataclass(frozen=True, slots=True)
class Features:
    """Samples in the order of the manifest's parts, and the columns that were asked for.

    `keys`, `shards` and `rows` join back to the shards. `values` is (N, d): dimensions
    [columns[0].dims[0], columns[-1].dims[1]) of z.
    """

    keys: list[str]
    shards: list[str]
    rows: NDArray[np.int32]
    values: NDArray[np.float32]
    columns: tuple[FeatureColumn, ...]


def part_name(source: str, stem: str) -> str:
    """`avatars/00007.parquet`: the part of shard `stem` of `source`, relative to the set's URL.

    Raises:
        ValueError: one of them is not the name of a single folder or file.
    """
    for name in (source, stem):
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"a part needs plain names of source and shard, got {name!r}")
    return f"{source}/{stem}.parquet"


def publish_manifest(store: ObjectStore, url: str, manifest: FeatureManifest) -> None:
    """Write the manifest; the feature set exists from here on.

    Raises:
        FeatureMismatchError: a part is missing at `url` or has another size.
    """
    found = {info.url: info.size_bytes for info in store.list(url)}
    problems = []
    for name, part in manifest.parts.items():
        size_bytes = found.get(join(url, name))
        if size_bytes is None:
            problems.append(f"{name} is missing")
        elif size_bytes != part.size_bytes:
            problems.append(f"{name} has {size_bytes} bytes instead of {part.size_bytes}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise FeatureMismatchError(
            f"features at {url} are not complete: {'; '.join(problems[:10])}{more}. "
            f"Export those shards again, then publish."
        )
    text = json.dumps(asdict(manifest), indent=1, allow_nan=False)
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
    except (TypeError, ValueError) as error:
        raise FeatureMismatchError(f"feature manifest {where} cannot be used: {error}") from error


def read_features(
    store: ObjectStore, url: str, *, timesteps: tuple[int, int] | None = None
) -> Features:
    """All samples, and the subsets whose time-steps intersect [start, end); None is all of them.

    Fetches only those columns, and checks what it fetches: size, row count and columns of each
    part against the manifest, checksums of the pages.

    Raises:
        ValueError: an impossible time-step range.
        FeatureMismatchError: a part is not what the manifest says.
        StoreError: also ObjectMissingError, for an unfinished export or a part that is gone.
    """
    manifest = read_manifest(store, url)
    columns = select_columns(manifest.columns, timesteps)
    first, last = columns[0].dims[0], columns[-1].dims[1]
    values = np.empty((manifest.rows, last - first), np.float32)

    def read(name: str, start: int) -> pa.Table:
        table = read_part(store, join(url, name), manifest.parts[name], manifest.columns, columns)
        for column in columns:
            low, high = (dim - first for dim in column.dims)
            values[start : start + table.num_rows, low:high] = matrix(table[column.name])
        return table.select(JOIN_COLUMNS.names)

    starts = accumulate((part.rows for part in manifest.parts.values()), initial=0)
    with ThreadPoolExecutor(_PART_THREADS) as pool:
        samples = pa.concat_tables(pool.map(read, manifest.parts, starts))
    return Features(
        keys=samples["key"].to_pylist(),
        # Interned: one string per shard, not one per sample.
        shards=[sys.intern(shard) for shard in samples["shard"].to_pylist()],
        rows=samples["row"].to_numpy(),
        values=values,
        columns=columns,
    )


def _manifest_from_json(value: Any) -> FeatureManifest:
    if not isinstance(value, dict) or "format_version" not in value:
        raise ValueError("it is not a JSON object with a format_version")
    if value["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"its format_version is {value['format_version']}, this code reads {FORMAT_VERSION}; "
            f"read it with the release that wrote it"
        )
    columns = tuple(
        FeatureColumn(column["name"], _range(column["timesteps"]), _range(column["dims"]))
        for column in value["columns"]
    )
    parts = {name: PartInfo(**part) for name, part in dict(value["parts"]).items()}
    return FeatureManifest(**{**value, "columns": columns, "parts": parts})


def _range(value: Sequence[int]) -> tuple[int, int]:
    start, end = value
    return int(start), int(end)
