"""`python -m tools.benchmarks.publishing`: what a step takes while a checkpoint is published.

One worker trains the CelebA-64 model on one core; what loads, publishes (a process beside the
worker) and serves S3 has another core. Steps are told apart by whether the publishing thread was
at work when they began and ended, and compared with their neighbours: the machine's pace drifts.
As a control, another process uploads as much in the same way from the other core after every second
checkpoint: what these steps take more than those alone is the machine's doing, not the run's.
The server keeps its objects in memory: a virtual machine's disk takes time from every core.
"""

import argparse
import hashlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from configs.loading import parse_run
from configs.schema import RunConfig
from configs.task import ScheduleConfig
from data_pipelines import upload_process
from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.local_s3 import local_s3
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import write_index
from data_pipelines.shard_writer import write_shard
from pretrain.backbone import save_backbone
from pretrain.progress import Progress
from pretrain.train import run
from pretrain.unet import UNet
from tools.benchmarks.train_step import IMAGE_SIZE_PX, UNET

RUN = """
name: publishing
output: s3://diti/runs
task:
  kind: diti
  backbone: {{weights: {folder}/dpm.safetensors, sha256: {sha256}}}
data: {{shards: {folder}/shards, image_size_px: 64}}
train:
  total_images: {total_images}
  global_batch: {batch}
  checkpoint_every_images: {every}
  keep_last: 1
  log_every_steps: 1
wandb: {{mode: disabled}}
"""


CONTROL_BYTES = 64 * 2**20
"""Of one upload: several parts, as of a checkpoint's tensors."""


class Seconds(NamedTuple):
    """Of one step, or since the start."""

    wall: float
    user: float
    """CPU time of the training thread; below, what the system took for it."""
    system: float
    others: float
    """CPU time of every other thread of the process, and of the one that uploads for it."""

    @property
    def training(self) -> float:
        return self.user + self.system

    def __sub__(self, before: "Seconds") -> "Seconds":
        return Seconds(*(now - then for now, then in zip(self, before, strict=True)))


_START = Seconds(0.0, 0.0, 0.0, 0.0)


@dataclass
class Steps:
    """What each step took, by what the publisher did in it. One section begins with each checkpoint
    (the first with the run) and lasts until the next one."""

    uploader: "Uploader"
    every: int
    """Steps from one checkpoint to the next."""
    sections: list[dict[str, list[Seconds]]] = field(default_factory=lambda: [defaultdict(list)])
    """copying, beside, completing; then alone, or in every second section control: beside another
    process that uploads."""
    _last: Seconds = _START
    _was_publishing: bool = True

    def note(self, progress: Progress) -> None:
        own = resource.getrusage(resource.RUSAGE_THREAD)
        others = time.process_time() - own.ru_utime - own.ru_stime
        others += sum(sum(process.cpu_times()[:2]) for process in uploading())
        now = Seconds(time.perf_counter(), own.ru_utime, own.ru_stime, others)
        is_now = is_publishing()
        kind = {
            (False, False): "control" if self.uploader.is_on else "alone",
            (False, True): "copying",
            (True, True): "beside",
            (True, False): "completing",
        }[self._was_publishing, is_now]
        if kind == "copying":
            self.sections.append(defaultdict(list))
        # The first steps warm up; with the last one the run waits for its checkpoint.
        if 2 < progress.step < progress.total_steps:
            self.sections[-1][kind].append(now - self._last)
        is_control, copies_next = len(self.sections) % 2 == 0, (progress.step + 1) % self.every == 0
        self.uploader.turn(on=is_control and not is_now and not copies_next)
        self._last, self._was_publishing = now, is_now

    def of(self, kind: str) -> list[Seconds]:
        return [step for section in self.sections for step in section.get(kind, ())]

    def ratios(self) -> tuple[list[float], list[float]]:
        """Of each checkpoint: its steps beside publishing, and those beside another process,
        against those alone. The last two lie next to the first, one before and one after: the
        machine's pace changes by more than what is asked here."""
        beside, control = [], []
        for before, section in pairwise(self.sections):
            rests = before | section  # its own "alone" or "control", and the other of before
            if section["beside"] and rests.get("alone") and rests.get("control"):
                alone = _median_wall(rests["alone"])
                beside.append(_median_wall(section["beside"]) / alone)
                control.append(_median_wall(rests["control"]) / alone)
        return beside, control

    def cpu_per_save(self) -> float:
        """CPU seconds of a checkpoint: what its steps took more than those without one."""
        alone = statistics.mean(step.training + step.others for step in self.of("alone"))
        steps = [*self.of("copying"), *self.of("beside"), *self.of("completing")]
        everything = sum(step.training + step.others for step in steps)
        return (everything - alone * len(steps)) / len(self.of("copying"))


