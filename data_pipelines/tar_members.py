"""What is in one tar: where each sample's members lie, and a compact table of that.

A sample is what WebDataset makes of one: the members whose names agree up to the first dot. Unlike
WebDataset's own reader, ours does not need them side by side.
"""

import hashlib
import io
import mmap
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

BLOCK_BYTES = 512
"""Members of a tar begin at multiples of this."""
_END_OF_TAR = b"\0" * (2 * BLOCK_BYTES)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ABSENT = (-BLOCK_BYTES, 0, 0)

_PARSER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError)
"""What Python's tar reader raises about headers that make no sense."""

Tar = bytes | mmap.mmap


class ShardMismatchError(ValueError):
    """A shard or its index is not what the other says."""


@dataclass(frozen=True, slots=True)
class MemberTable:
    """Where each sample's members lie in a tar; arrays have one entry per sample (row).

    A member that a sample lacks has a negative offset.
    """

    keys: tuple[str, ...]
    offsets: dict[str, NDArray[np.int64]]
    sizes: dict[str, NDArray[np.int64]]
    crc32s: dict[str, NDArray[np.uint32]]

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(self.offsets)

    def those_of(self, extensions: Sequence[str] | None) -> tuple[str, ...]:
        """The extensions here that are among these; all of them for None."""
        if extensions is None:
            return self.extensions
        return tuple(extension for extension in self.extensions if extension in extensions)

    @property
    def digest(self) -> str:
        """SHA-256 over the content, whatever file it is kept in."""
        digest = hashlib.sha256("\0".join((*self.keys, "", *self.extensions)).encode())
        for name in self.extensions:
            digest.update(self.offsets[name].astype("<i8").tobytes())
            digest.update(self.sizes[name].astype("<i8").tobytes())
            digest.update(self.crc32s[name].astype("<u4").tobytes())
        return digest.hexdigest()

    @property
    def num_interleaved(self) -> int:
        """Samples with a member of another one among theirs; WebDataset's reader splits them."""
        if not self.keys:
            return 0
        offsets = np.array(list(self.offsets.values()))
        rows = np.broadcast_to(np.arange(len(self.keys)), offsets.shape)[offsets >= 0]
        rows = rows[np.argsort(offsets[offsets >= 0])]
        begins = rows[np.flatnonzero(np.diff(rows, prepend=-1))]
        return int((np.bincount(begins) > 1).sum())

    def num_without(self, extensions: Sequence[str]) -> int:
        """Samples that have none of these members."""
        there = [self.offsets[name] >= 0 for name in self.those_of(extensions)]
        return len(self.keys) - int(np.any(there, axis=0).sum()) if there else len(self.keys)


def scan_tar(data: Tar, url: str) -> MemberTable:
    """Find every sample of a tar, rows in the order in which their keys first appear.

    Raises:
        ShardMismatchError: the tar is cut (also exactly between members) or damaged, or a member
            stands twice.
    """
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            _check_mark(data, url)
            end = 0
            for member in tar:
                _check_place(member, end, url)
                end = member.offset_data
                key, extension = key_and_extension(member.name)
                if not member.isfile() or not key:
                    continue
                _check_name(member.name, url)
                members = samples.setdefault(key, {})
                if extension in members:
                    raise ShardMismatchError(
                        f"{url}: member {member.name} stands twice in sample {key}; "
                        f"write the tar again with one of them"
                    )
                start = member.offset_data
                content = data[start : start + member.size]
                members[extension] = (start, member.size, zlib.crc32(content))
            _check_end(data, tar.offset, url)
    except ShardMismatchError:
        raise
    except _PARSER_ERRORS as error:
        raise ShardMismatchError(
            f"{url} is not a readable tar ({error}); write or upload it again, uncompressed"
        ) from error
    return _member_table(samples)


def _check_mark(data: Tar, url: str) -> None:
    if data[-len(_END_OF_TAR) :] != _END_OF_TAR:
        raise ShardMismatchError(
            f"{url} has no end-of-archive mark after {len(data)} bytes: it is cut short; "
            f"write or upload it again"
        )


def _check_place(member: tarfile.TarInfo, end: int, url: str) -> None:
    """Headers may send a reader backwards, for ever, or stand for bytes that are not there."""
    if member.size < 0 or member.offset < end:
        raise ShardMismatchError(
            f"{url}: the header of member {member.name!r} at byte {member.offset} is damaged (size "
            f"{member.size}); write or upload the tar again"
        )
    if (member.islnk() or member.issym()) and key_and_extension(member.name)[0]:
        raise ShardMismatchError(
            f"{url}: member {member.name!r} is a link to {member.linkname!r} and holds no bytes of "
            f"its own; write the tar again with --dereference --hard-dereference"
        )
    if member.issparse():
        raise ShardMismatchError(
            f"{url}: member {member.name!r} is sparse, so its bytes do not stand in the tar as "
            f"they are; write the tar again without --sparse"
        )


