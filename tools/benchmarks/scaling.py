"""`python -m tools.benchmarks.scaling`: two ranks of one run against two runs side by side.

Both pairs take the same steps of the CelebA-64 model on random images, in turns, so that whatever
else the machine does falls on both. What the pair of ranks lacks of the other's images per second
is what ZeRO and its collectives take.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Literal

from configs.schema import EngineConfig
from tools.benchmarks.ranks import Steps, become_rank, free_port, plan_of
from tools.benchmarks.train_step import make_model

Pair = Literal["two ranks", "two runs"]
PAIRS: tuple[Pair, ...] = ("two ranks", "two runs")


@dataclass(frozen=True, slots=True)
class Report:
    """Images per second of each pair, round by round, by the clock on the wall."""

    micro_batch: int
    steps: int
    images_per_second: dict[Pair, list[float]]

    @property
    def ratio(self) -> float:
        """Of the medians: two ranks over two runs."""
        ranks, runs = (statistics.median(self.images_per_second[pair]) for pair in PAIRS)
        return ranks / runs


def measure(micro_batch: int, steps: int, rounds: int) -> Report:
    """Rounds of so many steps, the pairs in turns."""
    pipes: dict[Pair, list[Connection]] = {pair: _start(pair, micro_batch) for pair in PAIRS}
    found: dict[Pair, list[float]] = {pair: [] for pair in PAIRS}
    for _ in range(rounds):
        for pair, ends in pipes.items():
            start = time.perf_counter()
            for end in ends:
                end.send(steps)
            for end in ends:
                end.recv()
            found[pair].append(2 * micro_batch * steps / (time.perf_counter() - start))
    for ends in pipes.values():
        for end in ends:
            end.send(0)
    return Report(micro_batch, steps, found)


def _start(pair: Pair, micro_batch: int) -> list[Connection]:
    spawn = multiprocessing.get_context("spawn")
    world_size = 2 if pair == "two ranks" else 1
    ports = [free_port()] * 2 if pair == "two ranks" else [free_port(), free_port()]
    ends = []
    for number, port in enumerate(ports):
        near, far = spawn.Pipe()
        rank = number if world_size == 2 else 0
        arguments = (rank, world_size, port, micro_batch, far)
        spawn.Process(target=_work, args=arguments, daemon=True).start()
        far.close()
        ends.append(near)
    for end in ends:
        end.recv()  # ready
    return ends


def _work(rank: int, world_size: int, port: int, micro_batch: int, pipe: Connection) -> None:
    become_rank(rank, world_size, port)
    steps = Steps(make_model(), EngineConfig(zero_stage=2), plan_of(micro_batch, world_size))
    steps.take(1)  # warms up
    pipe.send("ready")
    while number := pipe.recv():
        steps.take(number)
        pipe.send("done")


def main() -> None:
    parser = argparse.ArgumentParser(description="Two ranks of one run against two runs.")
    parser.add_argument("--micro-batch", type=int, default=8, help="images a rank (default 8)")
    parser.add_argument("--steps", type=int, default=2, help="a round (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of each pair (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    report = measure(args.micro_batch, args.steps, args.rounds)
    if args.json:
        print(json.dumps(asdict(report) | {"ratio": report.ratio}, indent=1))
        return
    for pair, speeds in report.images_per_second.items():
        print(f"{pair}: {', '.join(f'{speed:.3f}' for speed in speeds)} images/s")
    print(f"two ranks / two runs, medians: {report.ratio:.3f}")


if __name__ == "__main__":
    main()
