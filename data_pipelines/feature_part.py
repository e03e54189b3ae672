"""One part of a feature set: the Parquet file of one shard, written and read column by column.

A part is plain Parquet for pyarrow, DuckDB and polars alike: key, shard, row, what was copied from
the samples' json, z000, z001, ...; one row per sample. Reading some columns fetches little but
their bytes, every page has a checksum, and the footer says which encoder made it of which tar.
Equal input gives equal bytes with one version of pyarrow.

Letters: N samples, D dimensions stored.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.feature_layout import JOIN_COLUMNS, FeatureColumn, FeatureLayout
from data_pipelines.object_store import ObjectStore, StoreError

_NOTES = b"diti"
# 10,000 x 512 normal values take 944 bytes a sample, of 1,024 in memory. Byte-stream split would
# make it 889, but DuckDB 2.0 cannot read float16 in it. Version 2 pages would make it 1,018, since
# they leave list levels uncompressed. Parquet keeps int8 in four bytes; packed differences bring
# 512 of them to 512 bytes and zstd alone to 650. A dictionary would only add to either.
_PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "row_group_size": 32_768,  # img2dataset's 10,000 rows make one; larger shards come in pieces
    "data_page_version": "1.0",
    "use_dictionary": ["shard"],
    "write_statistics": JOIN_COLUMNS.names,  # of float16 noise they tell nothing
    "write_page_checksum": True,
}


class FeatureMismatchError(ValueError):
    """A manifest, or a part, is not what the other says."""


@dataclass(frozen=True, slots=True)
class PartOrigin:
    """What a part was made of, in its footer."""

    encoder_sha256: str
    shard: str
    """Name of the tar."""
    shard_sha256: str | None
    """Of its content when it was indexed; None takes a part of any."""


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One part as it was when it was written."""

    rows: int
    skipped: int
    """Samples of its shard that could not be used."""
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        for name in ("rows", "skipped", "size_bytes"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**53:
                raise ValueError(f"{name} of a part must be a whole number, not {value!r}")


@dataclass(frozen=True, slots=True)
class PartSummary:
    """What a whole part says of itself: those of all parts add up to the manifest."""

    info: PartInfo
    skipped: dict[int, str]
    """Row of each sample that could not be used, and why."""
    sum: NDArray[np.float64]  # (D,)
    sum_of_squares: NDArray[np.float64]  # (D,)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "info": asdict(self.info),
            "skipped": {str(row): reason for row, reason in self.skipped.items()},
            "sum": self.sum.tolist(),
            "sum_of_squares": self.sum_of_squares.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PartSummary":
        """Raises ValueError, KeyError, TypeError, AttributeError for anything else."""
        return cls(
            PartInfo(**value["info"]),
            {int(row): str(reason) for row, reason in value["skipped"].items()},
            np.array(value["sum"], np.float64),
            np.array(value["sum_of_squares"], np.float64),
        )


def encode_part(
    layout: FeatureLayout,
    origin: PartOrigin,
    *,
    keys: Sequence[str],
    rows: Sequence[int],
    features: NDArray[np.float32],
    copied: Mapping[str, Sequence[Any]] | None = None,
    skipped: Mapping[int, str] | None = None,
) -> bytes:
    """The Parquet file of one shard's features, float32 (N, D) for the layout's dimensions.

    Args:
        rows: the samples' row numbers in the shard.
        copied: a value, or None, per sample for each of the layout's copied columns.
        skipped: row and reason of each sample that could not be used.

    Raises:
        ValueError: the lengths differ, or a value is NaN, infinite, or too large for the dtype.
    """
    expected = (len(keys), layout.num_dims)
    if features.shape != expected or len(rows) != len(keys):
        raise ValueError(
            f"features of {origin.shard} have shape {features.shape} beside {len(keys)} keys and "
            f"{len(rows)} rows; the columns make it {expected}"
        )
    schema, stored = layout.schema, layout.stored(features)
    _refuse_unusable(layout, features, stored, keys, origin.shard)
    arrays = [
        pa.array(keys, pa.string()),
        pa.array([origin.shard] * len(keys), pa.string()),
        pa.array(rows, pa.int32()),
        *(pa.array((copied or {})[name], schema.field(name).type) for name in layout.copied),
    ]
    for column in layout.columns:
        start, end = (dim - layout.dims[0] for dim in column.dims)
        flat = pa.array(np.ascontiguousarray(stored[:, start:end]).reshape(-1))
        kind = schema.field(column.name).type
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=kind))
    notes = asdict(origin) | {"layout_sha256": layout.digest, "skipped": dict(skipped or {})}
    schema = schema.with_metadata({_NOTES: json.dumps(notes, sort_keys=True).encode()})
    packed = ["row"]
    if layout.dtype == "int8":
        packed += [f"{column.name}.list.element" for column in layout.columns]
    encoding = dict.fromkeys(packed, "DELTA_BINARY_PACKED")
    sink = io.BytesIO()
    table = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(table, sink, column_encoding=encoding, **_PARQUET_OPTIONS)
    return sink.getvalue()


def open_part(data: bytes, layout: FeatureLayout, origin: PartOrigin, where: str) -> pa.Table:
    """All of a part, once it is known to be the one of that layout and origin.

    Args:
        where: its URL, for errors.

    Raises:
        FeatureMismatchError: it is another one, or a page's checksum fails.
    """
    parquet = _open_parquet(io.BytesIO(data), where)
    _refuse_another(parquet, layout, origin, where)
    if not parquet.schema_arrow.equals(layout.schema):
        raise FeatureMismatchError(f"{where} has other columns or types than this set's parts")
    table = _decode(parquet, None, where)
    if others := set(table["shard"].unique().to_pylist()) - {origin.shard}:
        raise FeatureMismatchError(f"{where} has rows of {sorted(others)[0]}, not {origin.shard}")
    return table


