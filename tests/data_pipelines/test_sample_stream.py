"""The stream: what the order says is what every rank gets, from any position."""

import io
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.schema import DataConfig
from data_pipelines import sample_reader
from data_pipelines.bad_samples import TooManyBadSamplesError
from data_pipelines.decoding import DecodeError
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, StoreError, join
from data_pipelines.range_cache import RangeCache
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_order import SampleOrder
from data_pipelines.sample_reader import PositionedSamples, looking_ahead
from data_pipelines.sample_stream import (
    Batch,
    decoded_batches,
    open_stream,
    prefetched,
)
from data_pipelines.shard_index import ShardIndex, publish_shard, write_index
from data_pipelines.shard_writer import sample_key, write_shard
from tests.tars import headers

STORE = ObjectStore()
SIZES = (7, 12, 5, 9, 3)  # 36 samples
SIDE = 16
BATCH = 12


def colour(shard: int, row: int) -> tuple[int, int, int]:
    return 40 + 40 * shard, 30 + 15 * row, 128


def picture(shard: int, row: int) -> bytes:
    pixels = np.full((SIDE, SIDE, 3), colour(shard, row), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=95, colorspace="RGB")


def write_set(store: ObjectStore, url: str) -> ShardIndex:
    shards = [
        write_shard(store, url, number, [(picture(number, row), {}) for row in range(size)])
        for number, size in enumerate(SIZES)
    ]
    return write_index(store, url, shards)


def order_of(index: ShardIndex) -> SampleOrder:
    return SampleOrder(index.sizes, seed=5, lanes=4, window_rows=3)


def stream(
    index: ShardIndex,
    *,
    store: ObjectStore = STORE,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = BATCH,
    first_batch: int = 0,
    side: int = SIDE,
    attributes: tuple[str, ...] = (),
) -> Iterator[Batch]:
    return open_stream(
        store,
        index,
        order_of(index),
        DataConfig(shards=index.url, image_size_px=side, decode_threads=1, prefetch_batches=2),
        global_batch=BATCH,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        first_batch=first_batch,
        attributes=attributes,
    )


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The first `count`; the stream is closed."""
    taken = list(islice(batches, count))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return taken


def expected_keys(index: ShardIndex, positions: np.ndarray) -> list[str]:
    shards, rows = order_of(index).locate(positions)
    return [sample_key(s, r) for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]


def our_threads() -> list[str]:
    ours = ("fetch", "decode", "prefetch")
    return [t.name for t in threading.enumerate() if t.name.startswith(ours)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """A set that no test changes."""
    return write_set(STORE, str(tmp_path_factory.mktemp("set")))


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """A set of the test's own."""
    return write_set(STORE, str(tmp_path))


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert our_threads() == []


# --------------------------------------------------------------------------------- right and stable


@pytest.mark.parametrize("first_batch", [0, 2, 1_000_000])  # batches 2 and 3 meet at the seam
@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_the_ranks_together_get_the_global_batches(
    shared: ShardIndex, world_size: int, first_batch: int
):
    count, share = 3, BATCH // world_size
    ranks = [
        take(
            stream(
                shared,
                rank=rank,
                world_size=world_size,
                micro_batch=share,
                first_batch=first_batch,
            ),
            count,
        )
        for rank in range(world_size)
    ]
    for step in range(count):
        batches = [batches[step] for batches in ranks]
        positions = np.concatenate([batch.positions for batch in batches])
        start = (first_batch + step) * BATCH
        assert positions.tolist() == list(range(start, start + BATCH))
        assert [k for b in batches for k in b.keys] == expected_keys(shared, positions)


def test_each_image_is_the_one_that_its_key_names(shared: ShardIndex):
    for batch in take(stream(shared), 3):
        assert batch.images.shape == (BATCH, SIDE, SIDE, 3)
        assert batch.images.dtype == np.uint8
        assert batch.images.flags.c_contiguous
        assert batch.positions.dtype == np.int64
        for key, image in zip(batch.keys, batch.images, strict=True):
            expected = colour(int(key[:5]), int(key[5:]))
            assert np.abs(image.mean(axis=(0, 1)) - expected).max() < 4


