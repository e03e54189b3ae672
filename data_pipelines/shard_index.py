"""What a shard set is, with proof: the index beside the tars.

    URL/00000.tar                 a plain WebDataset tar
    URL/00000.members.parquet     one row per sample: key; offset, size, CRC-32 of each member
    URL/index.parquet             one row per tar: bytes, ETag, SHA-256, samples

The index is written last; without it there is no shard set. Readers fetch members by range and
check what arrives, so a tar that was cut, replaced or removed is a named error, never lost data.
"""

import hashlib
import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipelines.local_files import WRITTEN, sha256_of
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectInfo,
    ObjectMissingError,
    ObjectStore,
    join,
)
from data_pipelines.tar_members import (
    MemberTable,
    ShardMismatchError,
    Tar,
    members_from_parquet,
    members_to_parquet,
    notes_of_parquet,
    parsing,
    scan_tar,
)

INDEX_NAME = "index.parquet"
_HASH_THREADS = 4
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("sha256", pa.binary(32)),
        ("num_samples", pa.int64()),
        ("members_sha256", pa.binary(32)),
    ]
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar as it was when it was indexed."""

    folder: str
    """URL of its shard set; not part of what is indexed, so that a set can be copied."""
    name: str
    size_bytes: int
    etag: str
    sha256: str
    num_samples: int
    members_sha256: str
    """Of the member table's content."""
    sibling: "Shard | None" = None
    """A tar of another set that holds more members of the same samples, in the same order."""

    @property
    def tars(self) -> "tuple[Shard, ...]":
        """All that hold members of its samples."""
        return (self,) if self.sibling is None else (self, self.sibling)

    @property
    def url(self) -> str:
        return join(self.folder, self.name)

    @property
    def members_url(self) -> str:
        return join(self.folder, members_name(self.name))


def members_name(tar_name: str) -> str:
    """Name of the member table that belongs to a tar."""
    return tar_name.removesuffix(".tar") + ".members.parquet"


