"""One task on every tar of a folder, on Ray actors that lease tars from the coordinator."""

import mmap
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.coordinator import Work, start_coordinator
from cluster.leases import QueueState
from cluster.session import last_line, ray_session
from cluster.work import run_workers, work_off
from data_pipelines.object_store import ObjectStore, StoreError
from data_pipelines.tar_members import Tar

Task = Callable[[ObjectStore, str, str], Any]
"""(store, folder URL, tar's name) to a result that Ray can send."""


class TarWorkFailedError(RuntimeError):
    """Work on a shard set stopped before its end; what is done is kept."""


def on_every_tar(
    store: ObjectStore,
    url: str,
    names: Sequence[str],
    num_workers: int,
    task: Task,
    on_progress: Callable[[QueueState], None],
) -> dict[str, Any]:
    """The task's result for every tar below `url`, by name.

    Raises:
        TarWorkFailedError: the store or Ray failed.
    """
    with ray_session(num_cpus=num_workers):
        coordinator = start_coordinator(
            f"tars-{uuid.uuid4().hex[:8]}", store, work=Work(tuple(names))
        )
        actor: Any = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(_Worker)
        workers = [actor.remote(store, url, task) for _ in range(min(num_workers, len(names)))]
        try:
            state, results = run_workers(workers, coordinator, on_progress)
        except (StoreError, RayError) as error:
            raise TarWorkFailedError(
                f"work on {url} stopped: {last_line(error)}. What is done is kept; run the same "
                f"command again to go on."
            ) from error
    if state.failures:
        name, reason = next(iter(sorted(state.failures.items())))
        raise TarWorkFailedError(
            f"{len(state.failures)} of {len(names)} tars below {url} could not be read, first "
            f"{name}: {reason}. What is done is kept; run the same command again to go on."
        )
    return results


class _Worker:
    def __init__(self, store: ObjectStore, url: str, task: Task) -> None:
        self._store, self._url, self._task = store, url, task

    def work(self, name: str, coordinator: Any) -> None:
        work_off(name, coordinator, lambda item: self._task(self._store, self._url, item))


@contextmanager
def mapped(store: ObjectStore, url: str) -> Iterator[Tar]:
    """A tar's bytes, however large: mapped from a local copy, not held in memory."""
    with store.local_copy(url) as path, path.open("rb") as file:
        if not path.stat().st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            yield tar
