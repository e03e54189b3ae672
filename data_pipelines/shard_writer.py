"""Samples -> a WebDataset tar, through webdataset's own writer, byte for byte repeatable."""

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from data_pipelines.object_store import ObjectStore
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
    return write_members(store, url, number, described)


def write_members(
    store: ObjectStore,
    url: str,
    number: int,
    samples: Iterable[tuple[str, Mapping[str, bytes | str]]],
) -> Shard:
    """The same from (key, members by extension)."""
    buffer = io.BytesIO()
    write_tar(buffer, samples)
    return publish_shard(store, url, shard_name(number), buffer.getvalue())


def write_tar(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes | str]]]) -> None:
    """A tar of these samples, the same bytes whoever writes it."""
    with TarWriter(file, encoder=False, mtime=0, user="diti", group="diti") as tar:
        for key, members in samples:
            data = {name: m.encode() if isinstance(m, str) else m for name, m in members.items()}
            tar.write({"__key__": key, **data})