def test_micro_batches_are_the_same_samples_in_smaller_pieces(shared: ShardIndex):
    (whole,) = take(stream(shared, rank=1, world_size=2, micro_batch=6), 1)
    pieces = take(stream(shared, rank=1, world_size=2, micro_batch=2), 3)
    assert [key for piece in pieces for key in piece.keys] == list(whole.keys)
    assert (np.concatenate([piece.images for piece in pieces]) == whole.images).all()
    assert np.concatenate([p.positions for p in pieces]).tolist() == whole.positions.tolist()


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, list[Batch]]:
    """A set whose epochs end in mid-batch, and what one rank with one thread gets of it."""
    url = str(tmp_path_factory.mktemp("three"))
    shards = [
        write_shard(STORE, url, number, [(picture(number, row), {}) for row in range(size)])
        for number, size in enumerate((7, 13, 5, 9, 4, 12))
    ]
    index = write_index(STORE, url, shards)
    return index, split_stream(index, world_size=1, threads=1, until=7)


def split_stream(
    index: ShardIndex, *, world_size: int, threads: int, until: int, first_batch: int = 0
) -> list[Batch]:
    """Global batches of 24, put together from what each rank gets."""
    order = SampleOrder(index.sizes, seed=5, lanes=8, window_rows=3)
    data = DataConfig(shards=index.url, image_size_px=SIDE, decode_threads=threads)
    ranks = [
        take(
            open_stream(
                STORE, index, order, data, global_batch=24, micro_batch=24 // world_size,
                rank=rank, world_size=world_size, first_batch=first_batch,
            ),
            until - first_batch,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    return [
        Batch(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.positions for part in parts]),
            tuple(key for part in parts for key in part.keys),
        )
        for parts in zip(*ranks, strict=True)
    ]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return all(
        (a.images == b.images).all() and (a.positions == b.positions).all() and a.keys == b.keys
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_three_epochs_are_the_same_bytes_at_every_world_size_and_number_of_threads(
    three_epochs: tuple[ShardIndex, list[Batch]], world_size: int, threads: int
):
    index, undisturbed = three_epochs
    assert sum(len(batch.positions) for batch in undisturbed) > 3 * index.num_samples
    assert same(split_stream(index, world_size=world_size, threads=threads, until=7), undisturbed)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, 2, 3, 4, 6, 8])), max_size=3))
def test_stopped_anywhere_and_resumed_at_any_size_nothing_is_lost_or_doubled(
    three_epochs: tuple[ShardIndex, list[Batch]], stops: list[tuple[int, int]]
):
    index, undisturbed = three_epochs
    parts, at = [], 0
    for until, world_size in [*sorted(stops), (7, 2)]:
        if until > at:
            parts += split_stream(
                index, world_size=world_size, threads=2, until=until, first_batch=at
            )
            at = until
    assert same(parts, undisturbed)


def test_a_stream_resumed_at_any_batch_goes_on_as_the_undisturbed_one(shared: ShardIndex):
    undisturbed = take(stream(shared, rank=1, world_size=2, micro_batch=6), 6)
    for first in range(6):
        resumed = take(
            stream(shared, rank=1, world_size=2, micro_batch=6, first_batch=first), 6 - first
        )
        for one, two in zip(undisturbed[first:], resumed, strict=True):
            assert one.keys == two.keys
            assert one.positions.tolist() == two.positions.tolist()
            assert (one.images == two.images).all()


def test_a_random_crop_is_decided_by_position_and_seed(tmp_path: Path):
    """Every image is a ramp from left to right: its mean tells where the square was cut."""
    ramp = np.tile(np.arange(4 * SIDE, dtype=np.uint8)[None, :, None] * 4, (SIDE, 1, 3))
    jpeg = simplejpeg.encode_jpeg(ramp, quality=95, colorspace="RGB")
    shard = write_shard(STORE, str(tmp_path), 0, [(jpeg, {}) for _ in range(24)])
    index = write_index(STORE, str(tmp_path), [shard])

    def means(crop: str, seed: int = 5, first_batch: int = 0) -> list[float]:
        order = SampleOrder(index.sizes, seed=seed, lanes=4, window_rows=3)
        data = DataConfig(shards=index.url, image_size_px=SIDE, crop=crop)  # pyright: ignore
        split = {"global_batch": 12, "micro_batch": 12, "rank": 0, "world_size": 1}
        batches = open_stream(STORE, index, order, data, **split, first_batch=first_batch)
        return [image.mean() for batch in take(batches, 2) for image in batch.images]

    centre, random = means("centre"), means("random")
    assert np.ptp(centre) < 1
    assert np.ptp(random) > 60, "from one end to the other"
    assert abs(np.mean(random) - np.mean(centre)) < 40
    assert means("random", first_batch=1)[:12] == random[12:]
    assert means("random", seed=6) != random


