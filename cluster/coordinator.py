"""The `ShardCoordinator`: a named Ray actor that coordinates and never touches a pixel.

It holds the shard index, each rank's reported progress and, for batch work, the lease queue.
Nothing in it is the only copy: index and finished parts are in object storage, so when the actor
dies it is started again with the same arguments and reads them anew; by Ray, or for batch work by a
driver (`NamedCoordinator`).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.leases import LeaseQueue, QueueState
from cluster.session import last_line, result_of
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import ShardIndex, read_sets
from pretrain.progress import Progress, Pulse

NAMESPACE = "diti"
FIND_SECONDS = 0.5
"""Between two looks for a coordinator that is gone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """Batch work: every item is leased to workers until it is done.

    With `out_url`, an item becomes one object there, whose existence is the done-marker: it appears
    whole or not at all; what workers hand in for it is not kept. Without it, a restarted
    coordinator hands everything out again.
    """

    items: tuple[str, ...]
    out_url: str | None = None
    suffix: str = ""

    def result_url(self, item: str) -> str:
        assert self.out_url is not None
        return join(self.out_url, f"{item}{self.suffix}")


class ShardCoordinator:
    """See the module. Created by `start_coordinator`; called through its Ray handle."""

    def __init__(
        self, store: ObjectStore, folders: Sequence[str] = (), work: Work | None = None
    ) -> None:
        self._index = read_sets(store, folders) if folders else None
        self._progress: dict[int, Progress] = {}
        self._pulses: dict[int, tuple[Pulse, float]] = {}
        self._queue = LeaseQueue([] if work is None else _unfinished(store, work))
        self._keeps_results = work is not None and work.out_url is None
        self._results: dict[str, Any] = {}
        self._stop_asked = False
        self._failures: list[str] = []

    def index(self) -> ShardIndex:
        """The shard index, so that ranks need not read it from storage one by one."""
        assert self._index is not None
        return self._index

    def begin(self) -> None:
        """A group of workers begins; what was heard of ranks of an earlier one says no more."""
        self._progress.clear()
        self._pulses.clear()

    def report(self, progress: Progress) -> None:
        """A rank's newest progress."""
        self._progress[progress.rank] = progress

    def progress(self) -> dict[int, Progress]:
        """The newest progress of every rank that has reported."""
        return dict(self._progress)

    def beat(self, pulse: Pulse) -> None:
        """A rank's sign of life."""
        self._pulses[pulse.rank] = (pulse, time.monotonic())

    def pulses(self) -> list[tuple[Pulse, float]]:
        """The newest pulse of every rank, with its age in seconds."""
        now = time.monotonic()
        return [(pulse, now - heard) for pulse, heard in self._pulses.values()]

    def ask_to_stop(self) -> None:
        """The run is to publish a checkpoint and end."""
        self._stop_asked = True

    def stop_asked(self) -> bool:
        return self._stop_asked

    def failed(self, why: str) -> None:
        """Workers have failed and are started again."""
        self._failures.append(why)

    def failures(self) -> list[str]:
        """Each failure so far, oldest first."""
        return list(self._failures)

    def lease(self, worker: str) -> str | None:
        """The next item to work on, or None when nothing is waiting."""
        return self._queue.lease(worker, time.monotonic())

    def renew(self, worker: str, item: str) -> bool:
        return self._queue.renew(worker, item, time.monotonic())

    def finish(self, item: str, result: Any = None) -> None:
        self._queue.finish(item)
        if self._keeps_results:
            self._results[item] = result

    def give_back(self, worker: str, item: str, reason: str) -> None:
        self._queue.give_back(worker, item, reason)

    def release(self, worker: str) -> None:
        self._queue.release(worker)

    def retry_failed(self) -> None:
        self._queue.retry_failed()

    def work_state(self) -> QueueState:
        return self._queue.state(time.monotonic())

    def outcome(self) -> tuple[QueueState, dict[str, Any]]:
        """The state of the queue, and what workers handed in for each finished item."""
        return self.work_state(), self._results


def start_coordinator(
    name: str, store: ObjectStore, folders: Sequence[str] = (), work: Work | None = None
) -> Any:
    """Start the named actor, or the handle of the one that already runs.

    Ray restarts it, but for one with work: of that it would have lost the items, because it does
    not keep large arguments (https://github.com/ray-project/ray/issues/53727). A `NamedCoordinator`
    starts it again.
    """
    actor = ray.remote(num_cpus=0, max_task_retries=-1)(ShardCoordinator)
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        max_restarts=-1 if work is None else 0,
        enable_task_events=False,  # a third of a report's cost, and nobody looks reports up
    ).remote(store, folders, work)


class NamedCoordinator:
    """The coordinator of a name, for those who call it: the actor may be another one each time.

    An actor ends with the driver that started it. Whichever driver finds that it is gone starts it
    again, from what is in object storage, and the calls of all others wait for that.

    Args:
        start: starts the actor where there is none; without it, calls wait until someone has.
    """

    def __init__(self, name: str, start: Callable[[], Any] | None = None) -> None:
        self._name = name
        self._start = start
        self._actor: Any = None
        self._is_ours = False

    def ask(self, call: Callable[[Any], Any]) -> Any:
        """What the actor answers to a call such as `lambda actor: actor.lease.remote("me")`.

        Raises:
            RayActorError: the actor cannot be built: its storage does not answer, for one.
        """
        while True:
            actor = self._actor
            if actor is None:
                actor = self._actor = self._find()
            try:
                return result_of(call(actor))
            except RayActorError as error:
                if error.actor_init_failed:
                    raise
                if self._is_ours:
                    _log.warning("coordinator %s died: %s", self._name, last_line(error))
                self._actor = None
                time.sleep(FIND_SECONDS)

    def end(self) -> None:
        """End the actor if it was started here; one that others have started, they still need."""
        if self._is_ours and self._actor is not None:
            ray.kill(self._actor)

    def _find(self) -> Any:
        while True:
            try:
                found = ray.get_actor(self._name, namespace=NAMESPACE)
            except ValueError:
                if self._start is not None:
                    self._is_ours = True
                    return self._start()
                time.sleep(FIND_SECONDS)
            else:
                self._is_ours = False
                return found


def _unfinished(store: ObjectStore, work: Work) -> list[str]:
    if work.out_url is None:
        return list(work.items)
    done = {info.url for info in store.list(work.out_url)}
    return [item for item in work.items if work.result_url(item) not in done]
