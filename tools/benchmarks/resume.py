"""`python -m tools.benchmarks.resume`: how long a run waits for its first batch after a restart.

At several places of an epoch, ours beside WebDataset, which has to read its way there: raw samples
are skipped without being decoded. Every start is a process of its own; imports are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from data_pipelines.local_s3 import local_s3
from data_pipelines.object_store import ObjectStore
from tools.benchmarks.loading import SIZE_PX, presigned, write_tars
from tools.benchmarks.loading_peers import LANES

BATCH = 64
SHARES = (0.0, 0.5, 0.99)


def ours(settings: dict[str, Any], first_batch: int) -> Callable[[], Any]:
    """Index and order are read, too: a restarted run has nothing."""
    import pandas as pd  # noqa: F401 (pyarrow would at its first use, and imports do not count)

    from configs.schema import DataConfig
    from data_pipelines.sample_order import SampleOrder
    from data_pipelines.sample_stream import open_stream
    from data_pipelines.shard_index import read_index

    def start() -> Any:
        store = ObjectStore()
        index = read_index(store, settings["shards"])
        data = DataConfig(shards=index.url, image_size_px=SIZE_PX)
        order = SampleOrder(index.sizes, seed=0, lanes=LANES, window_rows=data.window_rows)
        split = {"global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world_size": 1}
        return next(open_stream(store, index, order, data, **split, first_batch=first_batch))

    return start


def webdataset(settings: dict[str, Any], first_batch: int) -> Callable[[], Any]:
    """One process reads, skips what was trained on, and decodes from there."""
    import webdataset as wds

    def start() -> Any:
        dataset = (
            wds.WebDataset(  # pyright: ignore[reportAttributeAccessIssue]
                settings["pipes"], shardshuffle=100, seed=0
            )
            .shuffle(1000)
            .slice(first_batch * BATCH, 10**9)
            .decode("rgb8")
            .to_tuple("jpg")
            .batched(BATCH)
        )
        return next(iter(dataset))

    return start


LOADERS = {"ours": ours, "webdataset": webdataset}


def first_batch_seconds(loader: str, settings: dict[str, Any], first_batch: int) -> float:
    """In a process of its own."""
    command = [sys.executable, "-m", "tools.benchmarks.resume", "--start"]
    command.append(json.dumps([loader, settings, first_batch]))
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to the first batch after a restart.")
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        loader, settings, first_batch = json.loads(args.start)
        start = LOADERS[loader](settings, first_batch)
        begin = time.perf_counter()
        start()
        print(time.perf_counter() - begin, flush=True)
        os._exit(0)  # threads that read ahead need not be waited for
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder, "s3")) as server:
        os.environ |= server.environment()
        index = write_tars(ObjectStore(), "s3://diti/photographs", args.images)
        pipes = [f"pipe:curl -s '{presigned(shard.url)}'" for shard in index.shards]
        settings = {"shards": index.url, "pipes": pipes}
        batches = args.images // BATCH
        starts = [(loader, share) for loader in LOADERS for share in SHARES]
        seconds: dict[tuple[str, float], list[float]] = {start: [] for start in starts}
        for _ in range(args.rounds):  # in turns, so that whatever else the machine does hits all
            for loader, share in starts:
                place = int(share * (batches - 1))
                seconds[loader, share].append(first_batch_seconds(loader, settings, place))
        for (loader, share), found in seconds.items():
            print(f"{loader:12} at {share:4.0%} of {batches} batches: {median(found):.2f} s")


if __name__ == "__main__":
    main()
