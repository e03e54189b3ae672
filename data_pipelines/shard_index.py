"""What a shard set is, with proof: the index beside the tars.

    URL/00000.tar                 a plain WebDataset tar
    URL/00000.members.parquet     one row per sample: key; offset, size, CRC-32 of each member
    URL/index.parquet             one row per tar: bytes, ETag, SHA-256, samples

The index is written last; without it there is no shard set. Readers fetch members by range and
check what arrives, so a tar that was cut, replaced or removed is a named error, never lost data.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.object_store import ObjectMissingError, ObjectStore, join

INDEX_NAME = "index.parquet"
_END_OF_TAR = b"\0" * 1024


class ShardMismatchError(ValueError):
    """A shard or its index is not what the other says."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar as it was when it was indexed."""

    name: str
    size_bytes: int
    etag: str
    sha256: str
    num_samples: int
    members_sha256: str

    @property
    def members_name(self) -> str:
        return self.name.removesuffix(".tar") + ".members.parquet"


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A shard set: folder URL and shards in the order that positions refer to."""

    url: str
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of content and order, not of place: a copy elsewhere has the same digest."""
        content = [[s.name, s.num_samples, s.sha256, s.members_sha256] for s in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class MemberTable:
    """Where each sample's members lie in a tar; arrays have one entry per sample (row).

    A member that a sample lacks has offset -1.
    """

    keys: tuple[str, ...]
    offsets: dict[str, NDArray[np.int64]]
    sizes: dict[str, NDArray[np.int64]]
    crc32s: dict[str, NDArray[np.uint32]]

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(self.offsets)


def scan_tar(data: bytes, url: str) -> MemberTable:
    """Find every sample of a tar by WebDataset's rule (see `_key_and_extension`).

    Raises:
        ShardMismatchError: the tar is cut (also exactly between members) or damaged, a sample's
            members are not consecutive, or a name stands twice.
    """
    if not data.endswith(_END_OF_TAR):
        raise ShardMismatchError(
            f"{url} has no end-of-archive mark after {len(data)} bytes: it is cut short; "
            f"write or upload it again"
        )
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    last_key = None
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, extension = _key_and_extension(member.name)
                if not member.isfile() or not key:
                    continue
                if key in samples and (key != last_key or extension in samples[key]):
                    raise ShardMismatchError(
                        f"{url}: member {member.name} repeats or interrupts sample {key}; "
                        f"write the tar again with each sample's members side by side"
                    )
                content = data[member.offset_data : member.offset_data + member.size]
                samples.setdefault(key, {})[extension] = (
                    member.offset_data,
                    member.size,
                    zlib.crc32(content),
                )
                last_key = key
            _check_end(data, tar.offset, url)
    except tarfile.TarError as error:
        raise ShardMismatchError(f"{url} is not a readable tar: {error}") from error
    return _member_table(samples)


def _key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the base name's first dot, the extension is lower-case.

    The key is "" for names that WebDataset skips: without a dot, or with nothing before it.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem if dot else ""), extension.lower()


def _check_end(data: bytes, end: int, url: str) -> None:
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
    absent = (-1, 0, 0)
    columns = {
        extension: [members.get(extension, absent) for members in samples.values()]
        for extension in extensions
    }
    return MemberTable(
        tuple(samples),
        {name: np.array([m[0] for m in column], np.int64) for name, column in columns.items()},
        {name: np.array([m[1] for m in column], np.int64) for name, column in columns.items()},
        {name: np.array([m[2] for m in column], np.uint32) for name, column in columns.items()},
    )