def test_a_second_epoch_comes_from_the_cache(shared: ShardIndex, tmp_path: Path):
    counting = CountingStore()
    cache = RangeCache(tmp_path, 2**20)

    def epoch() -> list[Any]:
        blocks = [np.arange(start, start + 12) for start in range(0, 36, 12)]
        stage = PositionedSamples(counting, shared, order_of(shared), blocks, cache=cache)
        return [(sample["__key__"], sample["jpg"]) for sample in stage()]

    first = epoch()
    counting.reads.clear()
    assert epoch() == first
    assert not [name for name, _, _ in counting.reads if name.endswith(".tar")]


def test_images_are_cropped_and_resized_to_the_size_asked_for(shared: ShardIndex):
    (batch,) = take(stream(shared, side=8), 1)
    assert batch.images.shape == (BATCH, 8, 8, 3)


def test_the_same_from_s3(store: ObjectStore, s3_url: str, shared: ShardIndex):
    on_s3 = write_set(store, s3_url)
    for one, two in zip(take(stream(on_s3, store=store), 4), take(stream(shared), 4), strict=True):
        assert one.keys == two.keys
        assert (one.images == two.images).all()


class CountingStore(ObjectStore):
    """A store that remembers what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int | None]] = []

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        self.reads.append((url.rsplit("/", 1)[-1], start, end))
        return super().read(url, start, end)


@pytest.mark.parametrize("block", [12, 6, 4, 1])
@pytest.mark.parametrize("lanes", [1, 4, 12, 40])
def test_an_epoch_costs_one_ranged_read_per_window(shared: ShardIndex, block: int, lanes: int):
    counting = CountingStore()
    order = SampleOrder(shared.sizes, seed=5, lanes=lanes, window_rows=3)
    blocks = [np.arange(start, start + block) for start in range(0, sum(SIZES), block)]
    assert len(list(PositionedSamples(counting, shared, order, blocks)())) == sum(SIZES)
    windows = sum(-(-size // 3) for size in SIZES)
    tars = [(start, end) for name, start, end in counting.reads if name.endswith(".tar")]
    # Where two lanes meet inside a window or a shard, both read it.
    assert windows <= len(tars) <= windows + lanes - 1
    assert len(SIZES) <= len(counting.reads) - len(tars) <= len(SIZES) + lanes - 1
    assert all(end is not None and end - start < 3 * 4_096 for start, end in tars)


# --------------------------------------------------------------------------- a stage like any other


def test_it_is_the_first_stage_of_a_plain_pipeline(shared: ShardIndex):
    positions = np.arange(30, 42)  # across the seam
    pipeline = wds.DataPipeline(
        PositionedSamples(STORE, shared, order_of(shared), [positions[:5], positions[5:]]),
        wds.decode("rgb8"),
        wds.to_tuple("__key__", "__position__", "jpg", "json"),
        wds.batched(4),
    )
    for _ in range(2):  # a pipeline may be iterated again
        batches = list(pipeline)
        assert [len(batch[0]) for batch in batches] == [4, 4, 4]
        keys = [key for batch in batches for key in batch[0]]
        assert keys == expected_keys(shared, positions)
        assert [p for batch in batches for p in batch[1]] == positions.tolist()
        assert batches[0][2][0].shape == (SIDE, SIDE, 3)
        assert batches[0][3][0] == {"key": keys[0]}


@pytest.mark.parametrize("block", [2, 4])
def test_a_stage_that_was_left_early_can_be_iterated_again(
    shared: ShardIndex, block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        sample_reader, "FETCH_THREADS", 1
    )  # so that much is unfinished when it is left
    blocks = [np.arange(start, start + block) for start in range(0, 36, block)]
    stage = PositionedSamples(STORE, shared, order_of(shared), blocks)
    for _ in range(5):
        samples = stage()
        next(samples)
        samples.close()
    assert [sample["__position__"] for sample in stage()] == list(range(36))


def test_a_sample_says_where_it_comes_from(shared: ShardIndex):
    (sample,) = PositionedSamples(STORE, shared, order_of(shared), [np.array([40])])()
    shards, rows = order_of(shared).locate([40])
    assert sample["__url__"] == join(shared.url, f"{int(shards[0]):05d}.tar")
    assert (sample["__row__"], sample["__position__"]) == (int(rows[0]), 40)
    assert sample["jpg"] == picture(int(shards[0]), int(rows[0]))


@pytest.mark.parametrize(
    "names", [["jpg"], ["JPEG"], ["png"], ["webp"], ["json", "png", "txt"]], ids="+".join
)
def test_tars_of_other_writers_are_read(tmp_path: Path, names: list[str]):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key in ("d/first", "d/second", "d/third"):
            for name in names:
                kind = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP"}.get(name)
                content = io.BytesIO(b"{}")
                if kind:
                    Image.new("L", (20, 30), 77).save(content, kind, quality=95)
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = content.seek(0, io.SEEK_END)
                content.seek(0)
                tar.addfile(info, content)
    shard = publish_shard(STORE, str(tmp_path), "x.tar", buffer.getvalue())
    (batch,) = take(stream(write_index(STORE, str(tmp_path), [shard]), micro_batch=3), 1)
    assert sorted(batch.keys) == ["d/first", "d/second", "d/third"]
    assert np.abs(batch.images.astype(int) - 77).max() <= 2


# ------------------------------------------------------------------------------- errors with a name


def epoch_of(index: ShardIndex, first_batch: int = 0, **options: Any) -> list[Batch]:
    """Three batches of twelve: one epoch."""
    return take(stream(index, first_batch=first_batch, **options), 3)


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def check_replaced(index: ShardIndex, bad: set[str], cause: str, reason: str) -> None:
    """Everything else keeps its place; a bad sample has a good one in its place and a letter."""
    batches = epoch_of(index)
    letters = [letter for batch in batches for letter in batch.dead_letters]
    expected, found = expected_keys(index, np.arange(36)), keys_of(batches)
    assert not bad & set(found)
    assert {k for k, f in zip(expected, found, strict=True) if k != f} == bad
    places = {expected.index(key): key for key in bad}
    assert {letter.position for letter in letters} == set(places)
    first = {letter.position: letter for letter in reversed(letters)}
    for position, letter in first.items():
        assert sample_key(int(letter.shard[-9:-4]), letter.row) == places[position]
        assert letter.cause == cause
        assert re.search(reason, letter.reason), letter.reason
    halves = [epoch_of(index, rank=rank, world_size=2, micro_batch=6) for rank in (0, 1)]
    split = [key for pair in zip(*halves, strict=True) for half in pair for key in half.keys]
    assert split == found, "other ranks put the same substitutes there"
    assert keys_of(epoch_of(index, first_batch=1))[:24] == found[12:], "and so does a resumed run"


def test_an_undecodable_image_is_replaced_and_named(tmp_path: Path):
    url = str(tmp_path)
    shards = [
        write_shard(STORE, url, n, [
            (b"\xff\xd8 no jpeg" if (n, row) == (1, 5) else picture(n, row), {})
            for row in range(size)
        ])
        for n, size in enumerate(SIZES)
    ]  # fmt: skip
    check_replaced(
        write_index(STORE, url, shards),
        {"000010005"},
        "undecodable image",
        rf"sample 000010005 of {url}/00001\.tar: damaged JPEG",
    )


def test_an_unlabelled_image_is_replaced_and_named_where_labels_are_asked_for(tmp_path: Path):
    url = str(tmp_path)
    labelled = [{"attributes": {"a": row % 2}} if row != 5 else {} for row in range(12)]
    rows = [(picture(0, row), metadata) for row, metadata in enumerate(labelled)]
    index = write_index(STORE, url, [write_shard(STORE, url, 0, rows)])
    found = take(stream(index), 1) + take(stream(index, attributes=("a",)), 1)
    (letter,) = {letter.key: letter for letter in found[1].dead_letters}.values()
    assert (letter.row, letter.cause) == (5, "unlabelled")
    assert found[0].dead_letters == ()
    assert [int(key[-4:]) % 2 for key in found[1].keys] == found[1].labels[:, 0].tolist()


def test_when_nothing_can_be_used_the_stream_ends_with_an_error(tmp_path: Path):
    samples = [(b"\xff\xd8 no jpeg", {}) for _ in range(12)]
    index = write_index(STORE, str(tmp_path), [write_shard(STORE, str(tmp_path), 0, samples)])
    with pytest.raises(TooManyBadSamplesError, match="and 100 substitutes cannot be used"):
        next(stream(index))


def test_a_sample_without_an_image_is_named():
    with pytest.raises(DecodeError, match=r"sample k of u has no image \(none of jpg, jpeg, png"):
        decode_sample({"__key__": "k", "__url__": "u", "json": b"{}", "gif": b"GIF89a"}, 8)


def test_a_flipped_byte_costs_that_sample_only(index: ShardIndex):
    path = Path(index.url, "00003.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmember("000030004.jpg").offset_data + 2] ^= 0x20
    path.write_bytes(data)
    check_replaced(
        index,
        {"000030004"},
        "other bytes than indexed",
        r"00003\.tar: member 000030004\.jpg at byte \d+ does not match",
    )


def keys_of_shard(number: int) -> set[str]:
    return {sample_key(number, row) for row in range(SIZES[number])}


def test_a_shard_replaced_by_a_valid_one_of_the_same_size_is_noticed(index: ShardIndex):
    size = Path(index.url, "00001.tar").stat().st_size
    write_shard(STORE, index.url, 1, [(picture(4, row), {}) for row in range(SIZES[1])])
    assert Path(index.url, "00001.tar").stat().st_size == size
    check_replaced(index, keys_of_shard(1), "other bytes than indexed", r"00001")


def test_a_shard_cut_or_removed_while_it_is_read_is_replaced_row_by_row(index: ShardIndex):
    path = Path(index.url, "00001.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[:512])
    check_replaced(index, keys_of_shard(1), "shard cut short", r"00001\.tar has 512 bytes")
    path.write_bytes(b"")
    check_replaced(index, keys_of_shard(1), "shard cut short", r"00001\.tar has 0 bytes")
    # Exactly between two samples, where tar readers see a shorter archive and no error.
    for row_cut in (6, 7):  # where a window ends, and inside of one
        boundary = headers(whole)[2 * row_cut].offset
        path.write_bytes(whole[:boundary])
        lost = {sample_key(1, row) for row in range(row_cut, SIZES[1])}
        check_replaced(index, lost, "shard cut short", rf"00001\.tar has {boundary} bytes")
    path.unlink()
    check_replaced(index, keys_of_shard(1), "shard missing", r"00001\.tar does not exist")


class FlippingStore(ObjectStore):
    """Flips a byte of every first read of a tar's range, as bad memory on the way does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, int]] = set()

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().read(url, start, end)
        if not url.endswith(".tar") or (url, start) in self.seen:
            return data
        self.seen.add((url, start))
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_transient_fault_makes_no_sample_bad(shared: ShardIndex):
    batches = epoch_of(shared, store=FlippingStore())
    assert keys_of(batches) == expected_keys(shared, np.arange(36))
    assert not [letter for batch in batches for letter in batch.dead_letters]


