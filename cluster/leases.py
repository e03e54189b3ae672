"""A work queue with leases: pure bookkeeping, the clock is an argument.

An item is waiting, leased, done or failed. A lease that is not renewed in time goes back to the
queue; an item that was handed out too often is failed and named, not tried for ever. What a call
costs does not grow with the number of items.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

LEASE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class QueueState:
    """Counts of items by state, and why the failed ones failed."""

    waiting: int
    leased: int
    done: int
    failures: dict[str, str]

    @property
    def is_finished(self) -> bool:
        return not self.waiting and not self.leased


@dataclass(slots=True)
class _Lease:
    worker: str
    expires: float


class LeaseQueue:
    """Items by name; times are seconds of any one clock that never goes back.

    Args:
        lease_seconds: a lease lasts this long after it was given or renewed.
        max_attempts: how often an item is handed out before it counts as failed.
    """

    def __init__(
        self, items: Iterable[str], *, lease_seconds: float = LEASE_SECONDS, max_attempts: int = 3
    ) -> None:
        # A plain dict keeps an order too, but finding its first key walks over every key that was
        # taken out before it.
        self._waiting = OrderedDict.fromkeys(items)
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        """The next one to expire comes first: all last equally long, and a renewed one moves."""
        self._attempts: dict[str, int] = {}
        self._failures: dict[str, str] = {}
        self._done: set[str] = set()
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts

    def lease(self, worker: str, now: float) -> str | None:
        """The next item for a worker, or None when nothing is waiting right now."""
        self._expire(now)
        if not self._waiting:
            return None
        item, _ = self._waiting.popitem(last=False)
        self._attempts[item] = self._attempts.get(item, 0) + 1
        self._leases[item] = _Lease(worker, now + self._lease_seconds)
        return item

    def renew(self, worker: str, item: str, now: float) -> bool:
        """Prolong a lease; False when the worker no longer holds it and must drop the item."""
        self._expire(now)
        lease = self._leases.get(item)
        if lease is None or lease.worker != worker:
            return False
        lease.expires = now + self._lease_seconds
        self._leases.move_to_end(item)
        return True

    def finish(self, item: str) -> None:
        """An item's result exists. Whoever made it, it need not be made again."""
        self._waiting.pop(item, None)
        self._leases.pop(item, None)
        self._failures.pop(item, None)
        self._attempts.pop(item, None)
        self._done.add(item)

    def give_back(self, worker: str, item: str, reason: str) -> None:
        """A worker could not do an item; it is tried again until the attempts are used up."""
        lease = self._leases.get(item)
        if lease is not None and lease.worker == worker:
            self._return(item, reason)

    def release(self, worker: str) -> None:
        """A worker's process has died: what it held is tried again, without waiting for the time.

        It goes to the end of the queue, as all that comes back: what has killed one worker may kill
        the next, and must not do so again before all else is done. Looks at every lease that is
        out, but happens once in a process's life.
        """
        for item in [item for item, lease in self._leases.items() if lease.worker == worker]:
            self._return(item, f"worker {worker} died")

    def retry_failed(self) -> None:
        """What has failed is tried again, with all its attempts before it."""
        for item in self._failures:
            del self._attempts[item]
            self._waiting[item] = None
        self._failures.clear()

    def state(self, now: float) -> QueueState:
        self._expire(now)
        return QueueState(
            len(self._waiting), len(self._leases), len(self._done), dict(self._failures)
        )

    def _expire(self, now: float) -> None:
        while self._leases:
            item, lease = next(iter(self._leases.items()))
            if lease.expires > now:
                return
            self._return(item, f"worker {lease.worker} stopped renewing its lease")

    def _return(self, item: str, reason: str) -> None:
        del self._leases[item]
        if self._attempts[item] >= self._max_attempts:
            self._failures[item] = f"{reason} (attempt {self._attempts[item]})"
        else:
            self._waiting[item] = None
