"""From a position to decoded micro-batches, for one rank.

    position -> SampleOrder -> (shard, row) -> ranged GETs -> samples -> decode -> batch

`PositionedSamples` is an ordinary first stage of a `wds.DataPipeline`; the later stages are plain
generators. The only state is the position of the next sample, so a stream is resumed by making a
new one that starts there.
"""

import queue
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from webdataset.pipeline import DataPipeline

from configs.schema import DataConfig
from data_pipelines.decoding import DecodeError, decode_image
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_order import SampleOrder, batch_positions
from data_pipelines.shard_index import Shard, ShardIndex, read_members
from data_pipelines.tar_members import MemberTable, ShardMismatchError, row_span

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FETCH_THREADS = 8
LOOK_AHEAD_BLOCKS = 4
T = TypeVar("T")
Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded samples of one rank, in order of position."""

    images: NDArray[np.uint8]
    """(B, 3, H, W), RGB."""
    positions: NDArray[np.int64]
    """(B,), global."""
    keys: tuple[str, ...]


def open_stream(
    store: ObjectStore,
    index: ShardIndex,
    order: SampleOrder,
    data: DataConfig,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_batch: int,
) -> Iterator[Batch]:
    """Endless decoded micro-batches of a rank, from global batch number `first_batch` on."""
    blocks = (
        batch_positions(batch, global_batch=global_batch, rank=rank, world_size=world_size)
        for batch in count(first_batch)
    )
    pipeline = DataPipeline(
        PositionedSamples(store, index, order, blocks, IMAGE_EXTENSIONS),
        decoded(data.image_size_px, data.decode_threads),
        batched(micro_batch),
    )
    return prefetched(iter(pipeline), data.prefetch_batches)


def member_sample(
    table: MemberTable, row: int, url: str, window: bytes, base: int, extensions: Sequence[str]
) -> Sample:
    """These members of a sample out of bytes that start at `base` in the tar, each one checked.

    Raises:
        ShardMismatchError: the bytes are not those that were indexed.
    """
    sample: Sample = {"__key__": table.keys[row], "__url__": url, "__row__": row}
    for extension in extensions:
        offset = int(table.offsets[extension][row])
        if offset < 0:
            continue
        start = offset - base
        content = window[start : start + int(table.sizes[extension][row])]
        if zlib.crc32(content) != int(table.crc32s[extension][row]):
            raise ShardMismatchError(
                f"{url}: member {table.keys[row]}.{extension} at byte {offset} does not match its "
                f"index (CRC-32); the shard was changed after it was indexed: index it again"
            )
        sample[extension] = content
    return sample


def read_shard(store: ObjectStore, index: ShardIndex, shard: Shard) -> list[Sample]:
    """Every raw sample of one shard, in order of row, from one read of the whole tar.

    Raises:
        ShardMismatchError: the tar is not the one that was indexed.
    """
    url = join(index.url, shard.name)
    table, tar = read_members(store, index, shard), store.read(url)
    return [
        member_sample(table, row, url, tar, 0, table.extensions) for row in range(shard.num_samples)
    ]


class PositionedSamples:
    """Raw samples at the given positions, in order; windows are fetched ahead and in parallel.

    Args:
        blocks: arrays of global positions; a few blocks are looked at ahead.
        extensions: of the members that are wanted; others are not even fetched. None wants all.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: ShardIndex,
        order: SampleOrder,
        blocks: Iterable[NDArray[np.int64]],
        extensions: Sequence[str] | None = None,
    ) -> None:
        self._store = store
        self._index = index
        self._order = order
        self._blocks = blocks
        self._extensions = extensions
        self._tables: OrderedDict[int, Future[MemberTable]] = OrderedDict()
        self._windows: dict[int, tuple[tuple[int, int], Future[tuple[bytes, int]]]] = {}

    def __call__(self) -> Iterator[Sample]:
        with ThreadPoolExecutor(FETCH_THREADS, "fetch") as pool:
            try:
                for located in looking_ahead(
                    (self._request(block, pool) for block in self._blocks), LOOK_AHEAD_BLOCKS
                ):
                    yield from self._collect(*located)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._tables.clear()  # what was cancelled must not serve the next iteration
                self._windows.clear()

    def _request(
        self, positions: NDArray[np.int64], pool: ThreadPoolExecutor
    ) -> tuple[NDArray[np.int64], list[tuple[int, int, Future[MemberTable], Future[Any]]]]:
        shards, rows = self._order.locate(positions)
        lanes = self._order.lanes_of(positions)
        wanted = []
        for lane, shard, row in zip(lanes.tolist(), shards.tolist(), rows.tolist(), strict=True):
            table = self._table(shard, pool)
            window = (shard, row // self._order.window_rows)
            # A lane reads one window after the other, so the newest one of each lane is enough.
            if lane not in self._windows or self._windows[lane][0] != window:
                self._windows[lane] = (window, pool.submit(self._fetch, *window, table))
            wanted.append((shard, row, table, self._windows[lane][1]))
        while len(self._tables) > len(self._windows):
            self._tables.popitem(last=False)
        return positions, wanted

    def _table(self, shard: int, pool: ThreadPoolExecutor) -> Future[MemberTable]:
        if shard not in self._tables:
            self._tables[shard] = pool.submit(
                read_members, self._store, self._index, self._shard(shard)
            )
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _fetch(self, shard: int, window: int, table: Future[MemberTable]) -> tuple[bytes, int]:
        first = window * self._order.window_rows
        last = min(first + self._order.window_rows, self._shard(shard).num_samples)
        start, end = row_span(table.result(), first, last, self._wanted(table.result()))
        return self._store.read(self._url(shard), start, end), start

    def _collect(
        self,
        positions: NDArray[np.int64],
        wanted: list[tuple[int, int, Future[MemberTable], Future[tuple[bytes, int]]]],
    ) -> Iterator[Sample]:
        for position, (shard, row, table, content) in zip(positions, wanted, strict=True):
            window, base = content.result()
            members = table.result()
            sample = member_sample(
                members, row, self._url(shard), window, base, self._wanted(members)
            )
            yield {**sample, "__position__": int(position)}

    def _wanted(self, table: MemberTable) -> Sequence[str]:
        wanted = self._extensions
        return table.extensions if wanted is None else [e for e in table.extensions if e in wanted]

    def _shard(self, number: int) -> Shard:
        return self._index.shards[number]

    def _url(self, number: int) -> str:
        return join(self._index.url, self._shard(number).name)


def decode_sample(sample: Sample, size_px: int) -> NDArray[np.uint8]:
    """The sample's image, (H, W, 3) uint8.

    Raises:
        DecodeError: naming key and shard.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            try:
                return decode_image(sample[extension], size_px)
            except DecodeError as error:
                raise DecodeError(
                    f"sample {sample['__key__']} of {sample['__url__']}: {error}"
                ) from error
    raise DecodeError(
        f"sample {sample['__key__']} of {sample['__url__']} has no image "
        f"(none of {', '.join(IMAGE_EXTENSIONS)})"
    )


def decoded(size_px: int, threads: int) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """A pipeline stage that adds `image`, decoding in threads, order kept."""

    def stage(samples: Iterable[Sample]) -> Iterator[Sample]:
        with _closing_at_the_end(samples), ThreadPoolExecutor(threads, "decode") as pool:
            try:
                tasks = ((s, pool.submit(decode_sample, s, size_px)) for s in samples)
                for sample, image in looking_ahead(tasks, 4 * threads):
                    yield {**sample, "image": image.result()}
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return stage


def batched(size: int) -> Callable[[Iterable[Sample]], Iterator[Batch]]:
    """A pipeline stage that collects `size` samples into one `Batch`."""

    def stage(samples: Iterable[Sample]) -> Iterator[Batch]:
        samples = iter(samples)
        with _closing_at_the_end(samples):
            while group := list(islice(samples, size)):
                images = np.stack([s["image"] for s in group]).transpose(0, 3, 1, 2)
                yield Batch(
                    np.ascontiguousarray(images),
                    np.array([s["__position__"] for s in group], np.int64),
                    tuple(s["__key__"] for s in group),
                )

    return stage


@contextmanager
def _closing_at_the_end(source: Iterable[Any]) -> Iterator[None]:
    """Close a generator with the stage that reads it.

    Left to the garbage collector, its threads would outlive an error that its frames belong to.
    """
    try:
        yield
    finally:
        if isinstance(source, Generator):
            source.close()


def looking_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, each drawn from the source `depth` items before it is yielded."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > depth:
            yield held.pop(0)
    yield from held


_END = object()


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, drawn by a thread of their own that stays at most `depth` ahead.

    An error in the source is raised here, in its place. Closing this iterator stops the thread.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            with _closing_at_the_end(items):
                for item in items:
                    put(item)
                    if stopped.is_set():
                        return
            put(_END)
        except Exception as error:  # noqa: BLE001 (handed over to the consumer, not swallowed)
            put(error)

    threading.Thread(target=work, name="prefetch", daemon=True).start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