def test_a_window_stretched_by_other_members_is_read_sample_by_sample(
    shared: ShardIndex, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sample_reader, "MAX_WINDOW_BYTES", 100)
    counting = CountingStore()
    batches = epoch_of(shared, store=counting)
    assert keys_of(batches) == expected_keys(shared, np.arange(36))
    tars = [(start, end) for name, start, end in counting.reads if name.endswith(".tar")]
    assert all(end is not None and end - start < 2_048 for start, end in tars)


def test_a_member_that_is_no_image_by_its_size_is_bad(
    shared: ShardIndex, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sample_reader, "MAX_WINDOW_BYTES", 100)
    monkeypatch.setattr(sample_reader, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(TooManyBadSamplesError, match="more than the limit of 100") as error:
        next(stream(shared))
    assert len(error.value.letters) == 101


def test_the_cache_keeps_nothing_of_a_damaged_shard(index: ShardIndex, tmp_path: Path):
    path = Path(index.url, "00003.tar")
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    with tarfile.open(path) as tar:
        spoilt[tar.getmember("000030004.jpg").offset_data + 2] ^= 0x20
    data = DataConfig.model_validate(
        {
            "shards": index.url,
            "image_size_px": SIDE,
            "cache": {"folder": str(tmp_path / "cache"), "limit_gib": 1.0},
        }
    )

    def epoch() -> list[str]:
        place = {"global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world_size": 1}
        batches = open_stream(STORE, index, order_of(index), data, **place, first_batch=0)
        return keys_of(take(batches, 3))

    path.write_bytes(spoilt)
    assert "000030004" not in epoch()
    path.write_bytes(whole)
    assert epoch() == expected_keys(index, np.arange(36))
    path.write_bytes(spoilt)
    assert epoch() == expected_keys(index, np.arange(36)), "and what is sound comes from the cache"


def test_a_store_that_does_not_answer_makes_no_sample_bad(s3: LocalS3, s3_url: str):
    index = write_set(ObjectStore(), s3_url)
    dead = ObjectStore(
        endpoint_url="http://127.0.0.1:9", deadline_seconds=1, request_timeout_seconds=0.5
    )
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        next(stream(index, store=dead))


# --------------------------------------------------------------------------------- threads and ends


def test_closing_a_stream_stops_its_threads(shared: ShardIndex):
    batches = stream(shared)
    next(batches)
    assert {name.split("_")[0] for name in our_threads()} == {"fetch", "decode", "prefetch"}
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    # `_no_thread_is_left_behind` waits for them


def test_a_stream_that_is_dropped_stops_its_threads_too(shared: ShardIndex):
    batches = stream(shared)
    next(batches)
    assert our_threads()
    del batches


def counted(events: list[object], until: int) -> Iterator[int]:
    try:
        for number in range(until):
            events.append(number)
            yield number
        raise OSError("the source broke")
    finally:
        events.append("closed")


def settled(events: list[object]) -> list[object]:
    """The events once none has been added for a while."""
    length = -1
    while length != len(events):
        length = len(events)
        time.sleep(0.05)
    return events


def test_an_error_of_the_source_comes_out_in_its_place():
    items = prefetched(counted([], until=3), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the source broke"):
        next(items)


def test_prefetching_ends_with_its_source():
    assert list(prefetched(iter(range(7)), depth=2)) == list(range(7))
    assert list(prefetched((n for n in ()), depth=1)) == []


def test_prefetching_keeps_its_depth_and_closes_the_source():
    events: list[object] = []
    items = prefetched(counted(events, until=100), depth=3)
    assert events == [], "nothing is read before the first item is asked for"
    assert next(items) == 0
    assert settled(events) == [0, 1, 2, 3, 4]  # one taken, three ready, one waiting for a place
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    time.sleep(0.15)
    assert settled(events)[-1] == "closed"
    assert len(events) <= 7


def test_looking_ahead_draws_early_but_for_the_first_and_keeps_the_order():
    drawn: list[int] = []
    items = looking_ahead((drawn.append(n) or n for n in range(6)), 2)
    assert next(items) == 0
    assert drawn == [0]
    assert next(items) == 1
    assert drawn == [0, 1, 2, 3]
    assert list(items) == [2, 3, 4, 5]
    assert list(looking_ahead([1], 5)) == [1]


def test_decoding_in_threads_keeps_the_order_and_batching_the_rest():
    samples = [
        {"__key__": str(n), "__url__": "u", "__position__": n, "jpg": picture(0, n)}
        for n in range(10)
    ]
    batches = list(decoded_batches(SIDE, 4, threads=3)(samples))
    assert [batch.keys for batch in batches] == [tuple("0123"), tuple("4567"), tuple("89")]
    found = np.concatenate([b.images for b in batches]).mean(axis=(1, 2))
    assert np.abs(found - [colour(0, n) for n in range(10)]).max() < 4
