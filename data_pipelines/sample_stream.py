"""From a position to decoded micro-batches, for one rank.

    positions -> raw samples -> decoded batches -> prefetch

`PositionedSamples` is an ordinary first stage of a `wds.DataPipeline`; the second one is a plain
generator. The only state is the position of the next sample, so a stream is resumed by making a
new one that starts there.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from webdataset.pipeline import DataPipeline

from configs.schema import DataConfig
from data_pipelines.bad_samples import DeadLetter
from data_pipelines.decoding import DecodeError
from data_pipelines.encoded_set import MEMBER, MISSING, Shapes, unpack
from data_pipelines.object_store import ObjectStore
from data_pipelines.range_cache import RangeCache
from data_pipelines.sample_images import IMAGE_EXTENSIONS, decode_sample_into
from data_pipelines.sample_labels import LABELS_EXTENSION, LabelError, labels_in
from data_pipelines.sample_mix import Order
from data_pipelines.sample_order import batch_positions, mix64
from data_pipelines.sample_reader import PositionedSamples, Sample, Substitutes, looking_ahead
from data_pipelines.shard_index import ShardIndex

PIECE = 8
"""Images that a thread decodes at a time: enough to make handing them over cheap."""
_CROP = 0xC409  # tells its random numbers from those of the order, which have the same seed
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded samples of one rank, in order of position."""

    images: NDArray[np.uint8]
    """(B, H, W, 3), RGB."""
    positions: NDArray[np.int64]
    """(B,), global."""
    keys: tuple[str, ...]
    dead_letters: tuple[DeadLetter, ...] = ()
    """Of the samples that had to be replaced; `keys` has their substitutes."""
    labels: NDArray[np.int8] = field(default_factory=lambda: np.empty((0, 0), np.int8))
    """(B, A), where labels were asked for."""
    encoded: dict[str, NDArray[np.float16]] = field(default_factory=dict)
    """What a frozen model made of them beforehand, by name; each (B, ...)."""
    decode_seconds: float = 0.0
    """What its threads worked for it, all together."""


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
    attributes: Sequence[str] = (),
    encoded: Shapes | None = None,
) -> Iterator[Batch]:
    """Endless decoded micro-batches of a rank, from global batch number `first_batch` on.

    Samples that cannot be used are replaced (see `bad_samples`), and each batch says so.

    Args:
        attributes: to label each sample with, out of its json.
        encoded: what to take of each sample's sibling, by name and shape.
    """
    labels = (LABELS_EXTENSION,) if attributes else ()
    extensions = (*IMAGE_EXTENSIONS, *labels, *((MEMBER, MISSING) if encoded else ()))
    blocks = (
        batch_positions(batch, global_batch=global_batch, rank=rank, world_size=world_size)
        for batch in count(first_batch)
    )
    replace = Substitutes(store, index, order, extensions)
    cache = data.cache and RangeCache(Path(data.cache.folder), int(data.cache.limit_gib * 2**30))
    crop = {"place_of": partial(crop_place, order.seed)} if data.crop == "random" else {}
    pipeline = DataPipeline(
        PositionedSamples(store, index, order, blocks, extensions, replace, cache),
        decoded_batches(
            data.image_size_px,
            micro_batch,
            data.decode_threads,
            replace,
            attributes=attributes,
            encoded=encoded or {},
            **crop,
        ),
    )
    return prefetched(iter(pipeline), data.prefetch_batches)


def crop_place(seed: int, position: int) -> float:
    """Where along the longer side the sample at `position` is cut, uniform in [0, 1)."""
    return float(mix64(seed, position, _CROP) >> np.uint64(11)) / 2**53


def decoded_batches(
    size_px: int,
    batch_size: int,
    threads: int,
    replace: Substitutes | None = None,
    place_of: Callable[[int], float] = lambda position: 0.5,
    attributes: Sequence[str] = (),
    encoded: Shapes = MappingProxyType({}),
) -> Callable[[Iterable[Sample]], Iterator[Batch]]:
    """A pipeline stage from raw samples to batches: threads decode straight into the batch.

    Args:
        replace: makes another sample of one that cannot be decoded; without it, errors are raised.
        place_of: from a position to the place of the square that is cut.
        attributes: that the batches are labelled with.
        encoded: what of the samples' siblings they hold.
    """

    def decode(samples: list[Sample], out: NDArray[np.uint8]) -> tuple[list[Sample], float]:
        """The samples whose images are in `out` afterwards, and the seconds that it took."""
        start = time.perf_counter()
        done = [decode_one(sample, pixels) for sample, pixels in zip(samples, out, strict=True)]
        return done, time.perf_counter() - start

    def decode_one(sample: Sample, out: NDArray[np.uint8]) -> Sample:
        while True:
            try:
                decode_sample_into(out, sample, place_of(sample["__position__"]))
                if attributes:
                    sample["__labels__"] = labels_in(sample, attributes)
                if encoded:
                    sample["__encoded__"] = unpack(sample, encoded)
            except (DecodeError, LabelError) as error:
                if replace is None:
                    raise
                sample = replace(sample, error)
            else:
                return sample

    def start(samples: list[Sample], pool: ThreadPoolExecutor) -> tuple[Any, list[Future[Any]]]:
        out = np.empty((len(samples), size_px, size_px, 3), np.uint8)
        pieces = [slice(at, at + PIECE) for at in range(0, len(samples), PIECE)]
        return out, [pool.submit(decode, samples[piece], out[piece]) for piece in pieces]

    def stage(samples: Iterable[Sample]) -> Iterator[Batch]:
        with _closing_at_the_end(samples), ThreadPoolExecutor(threads, "decode") as pool:
            try:
                started = (start(group, pool) for group in _groups(samples, batch_size))
                for out, pieces in looking_ahead(started, -(-2 * threads * PIECE // batch_size)):
                    yield _batch_of(out, [piece.result() for piece in pieces])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return stage


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    samples = iter(samples)
    while group := list(islice(samples, size)):
        yield group


def _batch_of(images: NDArray[np.uint8], pieces: list[tuple[list[Sample], float]]) -> Batch:
    samples = [sample for decoded, _ in pieces for sample in decoded]
    return Batch(
        images,
        np.array([sample["__position__"] for sample in samples], np.int64),
        tuple(sample["__key__"] for sample in samples),
        tuple(letter for sample in samples for letter in sample.get("__letters__", ())),
        np.array([sample.get("__labels__", ()) for sample in samples], np.int8),
        {
            name: np.stack([sample["__encoded__"][name] for sample in samples])
            for name in samples[0].get("__encoded__", ())
        },
        sum(seconds for _, seconds in pieces),
    )


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
