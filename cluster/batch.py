"""A task on each of many files of a folder, on Ray actors that lease them from the coordinator."""

import hashlib
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.coordinator import NamedCoordinator, Work
from cluster.leases import QueueState
from cluster.session import last_line, ray_session
from cluster.work import run_workers, work_off
from data_pipelines.object_store import ObjectStore, StoreError

Task = Callable[[ObjectStore, str, str], Any]
"""(store, folder URL, name of a file) to a result that Ray can send."""


class BatchFailedError(RuntimeError):
    """Work on a folder stopped before its end; what is done is kept."""


def on_each(
    store: ObjectStore,
    url: str,
    names: Sequence[str],
    num_workers: int,
    task: Task,
    on_progress: Callable[[QueueState], None],
    marks: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The task's result for each file below `url`, by name.

    Args:
        marks: a folder's URL and an ending, where the task leaves an object `NAME + ending` as the
            last thing it does. Names that have one are done; then nothing is returned.

    Raises:
        BatchFailedError: the store or Ray failed.
    """
    work = Work(tuple(names), *(marks or ()))
    with ray_session(num_cpus=num_workers):
        actor: Any = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(_Worker)
        workers = [actor.remote(store, url, task) for _ in range(min(num_workers, len(names)))]
        try:
            state, results = run_workers(_name_of(work), store, work, workers, on_progress)
        except (StoreError, RayError) as error:
            raise BatchFailedError(
                f"work on {url} stopped: {last_line(error)}. What is done is kept; run the same "
                f"command again to go on."
            ) from error
    if state.failures:
        name, reason = next(iter(sorted(state.failures.items())))
        raise BatchFailedError(
            f"{len(state.failures)} of {len(names)} files below {url} could not be read, first "
            f"{name}: {reason}. What is done is kept; run the same command again to go on."
        )
    return results


def _name_of(work: Work) -> str:
    """Several drivers share work that is marked; results are of one driver."""
    if work.out_url is None:
        return f"batch-{uuid.uuid4().hex[:8]}"
    return f"batch-{hashlib.sha256(f'{work.out_url}{work.suffix}'.encode()).hexdigest()[:16]}"


class _Worker:
    def __init__(self, store: ObjectStore, url: str, task: Task) -> None:
        self._store, self._url, self._task = store, url, task

    def work(self, name: str, coordinator: NamedCoordinator) -> None:
        work_off(name, coordinator, lambda item: self._task(self._store, self._url, item))