def _check_name(name: str, url: str) -> None:
    """Keys end up in paths, tables and lines of text: they may not lead or break out of those.
    Extensions become names in a sample, where those that begin with two underscores are ours."""
    if name.startswith("/") or ".." in name.split("/") or _CONTROL.search(name):
        raise ShardMismatchError(
            f"{url}: member {name!r} has a name that is absolute, leads upwards or holds control "
            f"characters; write the tar again with plain names"
        )
    if key_and_extension(name)[1].startswith("__"):
        raise ShardMismatchError(
            f"{url}: member {name!r} has an extension that begins with '__', which WebDataset "
            f"keeps for itself; write the tar again with another name"
        )


def key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the base name's first dot, the extension is lower-case.

    The key is "" for names that WebDataset skips: without a dot, or with nothing before it.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem if dot else ""), extension.lower()


def _check_end(data: Tar, end: int, url: str) -> None:
    """Only zeros may follow the last member: tar readers stop in silence at anything else."""
    rest = data[end:]
    if len(rest) < len(_END_OF_TAR):
        raise ShardMismatchError(
            f"{url} has no end-of-archive mark after byte {end}: it is cut short; "
            f"write or upload it again"
        )
    if rest.count(0) != len(rest):
        raise ShardMismatchError(
            f"{url} goes on after byte {end}, where every tar reader stops: a header is damaged "
            f"or a second tar was appended; write or upload it again"
        )


def _member_table(samples: dict[str, dict[str, tuple[int, int, int]]]) -> MemberTable:
    extensions = sorted({extension for members in samples.values() for extension in members})
    columns = {
        extension: [members.get(extension, _ABSENT) for members in samples.values()]
        for extension in extensions
    }
    return MemberTable(
        tuple(samples),
        {name: np.array([m[0] for m in column], np.int64) for name, column in columns.items()},
        {name: np.array([m[1] for m in column], np.int64) for name, column in columns.items()},
        {name: np.array([m[2] for m in column], np.uint32) for name, column in columns.items()},
    )


def members_to_parquet(table: MemberTable, notes: dict[str, str]) -> bytes:
    """The table in few bytes: offsets in blocks and sizes by their differences, keys by what they
    share with the one before. CRC-32s do not compress.

    Args:
        notes: kept in the file's metadata; see `notes_of_parquet`.
    """
    columns: dict[str, pa.Array] = {"key": pa.array(table.keys, pa.string())}
    encodings = {"key": "DELTA_BYTE_ARRAY"}
    for name in table.extensions:
        columns[f"{name}.block"] = pa.array(table.offsets[name] // BLOCK_BYTES)
        columns[f"{name}.size"] = pa.array(table.sizes[name])
        columns[f"{name}.crc32"] = pa.array(table.crc32s[name])
        encodings |= {
            f"{name}.block": "DELTA_BINARY_PACKED",
            f"{name}.size": "DELTA_BINARY_PACKED",
            f"{name}.crc32": "PLAIN",
        }
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns).replace_schema_metadata(notes),
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding=encodings,
    )
    return sink.getvalue()


def members_from_parquet(data: bytes) -> MemberTable:
    """What `members_to_parquet` was given.

    Raises:
        ShardMismatchError: it is no such file.
    """
    with parsing("a member table"):
        table = pq.ParquetFile(io.BytesIO(data)).read()
        names = [name[: -len(".block")] for name in table.column_names if name.endswith(".block")]
        return MemberTable(
            tuple(table["key"].to_pylist()),
            {name: table[f"{name}.block"].to_numpy() * BLOCK_BYTES for name in names},
            {name: table[f"{name}.size"].to_numpy() for name in names},
            {name: table[f"{name}.crc32"].to_numpy() for name in names},
        )


def notes_of_parquet(data: bytes) -> dict[str, str]:
    """The notes that a table was written with.

    Raises:
        ShardMismatchError: it is no such file.
    """
    with parsing("a member table"):
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turn what pyarrow raises about damaged bytes into a ShardMismatchError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        said = " ".join(str(error).split())[:200]
        raise ShardMismatchError(f"these bytes are not {what}: {said}") from error


def row_span(
    table: MemberTable, first: int, last: int, extensions: Sequence[str]
) -> tuple[int, int]:
    """Byte range [start, end) that holds these members of rows first..last-1; (0, 0) for none."""
    starts = np.array([table.offsets[e][first:last] for e in extensions])
    ends = starts + np.array([table.sizes[e][first:last] for e in extensions])
    there = starts >= 0
    return (int(starts[there].min()), int(ends[there].max())) if there.any() else (0, 0)
