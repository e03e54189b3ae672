"""`python -m tools.benchmarks.leases`: the lease queue with 585,000 shards and 1,024 workers.

First the queue alone, all of whose items are handed out and finished. Then the coordinator that
holds it, and in turns with it a bare actor that gives the same answers with nothing behind: what it
takes to ask any actor on this machine. Two client processes stand for the workers, at two paces:
all of them together finish `--pace` shards a second, each renewing its lease as it would during a
shard of 100 s; or none of them works, and each asks again as soon as it is answered.
"""

import argparse
import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import ray

from cluster.coordinator import Work, start_coordinator
from cluster.leases import LeaseQueue
from cluster.session import ray_session, result_of
from data_pipelines.object_store import ObjectStore

CLIENTS = 2
RENEWALS = 4
"""Of a lease during a shard of 100 s."""


@dataclass(frozen=True, slots=True)
class Round:
    """What the clients saw of one actor for some seconds."""

    lease_seconds: list[float]
    """Until a lease was answered, for each."""
    calls: int
    """Leases, renewals and finishes that were answered."""


class Client:
    """Many workers in one process."""

    async def work(
        self, actor: Any, workers: list[str], seconds: float, seconds_per_shard: float
    ) -> Round:
        """Each worker is met somewhere in its first shard, and ends when the time is over."""
        self._leases: list[float] = []
        self._calls = 0
        first = await asyncio.gather(*(actor.lease.remote(worker) for worker in workers))
        self._end = time.perf_counter() + seconds
        held = await asyncio.gather(*(
            self._shards(actor, worker, item, seconds_per_shard, place / len(workers))
            for place, (worker, item) in enumerate(zip(workers, first, strict=True))
        ))  # fmt: skip
        await asyncio.gather(*(actor.finish.remote(item) for item in held))
        return Round(self._leases, self._calls)

    async def _shards(
        self, actor: Any, worker: str, item: str, seconds_per_shard: float, left: float
    ) -> str:
        """Shards one after the other, `left` of the first one; returns the item in hand."""
        while True:
            renewals = round(RENEWALS * left) if seconds_per_shard else 0
            for renewal in range(renewals + 1):
                if await self._slept(left * seconds_per_shard / (renewals + 1)):
                    return item
                if renewal < renewals:
                    await actor.renew.remote(worker, item)
                    self._calls += 1
            left = 1.0
            await actor.finish.remote(item)
            asked = time.perf_counter()
            item = await actor.lease.remote(worker)
            self._leases.append(time.perf_counter() - asked)
            self._calls += 2

    async def _slept(self, seconds: float) -> bool:
        """Work; True when the time is over, which ends it."""
        left = self._end - time.perf_counter()
        await asyncio.sleep(max(0.0, min(seconds, left)))
        return seconds >= left


class BareQueue:
    """An actor that keeps nothing."""

    def lease(self, worker: str) -> str:
        return "000000"

    def renew(self, worker: str, item: str) -> bool:
        return True

    def finish(self, item: str) -> None:
        pass


PROCESSES = {"coordinator": "ShardCoordinator", "bare actor": "BareQueue"}


def names(count: int) -> tuple[str, ...]:
    """Of LAION's shards: five digits, then six."""
    return tuple(f"{number:05d}" for number in range(count))


def microseconds_per_item(items: tuple[str, ...], num_workers: int) -> float:
    """Of a lease and a finish, while that many leases are out; hands out all items."""
    queue = LeaseQueue(items)
    out = deque(queue.lease(f"worker-{number}", 0.0) for number in range(num_workers))
    finished = []
    start = time.perf_counter()
    while (item := out.popleft()) is not None:
        queue.finish(item)
        finished.append(item)
        out.append(queue.lease("worker", 0.0))
    seconds = time.perf_counter() - start
    assert tuple(finished) == items, "each of them once"
    assert queue.state(0.0).is_finished
    return 1e6 * seconds / len(items)


