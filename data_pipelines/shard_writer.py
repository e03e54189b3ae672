"""Samples -> a WebDataset tar, through webdataset's own writer, byte for byte repeatable."""

import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import Shard, publish_shard

ROWS_PER_SHARD_LIMIT = 10_000


def shard_name(number: int) -> str:
    """`00007.tar`: img2dataset's naming."""
    return f"{number:05d}.tar"


def sample_key(shard: int, row: int) -> str:
    """`000070123`: shard and row, img2dataset's naming.

    Raises:
        ValueError: more rows than four digits can name.
    """
    if not 0 <= row < ROWS_PER_SHARD_LIMIT:
        raise ValueError(f"a shard holds at most {ROWS_PER_SHARD_LIMIT} rows, got row {row}")
    return f"{shard:05d}{row:04d}"


def write_shard(
    store: ObjectStore, url: str, number: int, samples: Iterable[tuple[bytes, dict[str, Any]]]
) -> Shard:
    """Publish shard `number` from (JPEG bytes, metadata) pairs; returns its line of the index."""
    keyed = (
        (sample_key(number, row), "jpg", jpeg, metadata)
        for row, (jpeg, metadata) in enumerate(samples)
    )
    return write_keyed_shard(store, url, number, keyed)


def write_keyed_shard(
    store: ObjectStore,
    url: str,
    number: int,
    samples: Iterable[tuple[str, str, bytes, dict[str, Any]]],
) -> Shard:
    """The same from (key, extension of the image, its bytes, metadata)."""
    described = (
        (key, {extension: image, "json": json.dumps({"key": key, **metadata}, sort_keys=True)})
        for key, extension, image, metadata in samples
    )
    return write_members(store, url, shard_name(number), described)


def write_members(
    store: ObjectStore,
    url: str,
    name: str,
    samples: Iterable[tuple[str, Mapping[str, bytes | str]]],
) -> Shard:
    """Publish the shard of a name from (key, members by extension)."""
    buffer = io.BytesIO()
    _write_tar(buffer, samples)
    return publish_shard(store, url, name, buffer.getvalue())


def write_tar(
    store: ObjectStore, url: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]
) -> None:
    """A tar outside of a shard set, however large: it goes through a temporary file."""
    with tempfile.TemporaryDirectory(prefix="diti-") as folder:
        path = Path(folder, "tar")
        with path.open("wb") as file:
            _write_tar(file, samples)
        store.upload(path, url)


def _write_tar(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes | str]]]) -> None:
    """The same bytes whoever writes it."""
    with TarWriter(file, encoder=False, mtime=0, user="diti", group="diti") as tar:
        for key, members in samples:
            data = {name: m.encode() if isinstance(m, str) else m for name, m in members.items()}
            tar.write({"__key__": key, **data})


def write_raw_shard(
    store: ObjectStore,
    url: str,
    number: int,
    samples: Iterable[tuple[str, Mapping[str, bytes], Mapping[str, Any]]],
    schema: pa.Schema,
) -> None:
    """Write a shard as img2dataset leaves it: tar, Parquet file and, last, `00007_stats.json`.

    The statistics say that every download succeeded at time 0, so the same samples make the same
    bytes.

    Args:
        samples: key, extension -> bytes in the tar, and its line of the Parquet file.
        schema: of those lines.
    """
    name = shard_name(number).removesuffix(".tar")
    lines: list[Mapping[str, Any]] = []

    def noted() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for key, members, line in samples:
            lines.append(line)
            yield key, members

    write_tar(store, join(url, f"{name}.tar"), noted())
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema), table)
    store.write(join(url, f"{name}.parquet"), table.getvalue())
    store.write(join(url, f"{name}_stats.json"), json.dumps(_stats(len(lines)), indent=4).encode())


def _stats(downloads: int) -> dict[str, Any]:
    """By img2dataset's names."""
    return {
        "count": downloads,
        "successes": downloads,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": downloads},
    }
