"""`python -m tools.benchmarks.loading`: images from S3 to decoded batches, ours beside others.

The same JPEGs of 256 px (cut from scikit-learn's two sample photographs) lie in one local S3 server
as WebDataset tars and, for MosaicML streaming, as an MDS copy. Each loader is a process that reads
one shuffled epoch; the loaders take turns, several times. CPU time is that of the process and all
it started, without the server. The floor is what no loader can do without: the same codec decoding
the same bytes from memory, and the same client fetching them in large ranges without looking.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import psutil
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipelines.decoding import decode_image
from data_pipelines.local_s3 import local_s3
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_reader import iter_shard
from data_pipelines.shard_index import ShardIndex, write_index
from data_pipelines.shard_writer import write_shard
from tools.benchmarks.loading_peers import WARM_BATCHES, ours

SIZE_PX = 256
ROWS_PER_SHARD = 512
RANGE_BYTES = 16 * 2**20
PEERS = Path(__file__).with_name("loading_peers.py")
MDS_WRITER = """
import json, sys, tarfile, pathlib
from streaming import MDSWriter
tars, out = json.loads(sys.argv[1])
with MDSWriter(out=out, columns={"jpg": "bytes"}, size_limit=16 * 2**20) as writer:
    for tar in tars:
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".jpg"):
                    writer.write({"jpg": members.extractfile(member).read()})
"""


class LoaderFailedError(RuntimeError):
    """A loader ended before its epoch did."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One loader over one epoch, after its first batches."""

    loader: str
    images: int
    wall_seconds: float
    cpu_seconds: float
    failure: str = ""
    """What it said when it ended before its epoch did."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.wall_seconds

    @property
    def cpu_ms(self) -> float:
        """Per image."""
        return 1e3 * self.cpu_seconds / self.images


@dataclass(frozen=True, slots=True)
class Floor:
    """CPU milliseconds an image."""

    decode_ms: float
    fetch_ms: float

    @property
    def both_ms(self) -> float:
        return self.decode_ms + self.fetch_ms


# --- the images -----------------------------------------------------------------------------------


def photographs(count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEGs of 256 px: random squares of two photographs, resized, as downloads leave them."""
    random = np.random.default_rng(seed)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for _ in range(count):
        source = sources[random.integers(len(sources))]
        side = int(random.integers(180, min(source.size)))
        left, top = (int(random.integers(0, length - side)) for length in source.size)
        square = source.resize((SIZE_PX, SIZE_PX), box=(left, top, left + side, top + side))
        yield simplejpeg.encode_jpeg(np.asarray(square), quality=90, colorspace="RGB")