def _median_wall(steps: list[Seconds]) -> float:
    return statistics.median(step.wall for step in steps)


class Uploader:
    """A process on the other core that uploads as a publisher does, while it is turned on."""

    def __init__(self, core: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._wanted, self.is_on = spawn.Event(), False
        spawn.Process(target=_upload, args=(self._wanted, core), daemon=True).start()

    def turn(self, *, on: bool) -> None:
        self.is_on = on
        if on:
            self._wanted.set()
        else:
            self._wanted.clear()


def _upload(wanted: Any, core: int) -> None:
    os.sched_setaffinity(0, {core})
    store = ObjectStore()
    content = os.urandom(CONTROL_BYTES)
    while True:
        wanted.wait()
        hashlib.sha256(content).digest()
        store.write("s3://diti/control", bytes(content))


def is_publishing() -> bool:
    return any(thread.name == "publish" for thread in threading.enumerate())


def uploading() -> list[psutil.Process]:
    """The process that uploads for the training one, once there is one."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended
            if upload_process.__name__ in child.cmdline():
                found.append(child)
    return found


def make_config(folder: Path, batch: int, steps: int, every: int) -> RunConfig:
    """A run on the published sizes, with its shards and a random backbone on disk."""
    store, size = ObjectStore(), IMAGE_SIZE_PX
    spec = AvatarSpec(split="train")
    faces = [draw_avatar(spec, row) for row in range(64)]
    pictures = [(face.jpeg, face.metadata) for face in faces]
    write_index(store, f"{folder}/shards", [write_shard(store, f"{folder}/shards", 0, pictures)])
    sha256 = save_backbone(
        store,
        f"{folder}/dpm.safetensors",
        state=UNet(UNET).state_dict(),
        unet=UNET,
        schedule=ScheduleConfig(),
        image_size_px=size,
        provenance={},
    )
    counts = {"batch": batch, "total_images": batch * steps, "every": batch * every}
    return parse_run(RUN.format(folder=folder, sha256=sha256, **counts))


def tasks_of(process: str) -> set[int]:
    """Its threads, as the system numbers them."""
    with suppress(FileNotFoundError):
        return {int(entry.name) for entry in Path("/proc", process, "task").iterdir()}
    return set()


def keep_to_one_core(core: int, others: int) -> None:
    """The training thread on one core; all other threads, whenever they come, on another."""
    training = threading.get_native_id()
    os.sched_setaffinity(training, {core})

    def sort() -> None:
        for turn in count():
            # Looking for processes is not cheap.
            processes = ["self", *(str(p.pid) for p in uploading())] if turn % 50 == 0 else ["self"]
            for process in processes:
                for task in tasks_of(process) - {training}:
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(task, {others})
            time.sleep(0.01)

    threading.Thread(target=sort, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time while a checkpoint is published.")
    parser.add_argument("--batch", type=int, default=2, help="images per step (default 2)")
    parser.add_argument("--steps", type=int, default=97, help="of the run (default 97)")
    parser.add_argument("--every", type=int, default=16, help="steps per checkpoint (default 16)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        os.sched_setaffinity(0, {1})  # the server inherits it
        with local_s3(folder / "s3") as server:
            os.environ |= server.environment()
            config = make_config(folder, args.batch, args.steps, args.every)
            found = Steps(Uploader(1), args.every)
            keep_to_one_core(0, 1)
            run(config, local_dir=folder, report=found.note)
    kinds = {
        "alone": "alone",
        "beside": "beside publishing",
        "control": "beside another process that uploads",
        "copying": "that copy",
    }
    for kind, what in kinds.items():
        steps = found.of(kind)
        wall, user, system, _ = (statistics.median(values) for values in zip(*steps, strict=True))
        print(
            f"{len(steps)} steps {what}: median {wall:.3f} s; of the training thread {user:.3f} "
            f"CPU s, {system:.3f} of the system for it"
        )
    for what, ratios in zip(("publishing", "another process"), found.ratios(), strict=True):
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"beside {what} / alone: median {statistics.median(ratios):.3f} of {each}")
    print(f"{found.cpu_per_save():.1f} CPU s per checkpoint")


if __name__ == "__main__":
    main()
