"""`python -m tools.benchmarks.coordinator`: the coordinator under the reports of 1,024 workers.

A bare actor gets the same reports, in rounds of its own: the floor. Two client processes stand for
the workers: each sends the reports of its half, spread evenly over every second. As in training,
nobody waits for an answer, but for every eighth: it is timed.
"""

import argparse
import asyncio
import time
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray

from cluster.coordinator import start_coordinator
from cluster.session import ray_session
from data_pipelines.object_store import ObjectStore
from pretrain.progress import Progress

CLIENTS = 2
TIMED_EVERY = 8


class Client:
    """Reports for many ranks."""

    async def report(self, coordinator: Any, ranks: list[int], seconds: int) -> list[float]:
        """Seconds until a timed report was answered, for each of them."""
        started = time.perf_counter()
        timed = []
        for second in range(seconds):
            for place, rank in enumerate(ranks):
                due = started + second + place / len(ranks)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                sent = time.perf_counter()
                answer = coordinator.report.remote(_progress(rank, second))
                if place % TIMED_EVERY == second % TIMED_EVERY:  # every rank in its turn
                    timed.append(asyncio.ensure_future(_answered(answer, sent)))
        return list(await asyncio.gather(*timed))


async def _answered(answer: Any, sent: float) -> float:
    await answer
    return time.perf_counter() - sent


def _progress(rank: int, step: int) -> Progress:
    return Progress(
        rank, 1, step, 10**6, step * 4096, 0.01, 4096.0, 0.0, 1.0, bad_samples=0, checkpoint_step=0
    )


class Bare:
    """An actor that keeps nothing: what it takes to reach any actor on this machine."""

    def report(self, progress: Progress) -> None:
        pass


def resident_mib() -> float:
    """Memory of the coordinator's process."""
    [process] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ShardCoordinator" in " ".join(process.info["cmdline"] or ())
    ]
    return process.memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of reports to the coordinator.")
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--seconds", type=int, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each of the two, in turns")
    args = parser.parse_args()
    ranks = [list(range(first, args.workers, CLIENTS)) for first in range(CLIENTS)]
    with ray_session(num_cpus=CLIENTS):
        client: Any = ray.remote(num_cpus=1)(Client)
        clients = [client.remote() for _ in range(CLIENTS)]

        def latencies_ms(actor: Any, seconds: int) -> NDArray[np.float64]:
            found = ray.get([
                client.report.remote(actor, mine, seconds)
                for client, mine in zip(clients, ranks, strict=True)
            ])  # fmt: skip
            return 1e3 * np.concatenate(found)

        bare: Any = ray.remote(num_cpus=0)(Bare)
        actors = {
            "coordinator": start_coordinator("benchmark", ObjectStore()),
            "bare actor": bare.options(enable_task_events=False).remote(),
        }
        for actor in actors.values():  # the first reports start the processes
            latencies_ms(actor, seconds=2)
        before = resident_mib()
        rounds: dict[str, list[NDArray[np.float64]]] = {name: [] for name in actors}
        for _ in range(args.rounds):
            for name, actor in actors.items():
                rounds[name].append(latencies_ms(actor, args.seconds))
        after = resident_mib()
    print(f"{args.workers} workers that report every second, {args.rounds} x {args.seconds} s each")
    for name, found in rounds.items():
        late = " ".join(f"{np.percentile(one, 99):.1f}" for one in found)
        everything = np.concatenate(found)
        print(
            f"{name:<12} median {np.median(everything):.1f} ms, 99 % within "
            f"{np.percentile(everything, 99):.1f} ms (rounds: {late}), slowest "
            f"{everything.max():.1f} ms"
        )
    print(f"the coordinator's memory: {after:.0f} MiB ({after - before:+.0f})")


if __name__ == "__main__":
    main()
