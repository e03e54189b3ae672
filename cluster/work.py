"""Batch work on Ray: actors lease items from the coordinator until nothing is left."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from cluster.leases import LEASE_SECONDS, QueueState
from cluster.session import result_of
from data_pipelines.object_store import StoreError

IDLE_SECONDS = 0.5


def work_off(worker: str, coordinator: Any, do: Callable[[str], Any]) -> None:
    """Lease items and do them, until all of them are done or failed; runs inside an actor.

    Args:
        do: one item; what it returns is kept by the coordinator. A ValueError or StoreError out of
            it gives the item back, to be tried again or named.
    """
    while True:
        item = result_of(coordinator.lease.remote(worker))
        if item is None:
            if result_of(coordinator.work_state.remote()).is_finished:
                return
            time.sleep(IDLE_SECONDS)  # others still hold leases that may come back
            continue
        try:
            with _lease_kept(coordinator, worker, item):
                result = do(item)
        except (ValueError, StoreError) as error:
            result_of(coordinator.give_back.remote(worker, item, str(error)))
        else:
            result_of(coordinator.finish.remote(item, result))


def run_workers(
    workers: Sequence[Any], coordinator: Any, on_progress: Callable[[QueueState], None]
) -> tuple[QueueState, dict[str, Any]]:
    """Have actors work until the queue is finished, then end them and the coordinator.

    Args:
        workers: handles of actors whose `work(name, coordinator)` calls `work_off`.
        on_progress: told the state of the queue about every second.

    Returns:
        The last state, and what the workers returned for each finished item.
    """
    try:
        running = [
            worker.work.remote(f"worker-{number}", coordinator)
            for number, worker in enumerate(workers)
        ]
        while running:
            finished, running = ray.wait(running, num_returns=len(running), timeout=1.0)
            result_of(finished)
            on_progress(result_of(coordinator.work_state.remote()))
        state = result_of(coordinator.work_state.remote())
        return state, result_of(coordinator.results.remote())
    finally:
        for actor in (*workers, coordinator):
            ray.kill(actor)


@contextmanager
def _lease_kept(coordinator: Any, worker: str, item: str) -> Iterator[None]:
    """Renew a lease from a thread of its own while the block runs."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_SECONDS / 3):
            coordinator.renew.remote(worker, item)

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        done.set()
