"""Batch work on Ray: actors lease items from a coordinator until nothing is left."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.coordinator import NamedCoordinator, Work, start_coordinator
from cluster.leases import LEASE_SECONDS, QueueState
from cluster.session import last_line
from data_pipelines.object_store import ObjectStore, StoreError, StoreUnavailableError

POLL_SECONDS = 2.0
"""A question to the coordinator costs milliseconds on both sides, on the cores that work."""
SHORT_POLL_SECONDS = 0.25
"""At the beginning and the end, when no item is at work or none waits."""
IDLE_SECONDS = (0.5, 8.0)
"""A worker that gets nothing asks again after the first of these, then ever later, up to the
second: a thousand idle workers must not keep the coordinator from the others."""

_log = logging.getLogger(__name__)


def work_off(
    worker: str, coordinator: NamedCoordinator, do: Callable[[str], Any], *, lanes: int = 1
) -> None:
    """Lease items and do them until this process is ended; runs inside an actor.

    It does not return when nothing is left, because that may change: a coordinator that is
    restarted may have to hand out items again. `run_workers` knows the end.

    Args:
        worker: a name no other process has; what it still holds was left by an earlier life of
            this one, and is given back.
        do: one item; what it returns is kept by the coordinator. A ValueError or StoreError out of
            it gives the item back, to be tried again or named; any other ends the work, and so
            does a store that does not answer.
        lanes: how many items are in hand at a time, each in a thread of its own.
    """
    coordinator.ask(lambda actor: actor.release.remote(worker))
    pool = ThreadPoolExecutor(lanes, "lane")
    running = [pool.submit(_work_lane, worker, coordinator, do) for _ in range(lanes)]
    ended, _ = wait(running, return_when=FIRST_EXCEPTION)
    for lane in ended:
        lane.result()


def _work_lane(worker: str, coordinator: NamedCoordinator, do: Callable[[str], Any]) -> None:
    shortest, longest = IDLE_SECONDS
    idle = shortest
    while True:
        item = coordinator.ask(lambda actor: actor.lease.remote(worker))
        if item is None:
            time.sleep(idle)
            idle = min(2 * idle, longest)
            continue
        idle = shortest
        _do_item(worker, coordinator, do, item)


def _do_item(
    worker: str, coordinator: NamedCoordinator, do: Callable[[str], Any], item: str
) -> None:
    try:
        with _lease_kept(coordinator, worker, item):
            result = do(item)
    except StoreUnavailableError:
        raise  # no fault of this item, and the next ones would have to wait for it as long
    except (ValueError, StoreError) as error:
        reason = str(error)
        coordinator.ask(lambda actor: actor.give_back.remote(worker, item, reason))
    else:
        coordinator.ask(lambda actor: actor.finish.remote(item, result))


def run_workers(
    name: str,
    store: ObjectStore,
    work: Work,
    workers: Sequence[Any],
    on_progress: Callable[[QueueState], None],
    folders: Sequence[str] = (),
) -> tuple[QueueState, dict[str, Any]]:
    """Have actors work until the queue of a name is finished, then end them.

    Several drivers of one Ray cluster may do the same work under one name, if it has an `out_url`;
    each adds its workers. The coordinator belongs to the driver that started it and ends with that
    one, however it ends: nothing stays behind that could be out of date. Another driver that still
    has work to do then starts it again, and it finds in storage what is finished. Only what workers
    have in hand at that moment may be done twice; what the workers of another driver held that was
    killed is handed out anew when their leases end. A driver that joins has all that failed before
    tried again.

    Workers that have not started yet, because the cluster has no room for them, are not waited
    for. One that dies more often than Ray restarts it is done without, with a warning.

    Args:
        workers: handles of actors whose `work(name, coordinator)` calls `work_off`; the names are
            unlike those of any other driver.
        on_progress: told the state of the queue every other second, more often at either end.
        folders: of the shard sets whose index the coordinator holds for the workers.

    Returns:
        The last state, and what the workers returned for each finished item; nothing for work that
        has an `out_url`.

    Raises:
        RayActorError: every worker has died for good and work is left, or one could not be built,
            or the coordinator could not.
        Exception: whatever else came out of a worker.
    """
    coordinator = NamedCoordinator(name, partial(start_coordinator, name, store, folders, work))
    driver = uuid.uuid4().hex[:8]
    running = {
        worker.work.remote(f"{driver}-{number}", NamedCoordinator(name)): f"{driver}-{number}"
        for number, worker in enumerate(workers)
    }
    try:
        coordinator.ask(lambda actor: actor.retry_failed.remote())
        return _until_finished(coordinator, running, on_progress)
    finally:
        for reference in running:  # or Ray says of each that it was killed and will be tried again
            ray.cancel(reference, recursive=False)
        for actor in workers:
            ray.kill(actor)
        coordinator.end()


def _until_finished(
    coordinator: NamedCoordinator,
    running: dict[Any, str],
    on_progress: Callable[[QueueState], None],
) -> tuple[QueueState, dict[str, Any]]:
    """Polls the queue and the workers' `work` calls; takes out of `running` which have ended."""
    deaths: list[RayActorError] = []
    while True:
        state = coordinator.ask(lambda actor: actor.work_state.remote())
        on_progress(state)
        if state.is_finished:
            state, results = coordinator.ask(lambda actor: actor.outcome.remote())
            if state.is_finished:  # still: the coordinator may have been restarted in between
                return state, results
        if not running:
            raise deaths[-1]
        pause = POLL_SECONDS if state.waiting and state.leased else SHORT_POLL_SECONDS
        ended, _ = ray.wait(list(running), num_returns=len(running), timeout=pause)
        for reference in ended:
            worker = running.pop(reference)
            deaths.append(_death_of(reference))
            _log.warning(
                "worker %s died for good: %s; workers left: %d",
                *(worker, last_line(deaths[-1]), len(running)),
            )
            coordinator.ask(partial(_release, worker))


def _release(worker: str, actor: Any) -> Any:
    return actor.release.remote(worker)


def _death_of(ended: Any) -> RayActorError:
    """Why a worker's process is gone for good; raises what came out of one in any other way."""
    try:
        ray.get(ended)
    except RayTaskError as error:  # first: Ray makes it an instance of its cause's class as well
        raise error.cause from error
    except RayActorError as error:
        if error.actor_init_failed:
            raise
        return error
    raise AssertionError("work_off has returned")


@contextmanager
def _lease_kept(coordinator: NamedCoordinator, worker: str, item: str) -> Iterator[None]:
    """Renew a lease from a thread of its own while the block runs."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_SECONDS / 3):
            coordinator.ask(lambda actor: actor.renew.remote(worker, item))

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        done.set()