def summary_of(data: bytes, table: pa.Table, layout: FeatureLayout, where: str) -> PartSummary:
    """What the manifest says of a part, and sums per dimension of its values as they are read.

    Args:
        table: what `open_part` found in `data`.

    Raises:
        FeatureMismatchError: its rows do not rise, or a value is no finite number.
    """
    rows = table["row"].to_numpy()
    if (np.diff(rows) <= 0).any():
        raise FeatureMismatchError(f"{where} does not hold its shard's rows once each, in order")
    try:
        notes = json.loads(table.schema.metadata[_NOTES])
        skipped = {int(row): str(reason) for row, reason in notes["skipped"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FeatureMismatchError(f"{where} does not say what it skipped: {error}") from error
    if both := skipped.keys() & set(rows.tolist()):
        raise FeatureMismatchError(
            f"{where} says that it skipped rows which it has: {sorted(both)}"
        )
    values = [layout.values(table, column) for column in layout.columns]
    for column, block in zip(layout.columns, values, strict=True):
        if len(wrong := np.argwhere(~np.isfinite(block))):
            row, dim = wrong[0]
            raise FeatureMismatchError(
                f"{where} has {block[row, dim]} in dimension {column.dims[0] + dim} of sample "
                f"{table['key'][int(row)]} ({len(wrong)} such values in {column.name})"
            )
    z = np.concatenate(values, axis=1).astype(np.float64)
    info = PartInfo(len(table), len(skipped), len(data), hashlib.sha256(data).hexdigest())
    return PartSummary(info, skipped, z.sum(axis=0), np.square(z).sum(axis=0))


def mean_and_std(
    summed: NDArray[np.float64], sum_of_squares: NDArray[np.float64], rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each dimension, from the sums of all parts."""
    mean = summed / rows
    return mean, np.sqrt(np.maximum(sum_of_squares / rows - mean**2, 0))


def read_part(
    store: ObjectStore,
    where: str,
    part: PartInfo,
    layout: FeatureLayout,
    origin: PartOrigin,
    columns: tuple[FeatureColumn, ...],
) -> pa.Table:
    """Join columns, copied columns and `columns` of one part; fetches only those.

    Args:
        part, layout, origin: what the manifest says that the file at `where` is.

    Raises:
        FeatureMismatchError: it is another part, or a page's checksum fails.
        StoreError: also ObjectMissingError, for a part that is gone.
    """
    with store.open_for_reading(where) as file:
        size_bytes = file.seek(0, os.SEEK_END)
        if size_bytes != part.size_bytes:
            raise FeatureMismatchError(
                f"{where} has {size_bytes} bytes instead of the manifest's {part.size_bytes}: it "
                f"was cut or replaced; restore it, or delete it and run that export again"
            )
        parquet = _open_parquet(file, where)
        if parquet.metadata.num_rows != part.rows:
            raise FeatureMismatchError(
                f"{where} has {parquet.metadata.num_rows} rows instead of the manifest's "
                f"{part.rows}; delete it and run that export again"
            )
        if not parquet.schema_arrow.equals(layout.schema):
            raise FeatureMismatchError(
                f"{where} has other columns or types than its manifest lists, which ends at "
                f"{layout.columns[-1].name}; delete it and run that export again"
            )
        _refuse_another(parquet, layout, origin, where)
        names = [*JOIN_COLUMNS.names, *layout.copied, *(column.name for column in columns)]
        fetched = _fetch(file, size_bytes, _spans(parquet.metadata, names))
    return _decode(_open_parquet(fetched, where, parquet.metadata), names, where)


def _refuse_unusable(
    layout: FeatureLayout,
    features: NDArray[np.float32],
    stored: NDArray[Any],
    keys: Sequence[str],
    shard: str,
) -> None:
    finite = np.isfinite(features) & np.isfinite(stored)
    if finite.all():
        return
    refused = np.argwhere(~finite)
    row, dim = refused[0]
    limit = " up to 65504" if layout.dtype == "float16" else ""
    raise ValueError(
        f"sample {keys[row]} of {shard} has {features[row, dim]} in dimension "
        f"{layout.dims[0] + dim} of its features ({len(refused)} such values in the shard); "
        f"{layout.dtype} needs finite numbers{limit}, so check the checkpoint"
    )


def _refuse_another(
    parquet: pq.ParquetFile, layout: FeatureLayout, origin: PartOrigin, where: str
) -> None:
    notes = _notes_of(parquet, where)
    for what, found, wanted in (
        ("of the tar", notes.get("shard"), origin.shard),
        ("by the encoder", notes.get("encoder_sha256"), origin.encoder_sha256),
        ("of the tar with SHA-256", notes.get("shard_sha256"), origin.shard_sha256),
        ("with the layout", notes.get("layout_sha256"), layout.digest),
    ):
        if wanted not in (found, None):
            raise FeatureMismatchError(f"{where} was made {what} {found}, not {wanted}")


def _notes_of(parquet: pq.ParquetFile, where: str) -> dict[str, Any]:
    metadata = parquet.schema_arrow.metadata or {}
    try:
        notes = json.loads(metadata[_NOTES])
        return dict(notes.items())
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise FeatureMismatchError(
            f"{where} does not say which encoder made it: it is no part of an export"
        ) from error


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
            f"{where} is damaged: {error}; restore it, or delete it and run that export again"
        ) from error
