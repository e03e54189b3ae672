"""Raw samples: of a whole shard, or at any positions, with substitutes for those that are bad.

position -> SampleOrder -> (shard, row) -> ranged GETs -> members, each checked -> sample
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.bad_samples import (
    BAD_SAMPLE_ERRORS,
    MAX_CANDIDATES,
    DeadLetter,
    TooManyBadSamplesError,
    candidates,
    cause_of,
)
from data_pipelines.object_store import ObjectStore, ObjectTooShortError
from data_pipelines.range_cache import RangeCache
from data_pipelines.sample_mix import Order
from data_pipelines.shard_index import Shard, ShardIndex, read_members
from data_pipelines.tar_members import MemberTable, ShardMismatchError, Tar, row_span

FETCH_THREADS = 8
MAX_WINDOW_BYTES = 256 * 2**20
"""A window that is longer, because of members in between, is read sample by sample."""
READ_BYTES = 16 * 2**20
"""Of one read of a shard that is read from its beginning to its end."""
MAX_MEMBER_BYTES = 128 * 2**20
"""No image is larger."""
LOOK_AHEAD_BLOCKS = 4
LOCATED_BLOCKS = 16
T = TypeVar("T")
Sample = dict[str, Any]
"""Extensions to bytes, and what is known of the sample under names such as `__key__`."""


def member_sample(
    table: MemberTable, row: int, url: str, window: Tar, base: int, extensions: Sequence[str]
) -> Sample:
    """These members of a sample out of bytes that start at `base` in the tar, each one checked.

    Raises:
        ShardMismatchError: the bytes are not those that were indexed.
    """
    sample: Sample = {"__key__": table.keys[row], "__url__": url, "__row__": row}
    spans = []
    for extension in extensions:
        offset = int(table.offsets[extension][row])
        if offset < 0:
            continue
        end = offset + int(table.sizes[extension][row])
        content = window[offset - base : end - base]
        spans += [offset, end]
        if zlib.crc32(content) != int(table.crc32s[extension][row]):
            raise ShardMismatchError(
                f"{url}: member {table.keys[row]}.{extension} at byte {offset} does not match its "
                f"index (CRC-32); the shard was changed after it was indexed: index it again"
            )
        sample[extension] = content
    sample["__span__"] = (min(spans, default=0), max(spans, default=0))
    return sample


def iter_shard(
    store: ObjectStore, shard: Shard, extensions: Sequence[str] | None = None
) -> Iterator[Sample]:
    """Every raw sample of one shard, in order of row, from large reads, one ahead of the other.

    Args:
        extensions: of the members that are wanted; all of them for None.

    Raises:
        ShardMismatchError: the tar is not the one that was indexed.
    """
    table, url = read_members(store, shard), shard.url
    wanted = table.those_of(extensions)

    def read(rows: tuple[int, int]) -> tuple[bytes, int]:
        start, end = row_span(table, *rows, wanted)
        return store.read(url, start, end) if end - start <= MAX_WINDOW_BYTES else b"", start

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        reads = list(_reads(table, wanted))
        coming = pool.submit(read, reads[0])
        for number, (first, last) in enumerate(reads, start=1):
            window, start = coming.result()
            if number < len(reads):
                coming = pool.submit(read, reads[number])
            for row in range(first, last):
                try:
                    yield member_sample(table, row, url, window, start, wanted)
                except ShardMismatchError:  # a bit that flipped on the way, or a window too long
                    yield read_sample(store, url, table, row, wanted)


def _reads(table: MemberTable, extensions: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Rows [first, last) whose members lie in about READ_BYTES."""
    rows = len(table.keys)
    ends = np.zeros(rows, np.int64)
    for extension in extensions:
        there = table.offsets[extension] >= 0
        np.maximum(ends, (table.offsets[extension] + table.sizes[extension]) * there, out=ends)
    first = done = 0
    for row, end in enumerate(ends.tolist(), start=1):
        if end - done >= READ_BYTES or row == rows:
            yield first, row
            first, done = row, end


def read_sample(
    store: ObjectStore, url: str, table: MemberTable, row: int, extensions: Sequence[str] | None
) -> Sample:
    """One raw sample of the tar at `url`, with those of its members that have these extensions.

    Each member is a request of its own. Bytes that are not those indexed are fetched once more: a
    transient fault makes no sample bad.

    Raises:
        ShardMismatchError, StoreError: it cannot be read, or is not what was indexed.
    """
    wanted = table.those_of(extensions)
    try:
        return _read_members_of(store, url, table, row, wanted)
    except ShardMismatchError:
        return _read_members_of(store, url, table, row, wanted)