class ShardIndex:
    """A shard set, or several one after the other: shards in the order that positions refer to.

    Kept in columns, because a set may have hundreds of thousands of shards.
    """

    def __init__(self, url: str, shards: "Iterable[Shard] | pa.Table") -> None:
        self.table: pa.Table = shards if isinstance(shards, pa.Table) else _table_of(shards)
        self.folders: tuple[tuple[str, int], ...] = ((url, len(self.table)),)
        """URL and number of shards of each set."""
        self._sibling: ShardIndex | None = None

    def beside(self, sibling: "ShardIndex") -> "ShardIndex":
        """The same shards, each with its sibling of another set, which has the same names.

        Raises:
            ShardMismatchError: shards or samples are not the same ones.
        """
        same = all(self.table[name].equals(sibling.table[name]) for name in ("name", "num_samples"))
        if len(self.folders) != 1 or not same:
            raise ShardMismatchError(
                f"{sibling.url} does not have the shards of {self.url}, sample by sample; make it "
                f"again from them"
            )
        found = ShardIndex(self.url, self.table)
        found._sibling = sibling
        return found

    @classmethod
    def joined(cls, sets: "Sequence[ShardIndex]") -> "ShardIndex":
        """The shards of several sets as one."""
        both = cls("", pa.concat_tables([each.table for each in sets]))
        both.folders = tuple(folder for each in sets for folder in each.folders)
        return both

    def moved(self, move: Callable[[str], str]) -> "ShardIndex":
        """The same shards below what `move` makes of each folder's URL."""
        found = ShardIndex("", self.table)
        found.folders = tuple((move(url), shards) for url, shards in self.folders)
        return found

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ShardIndex)
            and self.folders == other.folders
            and self.table.equals(other.table)
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def url(self) -> str:
        """Of its folder; of several, to be read by people."""
        return " and ".join(url for url, _ in self.folders)

    @property
    def shards(self) -> "ShardRows":
        siblings = None if self._sibling is None else self._sibling.shards
        return ShardRows(self.table, self.folders, siblings)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples per shard."""
        return self.table["num_samples"].to_numpy()

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def size_bytes(self) -> int:
        """Of all its tars."""
        return int(self.table["size_bytes"].to_numpy().sum())

    @property
    def digest(self) -> str:
        """SHA-256 of content and order, not of place: a copy elsewhere has the same digest."""
        digest = hashlib.sha256()
        for _, shards in self.folders[:-1]:  # where one set ends and the next begins
            digest.update(f"{shards}\0".encode())
        columns = ("name", "num_samples", "sha256", "members_sha256")
        for name, samples, tar, members in zip(
            *(self.table[column].to_pylist() for column in columns), strict=True
        ):
            digest.update(f"{name}\0{samples}\0".encode() + tar + members)
        return digest.hexdigest()


class ShardRows(Sequence[Shard]):
    """The rows of an index, made into `Shard`s one by one as they are asked for."""

    def __init__(
        self,
        table: pa.Table,
        folders: Sequence[tuple[str, int]],
        siblings: "ShardRows | None" = None,
    ) -> None:
        self._columns = [table[name] for name in _SCHEMA.names]
        self._folders = [url for url, _ in folders]
        self._ends = list(accumulate(shards for _, shards in folders))
        self._siblings = siblings

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        values = (column[number].as_py() for column in self._columns)
        return self._shard(number, values)

    def __iter__(self) -> Iterator[Shard]:
        lists = (column.to_pylist() for column in self._columns)
        for number, values in enumerate(zip(*lists, strict=True)):
            yield self._shard(number, values)

    def _shard(self, number: int, values: Iterable[Any]) -> Shard:
        shard = _shard_of(self._folder_of(number), values)
        return replace(shard, sibling=self._siblings[number]) if self._siblings else shard

    def _folder_of(self, number: int) -> str:
        return self._folders[bisect_right(self._ends, number)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardRows) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _shard_of(folder: str, values: Iterable[Any]) -> Shard:
    """A row of the table, whose digests are bytes."""
    name, size_bytes, etag, sha256, num_samples, members_sha256 = values
    return Shard(folder, name, size_bytes, etag, sha256.hex(), num_samples, members_sha256.hex())


def _table_of(shards: Iterable[Shard]) -> pa.Table:
    rows = list(shards)
    columns = {name: [getattr(shard, name) for shard in rows] for name in _SCHEMA.names}
    for name in ("sha256", "members_sha256"):
        columns[name] = [bytes.fromhex(value) for value in columns[name]]
    return pa.table(columns, schema=_SCHEMA)


def publish_shard(store: ObjectStore, url: str, name: str, tar: bytes) -> Shard:
    """Upload a tar and its member table; returns its line of the index.

    Raises:
        ShardMismatchError: the tar is not whole.
    """
    table = samples_of(tar, join(url, name))
    info = store.write(join(url, name), tar)
    return _publish_members(store, url, name, tar, info.etag, table)[0]


def index_shard(
    store: ObjectStore, url: str, name: str, tar: Tar, etag: str
) -> tuple[Shard, MemberTable]:
    """Write the member table of a tar that is there already.

    Returns its line of the index, and the table.

    Raises:
        ShardMismatchError: the tar is not whole, or holds no sample.
    """
    return _publish_members(store, url, name, tar, etag, samples_of(tar, join(url, name)))


def _publish_members(
    store: ObjectStore, url: str, name: str, tar: Tar, etag: str, table: MemberTable
) -> tuple[Shard, MemberTable]:
    """Write the member table of a tar, with the tar's line of the index in its metadata."""
    shard = Shard(
        folder=url,
        name=name,
        size_bytes=len(tar),
        etag=etag,
        sha256=hashlib.sha256(tar).hexdigest(),
        num_samples=len(table.keys),
        members_sha256=table.digest,
    )
    notes = {field: str(getattr(shard, field)) for field in _SCHEMA.names}
    store.write(shard.members_url, members_to_parquet(table, notes))
    return shard, table


def shard_of_members(url: str, data: bytes) -> tuple[Shard, MemberTable]:
    """What `index_shard` returned when it wrote this file of the set at `url`.

    Raises:
        ShardMismatchError: it is no such file, or its table is damaged.
    """
    notes = notes_of_parquet(data)
    with parsing("a member table"):
        shard = Shard(
            folder=url,
            name=notes["name"],
            size_bytes=int(notes["size_bytes"]),
            etag=notes["etag"],
            sha256=notes["sha256"],
            num_samples=int(notes["num_samples"]),
            members_sha256=notes["members_sha256"],
        )
    table = members_from_parquet(data)
    if table.digest != shard.members_sha256:
        raise ShardMismatchError(f"the member table of {shard.name} is damaged")
    return shard, table


def samples_of(tar: Tar, url: str) -> MemberTable:
    """The member table of a tar that can be in a shard set.

    Raises:
        ShardMismatchError: it is damaged, or holds no sample.
    """
    table = scan_tar(tar, url)
    if not table.keys:
        raise ShardMismatchError(f"{url} holds no sample; leave empty shards out")
    return table


def write_index(store: ObjectStore, url: str, shards: Iterable[Shard]) -> ShardIndex:
    """Publish the index of a shard set; the set exists from here on."""
    index = ShardIndex(url, shards)
    sink = io.BytesIO()
    pq.write_table(index.table, sink, compression="zstd")
    store.write(join(url, INDEX_NAME), sink.getvalue())
    return index


