"""`python -m tools.benchmarks.export`: what an export takes beside the encoder's forward pass.

In turns: processes that only compute the forward pass, one a core, and exports of the same images
on the same cores. Then, if wanted, an export whose workers and driver are killed, gone on with,
verified, and compared with the first byte for byte.
"""

import argparse
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch

from cluster.export import export_features
from cluster.features import verify_features
from cluster.leases import QueueState
from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.feature_store import COMMITS, FeatureManifest
from data_pipelines.local_s3 import local_s3
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_reader import iter_shard
from data_pipelines.shard_index import read_index, write_index
from data_pipelines.shard_writer import write_shard
from pretrain.preflight import run_url
from pretrain.shard_features import EncoderOnDevice
from pretrain.train import run
from pretrain.trained import load_encoder
from tools.benchmarks.publishing import make_config
from tools.benchmarks.train_step import IMAGE_SIZE_PX

ROWS_PER_SHARD = 2_000
FACES = 1_000
SHARDS = "s3://diti/faces"
FORWARD_SECONDS = 30.0
LOOK_SECONDS = 2.0


def write_faces(store: ObjectStore, images: int) -> None:
    """So many images of the encoder's size: a thousand faces, again and again."""
    spec = AvatarSpec(split="test", size_px=IMAGE_SIZE_PX)
    faces = [draw_avatar(spec, row) for row in range(FACES)]
    shards = [
        write_shard(
            store,
            SHARDS,
            number,
            [
                (face.jpeg, face.metadata)
                for row in range(ROWS_PER_SHARD)
                for face in [faces[(number * ROWS_PER_SHARD + row) % FACES]]
            ],
        )
        for number in range(images // ROWS_PER_SHARD)
    ]
    write_index(store, SHARDS, shards)


def train_one_step(store: ObjectStore, folder: Path) -> str:
    """The published CelebA-64 model after a step; returns the run's URL."""
    config = make_config(folder, batch=2, steps=1, every=1)
    run(config, local_dir=folder)
    return run_url(config)


def _compute(pipe: Connection, encoder_url: str, core: int) -> None:
    """Forward passes alone, on one core, for as long as each message says."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    store = ObjectStore()
    encoder = EncoderOnDevice(load_encoder(store, encoder_url), use_gpu=False)
    shard = read_index(store, SHARDS).shards[0]
    images = [decode_sample(sample, IMAGE_SIZE_PX) for sample in iter_shard(store, shard)]
    size = encoder.batch_size
    batches = [
        np.stack(images[at : at + size]) for at in range(0, len(images) - size + 1, size)
    ]  # full ones only: each counts for as many images
    encoder(batches[0])
    pipe.send(None)
    while seconds := pipe.recv():
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            encoder(batches[done % len(batches)])
            done += 1
        pipe.send(done * encoder.batch_size / (time.perf_counter() - start))


def forward_rate(encoder_url: str, cores: int) -> float:
    """Images per second of one forward process a core."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for core in range(cores):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_compute, args=(theirs, encoder_url, core), daemon=True)
        process.start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(FORWARD_SECONDS)
    rates = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(0)
    return sum(rates)


@dataclass
class Watch:
    """When the queue's work began and ended, and the workers' memory meanwhile."""

    first_lease: float | None = None
    last_commit: float = 0.0
    memory_mib: list[int] = field(default_factory=list)
    """Of the largest worker, at every look."""
    _workers: list[psutil.Process] = field(default_factory=list)
    _looked: float = 0.0

    def note(self, state: QueueState) -> None:
        now = time.perf_counter()
        if self.first_lease is None and (state.leased or state.done):
            self.first_lease = now
        if not self.last_commit and not state.waiting and not state.leased:
            self.last_commit = now
        if self.first_lease and not self.last_commit and now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._workers = self._workers or exporters(os.getpid())  # once: a walk through /proc
            self.memory_mib.append(max(each.memory_info().rss for each in self._workers) >> 20)

    def at(self, share: float) -> int:
        return self.memory_mib[min(len(self.memory_mib) - 1, int(share * len(self.memory_mib)))]


def exporters(driver: int) -> list[psutil.Process]:
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any("ExportWorker.work" in word for word in process.cmdline()):
                    found.append(process)
    return found


def export_watched(store: ObjectStore, encoder_url: str, out: str, workers: int) -> Watch:
    """Export while a thread looks at the queue through `on_progress`."""
    watch = Watch()
    export_features(
        store,
        run_url=encoder_url,
        shards_url=SHARDS,
        out_url=out,
        num_workers=workers,
        on_progress=watch.note,
    )
    return watch


def export_killed(store: ObjectStore, encoder_url: str, out: str, workers: int) -> list[str]:
    """The same by the command, whose workers and driver are killed; then again. What was done."""
    command = [sys.executable, "-m", "tools", "export", encoder_url, "--shards", SHARDS]
    command += ["--out", out, "--workers", str(workers)]
    shards, did = len(read_index(store, SHARDS).shards), []

    def wait_for(share: float) -> None:
        while len(store.list(join(out, COMMITS))) < share * shards:
            time.sleep(0.1)

    driver = subprocess.Popen(command)  # noqa: S603 (our own command)
    killed: set[int] = set()
    for share in (0.15, 0.3):
        wait_for(share)
        victim = next(p for p in exporters(driver.pid) if p.pid not in killed)
        killed.add(victim.pid)
        victim.send_signal(signal.SIGKILL)
        did.append(f"worker {victim.pid} killed at {share:.0%}")
    wait_for(0.5)
    driver.kill()
    driver.wait()
    did.append("driver killed at 50%")
    subprocess.run(command, check=True)  # noqa: S603
    return did


def differences(store: ObjectStore, one: str, other: str) -> list[str]:
    """Objects of two folders that are not the same bytes."""
    contents = [
        {info.url.removeprefix(url): store.read(info.url) for info in store.list(url)}
        for url in (one, other)
    ]
    names = sorted(contents[0].keys() | contents[1].keys())
    return [name for name in names if contents[0].get(name) != contents[1].get(name)]


def out_url(number: int) -> str:
    return f"s3://diti/features-{number}"


def main() -> None:
    parser = argparse.ArgumentParser(description="An export beside the encoder's forward pass.")
    parser.add_argument("--images", type=int, default=20_000, help="default 20,000")
    parser.add_argument("--rounds", type=int, default=3, help="exports (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: one a core")
    parser.add_argument("--kill", action="store_true", help="also kill workers and driver")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name, local_s3(Path(name, "s3")) as server:
        os.environ |= server.environment()
        store = ObjectStore()
        write_faces(store, args.images)
        encoder_url = train_one_step(store, Path(name))
        forward, exported, ratios = [forward_rate(encoder_url, args.workers)], [], []
        for number in range(args.rounds):
            watch = export_watched(store, encoder_url, out_url(number), args.workers)
            assert watch.first_lease is not None
            exported.append(args.images / (watch.last_commit - watch.first_lease))
            sizes = ", ".join(f"{share:.0%} {watch.at(share)}" for share in (0.1, 0.5, 1))
            print(f"memory of the largest worker, MiB, at {sizes}", flush=True)
            forward.append(forward_rate(encoder_url, args.workers))
            ratios.append(exported[-1] / statistics.mean(forward[-2:]))
        print(f"forward pass alone, images/s: {', '.join(f'{rate:.0f}' for rate in forward)}")
        print(f"export, images/s: {', '.join(f'{rate:.0f}' for rate in exported)}")
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"export / forward pass before and after it: {each}")
        print(f"median: {statistics.median(ratios):.3f}")
        if args.kill:
            killed_out = "s3://diti/killed"
            for line in export_killed(store, encoder_url, killed_out, args.workers):
                print(line)
            found = verify_features(store, killed_out, num_workers=args.workers)
            _say_verified(found.manifest, found.problems)
            print(f"objects that differ: {differences(store, out_url(0), killed_out) or 'none'}")


def _say_verified(manifest: FeatureManifest, problems: list[str]) -> None:
    print(f"verify: {manifest.rows} rows, problems: {problems or 'none'}")


if __name__ == "__main__":
    main()
