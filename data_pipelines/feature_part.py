"""One part of a feature set: the Parquet file of one shard, written and read column by column.

A part is plain Parquet for pyarrow, DuckDB and polars alike: key, shard, row, z000, z001, ...; one
row per sample. Reading some columns fetches little but their bytes, and every page has a checksum.
Equal input gives equal bytes with one version of pyarrow.

Letters: N samples, D dimensions of z.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.object_store import ObjectStore, StoreError

DTYPE = "float16"
JOIN_COLUMNS = pa.schema(
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
    "write_statistics": JOIN_COLUMNS.names,  # of float16 noise they tell nothing
    "write_page_checksum": True,
}


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
class PartMoments:
    """Sums over the rows of a part; adding up those of all parts gives the set's mean and std."""

    count: int
    sum: NDArray[np.float64]  # (D,)
    sum_of_squares: NDArray[np.float64]  # (D,)


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
    check_columns(columns)
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


def part_moments(
    data: bytes, columns: tuple[FeatureColumn, ...], *, shard: str, where: str
) -> PartMoments:
    """Sums per dimension of a whole part, in float64.

    Args:
        shard: whose part it must be, in order of row.
        where: its URL, for errors.

    Raises:
        FeatureMismatchError: these bytes are not that part, or a page's checksum fails.
    """
    parquet = _open_parquet(io.BytesIO(data), where)
    if not parquet.schema_arrow.equals(_schema(columns)):
        raise FeatureMismatchError(f"{where} has other columns or types than this export writes")
    table = _decode(parquet, None, where)
    shards = set(table["shard"].unique().to_pylist())
    if not shards <= {shard} or (np.diff(table["row"].to_numpy()) <= 0).any():
        raise FeatureMismatchError(f"{where} does not hold rows of {shard} alone, in order")
    blocks = [matrix(table[column.name]).astype(np.float64) for column in columns]
    return PartMoments(
        table.num_rows,
        np.concatenate([block.sum(axis=0) for block in blocks]),
        np.concatenate([np.square(block).sum(axis=0) for block in blocks]),
    )


def read_part(
    store: ObjectStore,
    where: str,
    part: PartInfo,
    all_columns: tuple[FeatureColumn, ...],
    columns: tuple[FeatureColumn, ...],
) -> pa.Table:
    """Join columns and `columns` of one part; fetches only those.

    Args:
        part, all_columns: what the manifest says that the file at `where` is.

    Raises:
        FeatureMismatchError: it has other bytes, rows or columns, or a page's checksum fails.
        StoreError: also ObjectMissingError, for a part that is gone.
    """
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
        if not parquet.schema_arrow.equals(_schema(all_columns)):
            raise FeatureMismatchError(
                f"{where} has other columns or types than its manifest lists, which ends at "
                f"{all_columns[-1].name}; export this shard again"
            )
        names = [*JOIN_COLUMNS.names, *(column.name for column in columns)]
        fetched = _fetch(file, size_bytes, _spans(parquet.metadata, names))
    return _decode(_open_parquet(fetched, where, parquet.metadata), names, where)


def check_columns(columns: tuple[FeatureColumn, ...]) -> None:
    """Raises ValueError unless the columns tile time-steps and dimensions from 0 on, in order."""
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
    return pa.schema([*JOIN_COLUMNS, *values])


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


def matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """The values of one z column, float16 (N, width)."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)