def read_index(store: ObjectStore, url: str) -> ShardIndex:
    """The index of the shard set at `url`.

    Raises:
        ObjectMissingError: there is no index there.
        ShardMismatchError: it cannot be read, or lists no shard.
    """
    where = join(url, INDEX_NAME)
    try:
        data = store.read(where)
    except BucketMissingError:
        raise
    except ObjectMissingError as error:
        raise ObjectMissingError(
            f"no shard index at {where}; check the URL, or index the tars there with "
            f"`diti data index`"
        ) from error
    try:
        with parsing("a shard index"):
            table = pq.ParquetFile(io.BytesIO(data)).read()
            if not table.schema.equals(_SCHEMA):
                raise ValueError(f"its columns are {table.schema.names}")
    except ShardMismatchError as error:
        raise ShardMismatchError(
            f"shard index {where} cannot be read ({error}); restore it, or index the tars again "
            f"with `diti data index`"
        ) from error
    if not len(table):
        raise ShardMismatchError(f"shard index {where} lists no shard; index the tars again")
    return ShardIndex(url, table)


def read_sets(store: ObjectStore, urls: Sequence[str]) -> ShardIndex:
    """The index of one shard set, or of several as one."""
    if len(urls) == 1:
        return read_index(store, urls[0])
    return ShardIndex.joined([read_index(store, url) for url in urls])


def read_members(store: ObjectStore, shard: Shard) -> MemberTable:
    """The member table of one shard, checked against the index.

    Raises:
        ShardMismatchError: it is another table than the one that was indexed.
        ObjectMissingError: it is gone.
    """
    where = shard.members_url
    try:
        data = store.read(where)
    except ObjectMissingError as error:
        raise ObjectMissingError(f"{error}; restore it, or index the shard set again") from error
    try:
        table = members_from_parquet(data)
    except ShardMismatchError as error:
        raise ShardMismatchError(
            f"{where} cannot be read ({error}); index the shard set again"
        ) from error
    if table.digest != shard.members_sha256:
        raise ShardMismatchError(
            f"{where} is not the member table that {INDEX_NAME} was written with; "
            f"index the shard set again"
        )
    return table


def verify_listing(store: ObjectStore, index: ShardIndex) -> None:
    """Compare what the store lists with the index.

    Raises:
        ShardMismatchError: naming every shard that is missing, cut, or was replaced.
    """
    if changed := changed_shards(store, index, listing_of(store, index)):
        raise shards_changed(index, changed)


def listing_of(store: ObjectStore, index: ShardIndex) -> list[ObjectInfo]:
    """What the store has in the folders of the index."""
    return [info for url, _ in index.folders for info in store.list(url)]


def shards_changed(index: ShardIndex, changed: Mapping[Shard, str]) -> ShardMismatchError:
    """The error that names them, for what `changed_shards` found."""
    one_folder = len(index.folders) == 1
    problems = [
        f"{shard.name if one_folder else shard.url} {problem}" for shard, problem in changed.items()
    ]
    lost = sum(shard.num_samples for shard in changed)
    share = math.ceil(1000 * lost / index.num_samples) / 1000  # rounded down, it would not do
    return ShardMismatchError(
        f"shards at {index.url} do not match their index: {first_ten(problems)}. "
        f"Restore them; or index the set again with `diti data index`, for new runs and exports; "
        f"or have a training run replace their samples (data.error_budget of at least {share:g})."
    )


def first_ten(problems: Sequence[str]) -> str:
    """As a message names them: the first ones, and how many more there are."""
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "; ".join(problems[:10]) + more


def changed_shards(
    store: ObjectStore, index: ShardIndex, listing: Iterable[ObjectInfo]
) -> dict[Shard, str]:
    """Shards whose existence, size or version is not what the index says, and what is wrong.

    Of S3 no shard is read: the ETag tells. A local tar that was written at another time than the
    indexed one, perhaps only copied, is read and compared by its SHA-256.
    """
    found = {info.url: info for info in listing}
    problems: dict[Shard, str] = {}
    written_again: list[Shard] = []
    for shard in index.shards:
        info = found.get(shard.url)
        if info is None:
            problems[shard] = "is missing"
        elif info.size_bytes != shard.size_bytes:
            problems[shard] = f"has {info.size_bytes} bytes instead of {shard.size_bytes}"
        elif info.etag != shard.etag and info.etag.startswith(WRITTEN):
            written_again.append(shard)
        elif info.etag != shard.etag and not shard.etag.startswith(WRITTEN):  # else a copy's
            problems[shard] = f"was replaced (ETag {info.etag}, not {shard.etag})"
    return problems | _of_other_content(store, written_again)


def _of_other_content(store: ObjectStore, shards: Sequence[Shard]) -> dict[Shard, str]:
    def digest(shard: Shard) -> str:
        with store.local_copy(shard.url) as tar:
            return sha256_of(tar)

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = pool.map(digest, shards)
        return {
            shard: "was replaced (of the same size, with other content)"
            for shard, now in zip(shards, digests, strict=True)
            if now != shard.sha256
        }
