"""Exported features: one Parquet file per input shard, one column per time-step subset.

    URL/<source>/<stem>.parquet   a part: key, shard, row, z000, z001, ...; one row per sample
    URL/manifest.json             which time-steps and dimensions each column holds, where the
                                  features come from, rows, bytes and SHA-256 of each part

The manifest is written last; without it there is no feature set. A part is plain Parquet for
pyarrow, DuckDB and polars alike, and reading some columns of it fetches little but their bytes.
Equal input gives equal bytes with one version of pyarrow, so two exports can be compared.

Letters: N samples, D dimensions of z, d dimensions selected.
"""

import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.object_store import (
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    StoreError,
    join,
)

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_DTYPE = "float16"
_JOIN_COLUMNS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)
# 10,000 x 512 normal values take 944 bytes a sample, of 1,024 in memory. Byte-stream split would
# make it 889, but DuckDB 2.0 cannot read float16 in it. Version 2 pages would make it 1,018, since
# they leave list levels uncompressed.
_PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "row_group_size": 32_768,  # img2dataset's 10,000 rows make one; larger shards come in pieces
    "data_page_version": "1.0",
    "use_dictionary": ["shard"],
    "column_encoding": {"row": "DELTA_BINARY_PACKED"},
    "write_statistics": _JOIN_COLUMNS.names,  # of float16 noise they tell nothing
    "write_page_checksum": True,
}
_PART_THREADS = 8  # a small part costs S3 round trips, not bandwidth


class FeatureMismatchError(ValueError):
    """A manifest, or a part, is not what the other says."""


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """One subset of z: its time-steps and its dimensions, both half-open."""

    name: str
    timesteps: tuple[int, int]
    dims: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One part as it was when it was written."""

    rows: int
    size_bytes: int
    sha256: str


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
        _check_columns(self.columns)
        if self.dtype != _DTYPE:
            raise ValueError(f"features are stored as {_DTYPE}, the manifest says {self.dtype}")
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
class PartMoments:
    """Sums over the rows of a part; adding up those of all parts gives the set's mean and std."""

    count: int
    sum: NDArray[np.float64]  # (D,)
    sum_of_squares: NDArray[np.float64]  # (D,)


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


def select_columns(
    columns: tuple[FeatureColumn, ...], timesteps: tuple[int, int] | None
) -> tuple[FeatureColumn, ...]:
    """Every column whose time-steps intersect the half-open range; all of them for None.

    Raises:
        ValueError: the range is empty or reaches outside the columns' time-steps.
    """
    if timesteps is None:
        return columns
    start, end = timesteps
    covered = columns[-1].timesteps[1]
    if not 0 <= start < end <= covered:
        raise ValueError(
            f"time-steps [{start}, {end}) cannot be selected: these features cover "
            f"[0, {covered}), so choose 0 <= start < end <= {covered}"
        )
    return tuple(c for c in columns if c.timesteps[0] < end and start < c.timesteps[1])


def encode_part(
    columns: tuple[FeatureColumn, ...],
    *,
    keys: Sequence[str],
    shard: str,
    rows: Sequence[int],
    features: NDArray[np.float32],
) -> bytes:
    """The Parquet file of one shard's features, float32 (N, D), rounded to float16.

    `rows` are the samples' row numbers in `shard`.

    Raises:
        ValueError: the lengths differ, or a value is NaN, infinite, or too large for float16.
    """
    _check_columns(columns)
    expected = (len(keys), columns[-1].dims[1])
    if features.shape != expected or len(rows) != len(keys):
        raise ValueError(
            f"features of {shard} have shape {features.shape} beside {len(keys)} keys and "
            f"{len(rows)} rows; the columns make it {expected}"
        )
    halves = _to_float16(features, keys, shard)
    arrays = [
        pa.array(keys, pa.string()),
        pa.array([shard] * len(keys), pa.string()),
        pa.array(rows, pa.int32()),
    ]
    for column in columns:
        flat = pa.array(np.ascontiguousarray(halves[:, slice(*column.dims)]).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=_value_type(column)))
    sink = io.BytesIO()
    table = pa.Table.from_arrays(arrays, schema=_schema(columns))
    pq.write_table(table, sink, **_PARQUET_OPTIONS)
    return sink.getvalue()