def microseconds_per_renewal(items: tuple[str, ...], num_workers: int) -> float:
    """While that many leases are out."""
    queue = LeaseQueue(items)
    held = [queue.lease("worker", 0.0) for _ in range(num_workers)]
    start = time.perf_counter()
    for second in range(100):  # so that they never expire
        assert all(item is not None and queue.renew("worker", item, second / 10) for item in held)
    return 1e6 * (time.perf_counter() - start) / (100 * num_workers)


@dataclass(slots=True)
class Seen:
    """All rounds of one actor at one pace."""

    lease_ms: list[float] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the actor's process."""

    def row(self) -> str:
        median, late = np.percentile(self.lease_ms, [50, 99])
        return (
            f"{median:10.1f}{late:10.1f}{self.calls / self.seconds:12.0f}"
            f"{1e6 * self.cpu_seconds / self.calls:18.0f}"
        )


def measure(actors: dict[str, Any], args: argparse.Namespace) -> dict[tuple[str, str], Seen]:
    """By pace and actor, in rounds that take turns."""
    paces = {f"{args.pace:g} shards/s": args.workers / args.pace, "saturated": 0.0}
    workers = [
        [f"worker-{number}" for number in range(first, args.workers, CLIENTS)]
        for first in range(CLIENTS)
    ]
    client: Any = ray.remote(num_cpus=1)(Client)
    clients = [client.remote() for _ in range(CLIENTS)]
    seen = {(pace, name): Seen() for pace in paces for name in actors}
    for turn in range(args.rounds + 1):
        for (pace, name), found in seen.items():
            seconds = args.seconds if turn else 1.0  # the first turn only warms up
            before = _cpu_seconds(name)
            rounds: list[Round] = ray.get([
                client.work.remote(actors[name], mine, seconds, paces[pace])
                for client, mine in zip(clients, workers, strict=True)
            ])  # fmt: skip
            if turn:
                found.lease_ms += [1e3 * each for one in rounds for each in one.lease_seconds]
                found.calls += sum(one.calls for one in rounds)
                found.seconds += seconds
                found.cpu_seconds += _cpu_seconds(name) - before
    return seen


def _process(name: str) -> psutil.Process:
    [process] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f":{PROCESSES[name]}" in " ".join(process.info["cmdline"] or ())
    ]
    return process


def _cpu_seconds(name: str) -> float:
    times = _process(name).cpu_times()
    return times.user + times.system


def _resident_mib(name: str) -> float:
    return _process(name).memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the lease queue.")
    parser.add_argument("--items", type=int, default=585_000)
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--pace", type=float, default=100.0, help="shards a second, of all workers")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each actor and pace, in turns")
    args = parser.parse_args()
    items = names(args.items)
    print(
        f"the queue alone, {args.workers} leases out: {len(items)} items handed out and finished, "
        f"each once, in {microseconds_per_item(items, args.workers):.1f} us; a renewal "
        f"{microseconds_per_renewal(items, args.workers):.1f} us"
    )
    with ray_session(num_cpus=CLIENTS):
        start = time.perf_counter()
        coordinator = start_coordinator("leases", ObjectStore(), work=Work(items))
        assert result_of(coordinator.work_state.remote()).waiting == len(items)
        print(f"the coordinator answers {time.perf_counter() - start:.1f} s after its start")
        bare: Any = ray.remote(num_cpus=0)(BareQueue)
        bare_actor = bare.options(enable_task_events=False).remote()
        result_of(bare_actor.lease.remote("worker"))
        started = _resident_mib("coordinator")
        seen = measure({"coordinator": coordinator, "bare actor": bare_actor}, args)
        print(
            f"its memory: {started:.0f} MiB, in the end {_resident_mib('coordinator'):.0f}; the "
            f"bare actor's {_resident_mib('bare actor'):.0f}"
        )
    print(
        f"{'lease: ':>25}{'median ms':>10}{'99 % ms':>10}{'all calls/s':>12}{'CPU us per call':>18}"
    )
    for (pace, name), found in seen.items():
        print(f"{pace:<13}{name:<12}{found.row()}")


if __name__ == "__main__":
    main()
