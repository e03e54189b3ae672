"""`python -m tools.benchmarks.coordinator`: the coordinator under the reports of 1,024 workers.

Two client processes stand for the workers: each sends the reports of its half, spread evenly over
every second. As in training, nobody waits for an answer, but for every eighth: it is timed.
"""

import argparse
import asyncio
import time
from typing import Any

import numpy as np
import psutil
import ray

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
    parser.add_argument("--seconds", type=int, default=30)
    args = parser.parse_args()
    with ray_session(num_cpus=CLIENTS):
        coordinator = start_coordinator("benchmark", ObjectStore())
        ray.get(coordinator.progress.remote())
        before = resident_mib()
        actor: Any = ray.remote(num_cpus=1)(Client)
        clients = [actor.remote() for _ in range(CLIENTS)]
        ranks = [list(range(first, args.workers, CLIENTS)) for first in range(CLIENTS)]
        for seconds in (2, args.seconds):  # the first ones start the processes
            found = ray.get([
                client.report.remote(coordinator, mine, seconds)
                for client, mine in zip(clients, ranks, strict=True)
            ])  # fmt: skip
        latencies = 1e3 * np.concatenate(found)
        middle, late = np.percentile(latencies, [50, 99])
        after = resident_mib()
        print(
            f"{args.workers} workers, {args.workers * args.seconds} reports in {args.seconds} s, "
            f"{len(latencies)} timed: median {middle:.1f} ms, 99 % within {late:.1f} ms, slowest "
            f"{latencies.max():.1f} ms; memory {after:.0f} MiB ({after - before:+.0f})"
        )


if __name__ == "__main__":
    main()