def _read_members_of(
    store: ObjectStore, url: str, table: MemberTable, row: int, extensions: Sequence[str]
) -> Sample:
    sample = member_sample(table, row, url, b"", 0, ())
    for extension in extensions:
        start, end = row_span(table, row, row + 1, [extension])
        if end - start > MAX_MEMBER_BYTES:
            raise ShardMismatchError(
                f"{url}: member {table.keys[row]}.{extension} has {end - start} bytes, more than "
                f"the limit of {MAX_MEMBER_BYTES}"
            )
        content = store.read(url, start, end) if end else b""
        sample |= member_sample(table, row, url, content, start, [extension])
    return sample | {"__span__": row_span(table, row, row + 1, extensions)}


Tables = tuple[MemberTable, ...]
"""Of a shard, and of its sibling if it has one."""
Windows = tuple[tuple[bytes, int], ...]
"""Of the same, bytes and where they start in the tar."""


def read_tables(store: ObjectStore, shard: Shard) -> Tables:
    """The member tables of all tars that hold a shard's samples.

    Raises:
        ShardMismatchError: a table is another one than was indexed, or has other keys.
    """
    tables = tuple(read_members(store, tar) for tar in shard.tars)
    if any(table.keys != tables[0].keys for table in tables):
        raise ShardMismatchError(
            f"{shard.tars[-1].url} does not hold the samples of {shard.url}; make it again from it"
        )
    return tables


def read_joined(
    store: ObjectStore, shard: Shard, tables: Tables, row: int, extensions: Sequence[str] | None
) -> Sample:
    """The same as `read_sample`, with the members that its sibling holds."""
    main, *siblings = (
        read_sample(store, tar.url, table, row, extensions)
        for tar, table in zip(shard.tars, tables, strict=True)
    )
    return _joined(main, siblings)


def _joined(main: Sample, siblings: Iterable[Sample]) -> Sample:
    """What is known of a sample is said of its place in the shard itself."""
    return {name: value for part in (*siblings, main) for name, value in part.items()}


class Substitutes:
    """Takes a sample that cannot be used and returns the next candidate that can be read.

    What was wrong goes with it under `__letters__`. Called from several threads.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: ShardIndex,
        order: Order,
        extensions: Sequence[str],
    ) -> None:
        self._store, self._index, self._order = store, index, order
        self._extensions = extensions

    def __call__(self, bad: Sample, error: Exception) -> Sample:
        """Raises TooManyBadSamplesError after MAX_CANDIDATES, and errors that are no sample's."""
        position = bad["__position__"]
        letters = (*bad.get("__letters__", ()), _dead_letter(bad, error))
        for number, row in islice(candidates(self._order, position), len(letters), None):
            shard = self._index.shards[number]
            start: Sample = {
                "__position__": position,
                "__letters__": letters,
                "__shard__": shard.url,
                "__row__": row,
            }
            try:
                tables = read_tables(self._store, shard)
                start |= _where(tables[0], row, self._extensions)
                return start | read_joined(self._store, shard, tables, row, self._extensions)
            except BAD_SAMPLE_ERRORS as another:
                letters = (*letters, _dead_letter(start, another))
        raise TooManyBadSamplesError(
            f"position {position}: its sample and {MAX_CANDIDATES} substitutes cannot be used; the "
            f"last: {letters[-1].reason}",
            letters,
        )


def _where(table: MemberTable, row: int, extensions: Sequence[str] | None) -> Sample:
    """What a dead letter says of a sample: its key, and the bytes that were wanted."""
    span = row_span(table, row, row + 1, table.those_of(extensions))
    return {"__key__": table.keys[row], "__span__": span}


def _dead_letter(sample: Sample, error: Exception) -> DeadLetter:
    start, end = sample.get("__span__", (0, 0))
    return DeadLetter(
        position=sample["__position__"],
        shard=sample["__shard__"],
        row=sample["__row__"],
        key=sample.get("__key__", ""),
        start=start,
        end=end,
        cause=cause_of(error),
        reason=str(error),
    )