def write_tars(store: ObjectStore, url: str, count: int) -> ShardIndex:
    """`count` photographs as WebDataset tars with their index."""
    jpegs = photographs(count)
    shards = []
    for number in range(-(-count // ROWS_PER_SHARD)):
        rows = min(ROWS_PER_SHARD, count - number * ROWS_PER_SHARD)
        shards.append(write_shard(store, url, number, [(next(jpegs), {}) for _ in range(rows)]))
    return write_index(store, url, shards)


def write_mds(store: ObjectStore, index: ShardIndex, url: str, python: str, scratch: Path) -> None:
    """The same images in the peer's own format, written by itself."""
    tars = []
    for shard in index.shards:
        tars.append(scratch / shard.name)
        store.download(shard.url, tars[-1])
    out = scratch / "mds"
    arguments = json.dumps([[str(tar) for tar in tars], str(out)])
    subprocess.run([python, "-c", MDS_WRITER, arguments], check=True)  # noqa: S603
    for path in sorted(out.iterdir()):
        store.upload(path, f"{url}/{path.name}")


def presigned(url: str) -> str:
    """A link that curl can fetch."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = botocore.session.get_session().create_client("s3")
    return client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key})


# --- measuring ------------------------------------------------------------------------------------


def measure_floor(store: ObjectStore, index: ShardIndex, workers: int) -> Floor:
    """Decoding every image from memory, and fetching every tar in large ranges.

    In as many threads as the loaders have; one thread alone takes a few per cent less CPU time.
    """
    jpegs = [sample["jpg"] for shard in index.shards for sample in iter_shard(store, shard)]
    start = time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(_decode_in_turn, [jpegs[first::workers] for first in range(workers)]))
    decode = time.process_time() - start
    start = time.process_time()
    for shard in index.shards:
        for begin in range(0, shard.size_bytes, RANGE_BYTES):
            store.read(shard.url, begin, min(begin + RANGE_BYTES, shard.size_bytes))
    fetch = time.process_time() - start
    return Floor(1e3 * decode / len(jpegs), 1e3 * fetch / len(jpegs))


def measure_pools(jpegs: list[bytes], workers: int) -> dict[str, tuple[float, float]]:
    """Decoding from memory in threads and in processes: images/s, CPU milliseconds an image."""
    found = {}
    for name, pool in (
        ("threads", ThreadPoolExecutor(workers)),
        ("processes", ProcessPoolExecutor(workers)),
    ):
        with pool:
            _decode_all(pool, jpegs[:64])
            cpu, start = _cpu_of_family(os.getpid()), time.perf_counter()
            _decode_all(pool, jpegs)
            seconds = time.perf_counter() - start
            spent = _cpu_of_family(os.getpid()) - cpu
            found[name] = len(jpegs) / seconds, 1e3 * spent / len(jpegs)
    return found


def _decode_in_turn(jpegs: list[bytes]) -> None:
    for jpeg in jpegs:
        decode_image(jpeg, SIZE_PX)


def _decode_all(pool: Executor, jpegs: list[bytes]) -> None:
    decode = partial(decode_image, size_px=SIZE_PX)
    for _ in pool.map(decode, jpegs, chunksize=16):
        pass


def run_loader(name: str, loader: str, python: str, settings: dict[str, Any]) -> Loaded:
    """One epoch of a loader in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "settings.json")
        file.write_text(json.dumps(settings | {"scratch": f"{scratch}/cache"}))
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(  # noqa: S603
            [python, str(PEERS), loader, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        try:
            begin = _reading(process, "begin")
            end = _reading(process, "end")
        except LoaderFailedError as error:
            return Loaded(name, 1, math.nan, math.nan, str(error))
        finally:
            process.kill()
            process.communicate()
    images, wall, cpu = (late - early for early, late in zip(begin, end, strict=True))
    return Loaded(name, int(images), wall, cpu)


def profile_ours(settings: dict[str, Any], num_batches: int) -> dict[str, float]:
    """CPU milliseconds an image of our stream, by what its threads do, after its first batches."""
    batches = ours(settings)
    for _ in range(WARM_BATCHES):
        next(batches)
    before = _cpu_by_thread()
    images = sum(len(next(batches)) for _ in range(num_batches))  # at the end, threads are gone
    spent = _cpu_by_thread() - before
    return {name: nanoseconds / 1e6 / images for name, nanoseconds in spent.most_common()}


def _cpu_by_thread() -> Counter[str]:
    """CPU nanoseconds of this process's threads, those of a pool together."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    nanoseconds: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        name = names.get(task.name, "other").rstrip("_0123456789")
        nanoseconds[name] += int((task / "schedstat").read_text().split()[0])
    return nanoseconds


def _reading(process: "subprocess.Popen[str]", word: str) -> tuple[float, float, float]:
    """Images, wall and CPU seconds when the loader says so."""
    assert process.stdout is not None
    assert process.stdin is not None
    for line in process.stdout:
        if line.startswith(word):
            read = float(line.split()[1]), time.perf_counter(), _cpu_of_family(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
            return read
    assert process.stderr is not None
    raise LoaderFailedError(process.stderr.read().strip().splitlines()[-1])


def _cpu_of_family(pid: int) -> float:
    """CPU seconds of a process, of all it has started, and of those that have ended since."""
    root = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:4]) for process in (root, *root.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Images from S3 to decoded batches.")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="threads or processes (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each loader (default 3)")
    parser.add_argument("--only", help="names of loaders, separated by commas")
    parser.add_argument(
        "--streaming-python",
        help="a Python that has mosaicml-streaming (it does not fit beside ours); default: skip it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder, "s3")) as server:
        os.environ |= server.environment() | {"S3_ENDPOINT_URL": server.endpoint_url}
        store = ObjectStore()
        index = write_tars(store, "s3://diti/photographs", args.images)
        tars = [shard.url for shard in index.shards]
        settings = {
            "batch": args.batch,
            "workers": args.workers,
            "shards": index.url,
            "tars": tars,
            "pipes": [f"pipe:curl -s '{presigned(url)}'" for url in tars],
            "mds": "s3://diti/mds",
        }
        plan = [("ours", "ours", sys.executable, True)]
        for loader in ("webdataset", "ray data"):
            plan += [(loader, loader, sys.executable, False)]
            plan += [(f"{loader}, our codec", loader, sys.executable, True)]
        if args.streaming_python:
            write_mds(store, index, settings["mds"], args.streaming_python, Path(folder))
            plan += [("streaming", "streaming", args.streaming_python, False)]
            plan += [("streaming, our codec", "streaming", args.streaming_python, True)]
        if args.only:
            plan = [entry for entry in plan if entry[0] in args.only.split(",")]
        rounds = [
            (
                measure_floor(store, index, args.workers),
                [run_loader(*who, settings | {"fast_codec": fast}) for *who, fast in plan],
            )
            for _ in range(args.rounds)
        ]
        profile = profile_ours(settings, args.images // args.batch - WARM_BATCHES - 1)
        jpegs = [sample["jpg"] for shard in index.shards[:4] for sample in iter_shard(store, shard)]
        pools = measure_pools(jpegs, args.workers)
    report(rounds, profile, pools, as_json=args.json)


def report(
    rounds: list[tuple[Floor, list[Loaded]]],
    profile: dict[str, float],
    pools: dict[str, tuple[float, float]],
    *,
    as_json: bool,
) -> None:
    """Medians over the rounds; ratios are formed within a round."""
    if as_json:
        rows = [
            {"floor": asdict(floor), "loaders": [asdict(one) for one in loaders]}
            for floor, loaders in rounds
        ]
        print(json.dumps({"rounds": rows, "profile": profile, "pools": pools}, indent=1))
        return
    floor = statistics.median(floor.both_ms for floor, _ in rounds)
    decode = statistics.median(floor.decode_ms for floor, _ in rounds)
    client = floor - decode
    print(f"floor: {floor:.3f} CPU ms an image ({decode:.3f} decoding, {client:.3f} client)")
    for row in range(len(rounds[0][1])):
        runs = [loaders[row] for _, loaders in rounds]
        if failures := [run.failure for run in runs if run.failure]:
            print(f"{runs[0].loader:24} failed in {len(failures)} of {len(runs)}: {failures[0]}")
            continue
        above = statistics.median(loaders[row].cpu_ms / floor.both_ms for floor, loaders in rounds)
        speedup = statistics.median(
            loaders[0].images_per_second / loaders[row].images_per_second for _, loaders in rounds
        )
        print(
            f"{runs[0].loader:24} {statistics.median(r.images_per_second for r in runs):7.0f} "
            f"images/s, {statistics.median(r.cpu_ms for r in runs):6.3f} CPU ms an image, "
            f"{above:5.2f} of the floor; {rounds[0][1][0].loader} is {speedup:5.2f} times as fast"
        )
    print(
        f"ours, CPU ms an image by thread: {', '.join(f'{n} {v:.3f}' for n, v in profile.items())}"
    )
    for name, (rate, cpu_ms) in pools.items():
        print(f"decoding from memory in {name}: {rate:.0f} images/s, {cpu_ms:.3f} CPU ms an image")


if __name__ == "__main__":
    main()
