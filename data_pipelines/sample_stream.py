"""From a position to decoded micro-batches, for one rank.

    positions -> raw samples -> decode -> batch -> prefetch

`PositionedSamples` is an ordinary first stage of a `wds.DataPipeline`; the later stages are plain
generators. The only state is the position of the next sample, so a stream is resumed by making a
new one that starts there.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from webdataset.pipeline import DataPipeline

from configs.schema import DataConfig
from data_pipelines.bad_samples import DeadLetter
from data_pipelines.decoding import DecodeError, decode_image
from data_pipelines.object_store import ObjectStore
from data_pipelines.range_cache import RangeCache
from data_pipelines.sample_mix import Order
from data_pipelines.sample_order import batch_positions, mix64
from data_pipelines.sample_reader import PositionedSamples, Sample, Substitutes, looking_ahead
from data_pipelines.shard_index import ShardIndex

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_CROP = 0xC409  # tells its random numbers from those of the order, which have the same seed
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded samples of one rank, in order of position."""

    images: NDArray[np.uint8]
    """(B, 3, H, W), RGB."""
    positions: NDArray[np.int64]
    """(B,), global."""
    keys: tuple[str, ...]
    dead_letters: tuple[DeadLetter, ...] = ()
    """Of the samples that had to be replaced; `keys` has their substitutes."""


def open_stream(
    store: ObjectStore,
    index: ShardIndex,
    order: Order,
    data: DataConfig,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_batch: int,
) -> Iterator[Batch]:
    """Endless decoded micro-batches of a rank, from global batch number `first_batch` on.

    Samples that cannot be used are replaced (see `bad_samples`), and each batch says so.
    """
    blocks = (
        batch_positions(batch, global_batch=global_batch, rank=rank, world_size=world_size)
        for batch in count(first_batch)
    )
    replace = Substitutes(store, index, order, IMAGE_EXTENSIONS)
    cache = data.cache and RangeCache(Path(data.cache.folder), int(data.cache.limit_gib * 2**30))
    crop = {"place_of": partial(crop_place, order.seed)} if data.crop == "random" else {}
    pipeline = DataPipeline(
        PositionedSamples(store, index, order, blocks, IMAGE_EXTENSIONS, replace, cache),
        decoded(data.image_size_px, data.decode_threads, replace, **crop),
        batched(micro_batch),
    )
    return prefetched(iter(pipeline), data.prefetch_batches)


def decode_sample(sample: Sample, size_px: int, place: float = 0.5) -> NDArray[np.uint8]:
    """The sample's image, (H, W, 3) uint8; `place` of the square as in `decode_image`.

    Raises:
        DecodeError: naming key and shard.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            try:
                return decode_image(sample[extension], size_px, place)
            except DecodeError as error:
                raise DecodeError(
                    f"sample {sample['__key__']} of {sample['__url__']}: {error}"
                ) from error
    raise DecodeError(
        f"sample {sample['__key__']} of {sample['__url__']} has no image "
        f"(none of {', '.join(IMAGE_EXTENSIONS)})"
    )


def crop_place(seed: int, position: int) -> float:
    """Where along the longer side the sample at `position` is cut, uniform in [0, 1)."""
    return float(mix64(seed, position, _CROP) >> np.uint64(11)) / 2**53


def decoded(
    size_px: int,
    threads: int,
    replace: Substitutes | None = None,
    place_of: Callable[[int], float] = lambda position: 0.5,
) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """A pipeline stage that adds `image`, decoding in threads, order kept.

    Args:
        replace: makes another sample of one that cannot be decoded; without it, errors are raised.
        place_of: from a position to the place of the square that is cut.
    """

    def decode(sample: Sample) -> Sample:
        while True:
            try:
                place = place_of(sample["__position__"])
                return {**sample, "image": decode_sample(sample, size_px, place)}
            except DecodeError as error:
                if replace is None:
                    raise
                sample = replace(sample, error)

    def stage(samples: Iterable[Sample]) -> Iterator[Sample]:
        with _closing_at_the_end(samples), ThreadPoolExecutor(threads, "decode") as pool:
            try:
                tasks = (pool.submit(decode, sample) for sample in samples)
                for task in looking_ahead(tasks, 4 * threads):
                    yield task.result()
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
                    tuple(letter for s in group for letter in s.get("__letters__", ())),
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
