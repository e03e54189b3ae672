"""`python -m tests.cluster.joining_driver FOLDER`: one of several drivers of the same work.

Joins the cluster at RAY_ADDRESS. Each item becomes `FOLDER/parts/<item>.txt`; beside them, a file
`FOLDER/begun/<worker> <item>` says who has begun it. The second half waits for a file `FOLDER/go`.
"""

import sys
import time
from pathlib import Path
from typing import Any

import ray

from cluster.coordinator import NamedCoordinator, Work
from cluster.session import ray_session
from cluster.work import run_workers, work_off
from data_pipelines.object_store import ObjectStore

NUM_ITEMS = 80


class Worker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def work(self, name: str, coordinator: NamedCoordinator) -> None:
        def make(item: str) -> None:
            (self.folder / "begun" / f"{name} {item}").touch()
            time.sleep(0.2)
            while int(item) >= NUM_ITEMS // 2 and not (self.folder / "go").exists():
                time.sleep(0.05)
            ObjectStore().write(str(self.folder / "parts" / f"{item}.txt"), b"made")

        work_off(name, coordinator, make)


def main(folder: Path) -> None:
    items = tuple(f"{number:05d}" for number in range(NUM_ITEMS))
    work = Work(items, str(folder / "parts"), ".txt")
    actor: Any = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(Worker)
    with ray_session(num_cpus=1):
        workers = [actor.remote(folder) for _ in range(2)]
        state, _ = run_workers("joint", ObjectStore(), work, workers, lambda state: None)
    assert not state.failures, state


if __name__ == "__main__":
    main(Path(sys.argv[1]))