class PositionedSamples:
    """Raw samples at the given positions, in order; windows are fetched ahead and in parallel.

    Args:
        blocks: arrays of global positions; a few blocks are looked at ahead.
        extensions: of the members that are wanted; others are not even fetched. None wants all.
        replace: makes another sample of one that cannot be read; without it, errors are raised.
        cache: where ranges are kept for later epochs.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: ShardIndex,
        order: Order,
        blocks: Iterable[NDArray[np.int64]],
        extensions: Sequence[str] | None = None,
        replace: Substitutes | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        self._store = store
        self._index = index
        self._order = order
        self._blocks = blocks
        self._extensions = extensions
        self._replace = replace
        self._cache = cache
        self._tables: OrderedDict[int, tuple[Shard, Future[Tables]]] = OrderedDict()
        self._windows: dict[int, tuple[tuple[int, int], Future[Windows]]] = {}

    def __call__(self) -> Iterator[Sample]:
        with ThreadPoolExecutor(FETCH_THREADS, "fetch") as pool:
            try:
                for wanted in looking_ahead(
                    (self._request(block, pool) for block in self._located()), LOOK_AHEAD_BLOCKS
                ):
                    yield from self._collect(wanted)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._tables.clear()  # what was cancelled must not serve the next iteration
                self._windows.clear()

    def _located(self) -> Iterator[NDArray[np.int64]]:
        """For each block, its positions, lanes, shards and rows; several blocks looked up at once,
        because a look-up costs about as much for ten positions as for a thousand."""
        blocks = iter(self._blocks)
        while group := list(islice(blocks, LOCATED_BLOCKS)):
            positions = np.concatenate(group)
            lanes = self._order.lanes_of(positions)
            located = np.stack([positions, lanes, *self._order.locate(positions)])
            yield from np.split(located, np.cumsum([len(block) for block in group])[:-1], axis=1)

    def _request(self, block: NDArray[np.int64], pool: ThreadPoolExecutor) -> list["_Wanted"]:
        wanted = []
        for position, lane, number, row in block.T.tolist():
            shard, tables = self._table(number, pool)
            window = (number, row // self._order.window_rows)
            # A lane reads one window after the other, so the newest one of each lane is enough.
            if lane not in self._windows or self._windows[lane][0] != window:
                content = pool.submit(self._fetch, shard, window[1], tables)
                self._windows[lane] = (window, content)
            wanted.append(_Wanted(position, shard, row, tables, self._windows[lane][1]))
        while len(self._tables) > len(self._windows):
            self._tables.popitem(last=False)
        return wanted

    def _table(self, number: int, pool: ThreadPoolExecutor) -> tuple[Shard, Future[Tables]]:
        if number not in self._tables:
            shard = self._index.shards[number]
            self._tables[number] = shard, pool.submit(read_tables, self._store, shard)
        self._tables.move_to_end(number)
        return self._tables[number]

    def _fetch(self, shard: Shard, window: int, tables: Future[Tables]) -> Windows:
        first = window * self._order.window_rows
        last = min(first + self._order.window_rows, shard.num_samples)
        return tuple(
            self._fetch_of(tar, members, first, last)
            for tar, members in zip(shard.tars, tables.result(), strict=True)
        )

    def _fetch_of(
        self, shard: Shard, members: MemberTable, first: int, last: int
    ) -> tuple[bytes, int]:
        extensions = members.those_of(self._extensions)
        start, end = row_span(members, first, last, extensions)
        if end - start > MAX_WINDOW_BYTES:
            return b"", 0

        def fetch() -> bytes:
            return self._store.read(shard.url, start, end)

        def is_sound(content: bytes) -> bool:
            try:
                for row in range(first, last):
                    member_sample(members, row, shard.url, content, start, extensions)
            except ShardMismatchError:
                return False
            return True

        if self._cache is None:
            return fetch(), start
        name = f"{shard.sha256}-{start}-{end}"
        return self._cache.read(name, end - start, fetch, is_sound), start

    def _collect(self, wanted: list["_Wanted"]) -> Iterator[Sample]:
        for position, shard, row, tables, content in wanted:
            start: Sample = {"__position__": position, "__shard__": shard.url, "__row__": row}
            try:
                read = self._read_one(shard, row, tables.result(), content)
            except BAD_SAMPLE_ERRORS as error:
                if self._replace is None:
                    raise
                if tables.exception() is None:
                    start |= _where(tables.result()[0], row, self._extensions)
                yield self._replace(start, error)
            else:
                yield start | read

    def _read_one(self, shard: Shard, row: int, tables: Tables, content: Future[Windows]) -> Sample:
        """Out of its window; by itself where that cannot be read, or is not what was indexed:
        other samples' trouble, or a transient fault, is none of this one's."""
        try:
            windows = content.result()
            if all(window for window, _ in windows):
                main, *siblings = (
                    member_sample(
                        members, row, tar.url, window, base, members.those_of(self._extensions)
                    )
                    for tar, members, (window, base) in zip(
                        shard.tars, tables, windows, strict=True
                    )
                )
                return _joined(main, siblings)
        except (ShardMismatchError, ObjectTooShortError):
            pass
        return read_joined(self._store, shard, tables, row, self._extensions)


class _Wanted(NamedTuple):
    """A sample that will be there once its shard's members and its window have been read."""

    position: int
    shard: Shard
    row: int
    tables: Future[Tables]
    content: Future[Windows]


def looking_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, each drawn from the source `depth` items before it is yielded.

    But for the first: who starts waits for it, and would wait for what is fetched after it as well.
    """
    items = iter(items)
    yield from islice(items, 1)
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > depth:
            yield held.pop(0)
    yield from held
