"""The `ShardCoordinator`: a named Ray actor that coordinates and never touches a pixel.

It holds the shard index, each rank's reported progress and, for batch work, the lease queue.
Nothing in it is the only copy: index and finished parts are in object storage, so when the actor
dies Ray starts it again with the same arguments and it reads them anew.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.leases import LeaseQueue, QueueState
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import ShardIndex, read_index
from pretrain.train import Progress

NAMESPACE = "diti"


@dataclass(frozen=True, slots=True)
class Work:
    """Batch work over the shards of an index: each shard becomes one object below `out_url`.

    The object's existence is the done-marker: it appears whole or not at all.
    """

    out_url: str
    suffix: str

    def result_url(self, stem: str) -> str:
        return join(self.out_url, f"{stem}{self.suffix}")


class ShardCoordinator:
    """See the module. Created by `start_coordinator`; called through its Ray handle."""

    def __init__(self, store: ObjectStore, shards_url: str, work: Work | None = None) -> None:
        self._index = read_index(store, shards_url)
        self._progress: dict[int, Progress] = {}
        self._queue = LeaseQueue([])
        if work is not None:
            self._queue = LeaseQueue(_unfinished(store, self._index, work))

    def index(self) -> ShardIndex:
        """The shard index, so that ranks need not read it from storage one by one."""
        return self._index

    def report(self, progress: Progress) -> None:
        """A rank's newest progress."""
        self._progress[progress.rank] = progress

    def progress(self) -> dict[int, Progress]:
        """The newest progress of every rank that has reported."""
        return dict(self._progress)

    def lease(self, worker: str) -> str | None:
        """The stem of the next shard to work on, or None when nothing is waiting."""
        return self._queue.lease(worker, time.monotonic())

    def renew(self, worker: str, stem: str) -> bool:
        return self._queue.renew(worker, stem, time.monotonic())

    def finish(self, stem: str) -> None:
        self._queue.finish(stem)

    def give_back(self, worker: str, stem: str, reason: str) -> None:
        self._queue.give_back(worker, stem, reason)

    def work_state(self) -> QueueState:
        return self._queue.state(time.monotonic())


def start_coordinator(
    name: str, store: ObjectStore, shards_url: str, work: Work | None = None
) -> Any:
    """Start the named actor, or the handle of the one that already runs."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ShardCoordinator)
    return actor.options(name=name, namespace=NAMESPACE, get_if_exists=True).remote(
        store, shards_url, work
    )


def _unfinished(store: ObjectStore, index: ShardIndex, work: Work) -> list[str]:
    done = {info.url for info in store.list(work.out_url)}
    stems = [shard.name.removesuffix(".tar") for shard in index.shards]
    return [stem for stem in stems if work.result_url(stem) not in done]