def publish_shard(store: ObjectStore, url: str, name: str, tar: bytes) -> Shard:
    """Upload a tar and its member table; returns its line of the index.

    Raises:
        ShardMismatchError: the tar is not whole.
    """
    table = scan_tar(tar, join(url, name))
    if not table.keys:
        raise ShardMismatchError(f"{join(url, name)} holds no sample; leave empty shards out")
    members = _members_to_parquet(table)
    info = store.write(join(url, name), tar)
    shard = Shard(
        name=name,
        size_bytes=len(tar),
        etag=info.etag,
        sha256=hashlib.sha256(tar).hexdigest(),
        num_samples=len(table.keys),
        members_sha256=hashlib.sha256(members).hexdigest(),
    )
    store.write(join(url, shard.members_name), members)
    return shard


def write_index(store: ObjectStore, url: str, shards: Sequence[Shard]) -> ShardIndex:
    """Publish the index of a shard set; the set exists from here on."""
    columns = {
        field: [getattr(shard, field) for shard in shards] for field in Shard.__dataclass_fields__
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    store.write(join(url, INDEX_NAME), sink.getvalue())
    return ShardIndex(url, tuple(shards))


def read_index(store: ObjectStore, url: str) -> ShardIndex:
    """The index of the shard set at `url`.

    Raises:
        ObjectMissingError: there is no index there.
        ShardMismatchError: it cannot be read, or lists no shard.
    """
    where = join(url, INDEX_NAME)
    try:
        data = store.read(where)
    except ObjectMissingError as error:
        raise ObjectMissingError(
            f"no shard index at {where}; check data.shards, or make the set with `diti data make`"
        ) from error
    try:
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        shards = tuple(Shard(**row) for row in rows)
    except (pa.ArrowException, TypeError) as error:
        raise ShardMismatchError(
            f"shard index {where} cannot be read ({error}); restore it, or make the set again"
        ) from error
    if not shards:
        raise ShardMismatchError(f"shard index {where} lists no shard; make the set again")
    return ShardIndex(url, shards)


def read_members(store: ObjectStore, index: ShardIndex, shard: Shard) -> MemberTable:
    """The member table of one shard, checked against the index.

    Raises:
        ShardMismatchError: it is another table than the one that was indexed.
    """
    where = join(index.url, shard.members_name)
    data = store.read(where)
    if hashlib.sha256(data).hexdigest() != shard.members_sha256:
        raise ShardMismatchError(
            f"{where} is not the member table that {INDEX_NAME} was written with; "
            f"index the shard set again"
        )
    table = pq.read_table(io.BytesIO(data))
    names = [name.removesuffix(".offset") for name in table.column_names if name.endswith("offset")]
    return MemberTable(
        tuple(table["key"].to_pylist()),
        {name: table[f"{name}.offset"].to_numpy() for name in names},
        {name: table[f"{name}.size"].to_numpy() for name in names},
        {name: table[f"{name}.crc32"].to_numpy() for name in names},
    )


def verify_listing(store: ObjectStore, index: ShardIndex) -> None:
    """Compare what the store lists with the index: existence, size, ETag. Reads no shard.

    Raises:
        ShardMismatchError: naming every shard that is missing, cut, or was replaced.
    """
    found = {info.url: info for info in store.list(index.url)}
    problems = []
    for shard in index.shards:
        info = found.get(join(index.url, shard.name))
        if info is None:
            problems.append(f"{shard.name} is missing")
        elif info.size_bytes != shard.size_bytes:
            problems.append(
                f"{shard.name} has {info.size_bytes} bytes instead of {shard.size_bytes}"
            )
        elif shard.etag and info.etag and info.etag != shard.etag:
            problems.append(f"{shard.name} was replaced (ETag {info.etag}, not {shard.etag})")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ShardMismatchError(
            f"shards at {index.url} do not match their index: {'; '.join(problems[:10])}{more}. "
            f"Restore them, or make the set again."
        )


def _members_to_parquet(table: MemberTable) -> bytes:
    columns: dict[str, object] = {"key": list(table.keys)}
    for name in table.extensions:
        columns[f"{name}.offset"] = table.offsets[name]
        columns[f"{name}.size"] = table.sizes[name]
        columns[f"{name}.crc32"] = table.crc32s[name]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()
