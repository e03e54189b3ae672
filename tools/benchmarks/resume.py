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
from pathlib import Path
from statistics import median
from typing import Any

# What the loaders import when they are called is imported here: it does not count. pandas would be
# by pyarrow, at its first use.
import pandas as pd  # noqa: F401
import webdataset as wds  # noqa: F401

import data_pipelines.sample_stream  # noqa: F401
from data_pipelines.local_s3 import local_s3
from data_pipelines.object_store import ObjectStore
from tools.benchmarks.loading import presigned, write_tars
from tools.benchmarks.loading_peers import ours, webdataset_batches

BATCH = 64
SHARES = (0.0, 0.5, 0.99)
LOADERS = {"ours": ours, "webdataset": webdataset_batches}


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
        begin = time.perf_counter()
        next(iter(LOADERS[loader](settings, first_batch)))
        print(time.perf_counter() - begin, flush=True)
        os._exit(0)  # threads that read ahead need not be waited for
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder, "s3")) as server:
        os.environ |= server.environment()
        index = write_tars(ObjectStore(), "s3://diti/photographs", args.images)
        pipes = [f"pipe:curl -s '{presigned(shard.url)}'" for shard in index.shards]
        settings = {
            "shards": index.url,
            "pipes": pipes,
            "batch": BATCH,
            "workers": 2,
            "fast_codec": False,
        }
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
