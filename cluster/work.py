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


def wait_for(
    running: Sequence[Any], coordinator: Any, on_progress: Callable[[QueueState], None]
) -> QueueState:
    """Wait for the workers' `work_off`, telling the state of the queue about every second."""
    left = list(running)
    while left:
        finished, left = ray.wait(left, num_returns=len(left), timeout=1.0)
        result_of(finished)
        on_progress(result_of(coordinator.work_state.remote()))
    return result_of(coordinator.work_state.remote())


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
