"""The stream and its server: away for a while, away for good; and what it holds on to over time."""

import re
import threading
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import psutil
import pytest
import simplejpeg

from configs.schema import DataConfig
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import ObjectStore, StoreUnavailableError
from data_pipelines.sample_order import SampleOrder
from data_pipelines.sample_stream import Batch, open_stream
from data_pipelines.shard_index import ShardIndex, write_index
from data_pipelines.shard_writer import write_shard

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
SIDE, BATCH = 64, 50


def write_set(url: str, shards: int = 8, rows: int = 250) -> ShardIndex:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB")
    written = [write_shard(ObjectStore(), url, n, [(jpeg, {})] * rows) for n in range(shards)]
    return write_index(ObjectStore(), url, written)


def stream(index: ShardIndex, store: ObjectStore) -> Iterator[Batch]:
    order = SampleOrder(index.sizes, seed=0, lanes=8, window_rows=16)
    data = DataConfig(shards=index.url, image_size_px=SIDE)
    return open_stream(
        store, index, order, data, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1,
        first_batch=0,
    )  # fmt: skip


def test_a_server_away_for_20_seconds_costs_no_sample(victim: LocalS3) -> None:
    index = write_set("s3://diti/set")
    batches = stream(index, ObjectStore(request_timeout_seconds=5))
    positions = list(next(batches).positions)
    victim.stop()
    threading.Timer(20, victim.restart).start()
    start = time.monotonic()
    for batch in islice(batches, 2 * index.num_samples // BATCH):
        assert batch.dead_letters == ()
        positions += batch.positions.tolist()
    assert time.monotonic() - start > 15, "everything had been read ahead: the test proves nothing"
    assert positions == list(range(len(positions)))


def test_a_server_away_for_longer_than_the_deadline_is_one_clear_error(victim: LocalS3) -> None:
    index = write_set("s3://diti/set")
    batches = stream(index, ObjectStore(deadline_seconds=3, request_timeout_seconds=1))
    next(batches)
    victim.stop()
    with pytest.raises(StoreUnavailableError) as caught:
        for _ in islice(batches, index.num_samples // BATCH):
            pass
    said = str(caught.value)
    assert victim.endpoint_url in said
    assert re.search(r"s3://diti/set/\d{5}\.(tar|members\.parquet)", said)
    assert re.search(r"in \d+\.\d s and \d+ attempts \(deadline 3 s\)", said)
    assert "the last one failed with" in said


def test_memory_is_flat_over_200_000_samples(victim: LocalS3) -> None:
    index = write_set("s3://diti/set")
    batches = stream(index, ObjectStore())
    process = psutil.Process()
    resident = []
    for number, batch in enumerate(islice(batches, 200_000 // BATCH)):
        assert len(batch.positions) == BATCH
        if number % 400 == 399:
            resident.append(process.memory_info().rss / 2**20)
    print(f"resident MiB every 20,000 samples: {[round(mib) for mib in resident]}")
    assert max(resident[1:]) < resident[0] * 1.05