def part_moments(data: bytes) -> PartMoments:
    """Sums per dimension of a whole part, in float64.

    Raises:
        FeatureMismatchError: these bytes are not a part, or a page's checksum fails.
    """
    where = f"a feature part of {len(data)} bytes"
    table = _decode(_open_parquet(io.BytesIO(data), where), None, where)
    names = [name for name in table.column_names if name.startswith("z")]
    blocks = [_matrix(table[name]).astype(np.float64) for name in names]
    return PartMoments(
        table.num_rows,
        np.concatenate([block.sum(axis=0) for block in blocks]),
        np.concatenate([np.square(block).sum(axis=0) for block in blocks]),
    )


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
        ObjectMissingError: there is none: the export has not finished.
        FeatureMismatchError: it cannot be read, or contradicts itself.
    """
    where = join(url, MANIFEST_NAME)
    try:
        data = store.read(where)
    except BucketMissingError:
        raise
    except ObjectMissingError as error:
        raise ObjectMissingError(
            f"no feature manifest at {where}: the export has not finished, since the manifest "
            f"is written last; run the same `diti export` again, or check the URL"
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
        table = _read_part(store, join(url, name), manifest, manifest.parts[name], columns)
        for column in columns:
            low, high = (dim - first for dim in column.dims)
            values[start : start + table.num_rows, low:high] = _matrix(table[column.name])
        return table.select(_JOIN_COLUMNS.names)

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


def _check_columns(columns: tuple[FeatureColumn, ...]) -> None:
    if not columns:
        raise ValueError("features need at least one column")
    timestep = dim = 0
    for number, column in enumerate(columns):
        if column.name != f"z{number:03d}":
            raise ValueError(f"column {number} must be named z{number:03d}, not {column.name}")
        timestep = _end_of_range("time-steps", column.name, column.timesteps, timestep)
        dim = _end_of_range("dimensions", column.name, column.dims, dim)


def _end_of_range(what: str, name: str, half_open: tuple[int, int], expected_start: int) -> int:
    start, end = half_open
    if start != expected_start or end <= start:
        raise ValueError(
            f"{what} of column {name} must be a range from {expected_start} on, where the "
            f"column before it ends; got [{start}, {end})"
        )
    return end


def _to_float16(
    features: NDArray[np.float32], keys: Sequence[str], shard: str
) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # overflow becomes inf, and is refused below
        halves = features.astype(np.float16)
    refused = np.argwhere(~np.isfinite(halves))
    if len(refused):
        row, dim = refused[0]
        raise ValueError(
            f"sample {keys[row]} of {shard} has {features[row, dim]} in dimension {dim} of its "
            f"features ({len(refused)} such values in the shard); float16 needs finite numbers "
            f"up to 65504, so check the checkpoint"
        )
    return halves


def _value_type(column: FeatureColumn) -> pa.DataType:
    element = pa.field("element", pa.float16(), nullable=False)
    return pa.list_(element, column.dims[1] - column.dims[0])


def _schema(columns: tuple[FeatureColumn, ...]) -> pa.Schema:
    values = [pa.field(c.name, _value_type(c), nullable=False) for c in columns]
    return pa.schema([*_JOIN_COLUMNS, *values])


def _read_part(
    store: ObjectStore,
    where: str,
    manifest: FeatureManifest,
    part: PartInfo,
    columns: tuple[FeatureColumn, ...],
) -> pa.Table:
    """Join columns and `columns` of one part, checked against the manifest."""
    with store.open_for_reading(where) as file:
        size_bytes = file.seek(0, os.SEEK_END)
        if size_bytes != part.size_bytes:
            raise FeatureMismatchError(
                f"{where} has {size_bytes} bytes instead of the manifest's {part.size_bytes}: it "
                f"was cut or replaced; restore it, or export this shard again"
            )
        parquet = _open_parquet(file, where)
        if parquet.metadata.num_rows != part.rows:
            raise FeatureMismatchError(
                f"{where} has {parquet.metadata.num_rows} rows instead of the manifest's "
                f"{part.rows}; export this shard again"
            )
        if not parquet.schema_arrow.equals(_schema(manifest.columns)):
            raise FeatureMismatchError(
                f"{where} has other columns or types than its manifest lists, which ends at "
                f"{manifest.columns[-1].name}; export this shard again"
            )
        names = [*_JOIN_COLUMNS.names, *(column.name for column in columns)]
        fetched = _fetch(file, size_bytes, _spans(parquet.metadata, names))
    return _decode(_open_parquet(fetched, where, parquet.metadata), names, where)


def _spans(metadata: pq.FileMetaData, names: list[str]) -> list[tuple[int, int]]:
    """Byte ranges [start, end) of the columns' chunks; chunks that touch are one range."""
    spans: list[tuple[int, int]] = []
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            if chunk.path_in_schema.partition(".")[0] not in names:
                continue
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            end = start + chunk.total_compressed_size
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
    return spans


def _fetch(file: BinaryIO, size_bytes: int, spans: list[tuple[int, int]]) -> BinaryIO:
    """A file of `size_bytes` in memory, read at `spans` and zero (untouched memory) elsewhere."""
    content = np.zeros(size_bytes, np.uint8)
    for start, end in spans:
        file.seek(start)
        data = np.frombuffer(file.read(end - start), np.uint8)
        content[start : start + len(data)] = data  # what is missing fails its page's checksum
    return cast("BinaryIO", pa.BufferReader(pa.py_buffer(content)))


def _open_parquet(
    file: BinaryIO, where: str, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    # Without pre-buffering and threads, all of a file that Python owns is read in this thread.
    # Arrow's own may let go of it only while the interpreter ends, which kills the process.
    try:
        return pq.ParquetFile(
            file, metadata=metadata, pre_buffer=False, page_checksum_verification=True
        )
    except StoreError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise FeatureMismatchError(f"{where} is not a readable Parquet file: {error}") from error


def _decode(parquet: pq.ParquetFile, names: list[str] | None, where: str) -> pa.Table:
    try:
        return parquet.read(names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise FeatureMismatchError(
            f"{where} is damaged: {error}; restore it, or export this shard again"
        ) from error


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """The values of one z column, float16 (N, width)."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


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
