"""`python -m tools.benchmarks.order_planning`: what the order of an epoch of LAION-5B costs.

Also how well it mixes: for batches of the default plan (a lane per image), how many shards a batch
draws from and how far two samples of one shard lie apart, beside a uniform shuffle of all samples.
"""

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass

import numpy as np

from data_pipelines.sample_order import Ints, SampleOrder


@dataclass(frozen=True, slots=True)
class Planning:
    """Cost of planning."""

    shards: int
    samples: int
    seconds_to_first_batch: float
    """Of a new order: its epoch laid out, its first batch located."""
    seconds_to_last_batch: float
    """Of another new order that is resumed in the last batch of the epoch."""
    microseconds_per_position: float
    """Afterwards, batch by batch."""
    peak_mib: float
    """What the process's peak memory grew by."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """One batch order's mixing, means over the batches looked at."""

    name: str
    shards_per_batch: float
    nearest: float | None
    """Positions between a sample and the next one of its shard; None where there never is one."""


def measure_planning(shards: int, rows: int, global_batch: int) -> Planning:
    """Plan twice from nothing and look up 200 batches."""
    sizes = np.full(shards, rows)
    before = _peak_mib()
    first = _seconds_of_batch(sizes, global_batch, 0)
    order = SampleOrder(sizes, seed=0, lanes=global_batch, window_rows=128)
    last = _seconds_of_batch(sizes, global_batch, order.samples_per_epoch // global_batch - 1)
    order.locate(0)
    start = time.perf_counter()
    for batch in range(200):
        order.locate(np.arange(batch * global_batch, (batch + 1) * global_batch))
    each = (time.perf_counter() - start) / (200 * global_batch)
    peak = _peak_mib() - before
    return Planning(shards, order.samples_per_epoch, first, last, each * 1e6, peak)


def _seconds_of_batch(sizes: Ints, global_batch: int, batch: int) -> float:
    start = time.perf_counter()
    order = SampleOrder(sizes, seed=0, lanes=global_batch, window_rows=128)
    order.locate(np.arange(batch * global_batch, (batch + 1) * global_batch))
    return time.perf_counter() - start


def measure_mixing(shards: int, rows: int, global_batch: int) -> list[Mixing]:
    """Mixing of our order and of a uniform shuffle, over 50 batches across an epoch."""
    order = SampleOrder(np.full(shards, rows), seed=0, lanes=global_batch, window_rows=128)
    starts = np.linspace(0, order.samples_per_epoch - global_batch, 50).astype(np.int64)
    ours = [order.locate(np.arange(start, start + global_batch))[0] for start in starts]
    random = np.random.default_rng(0)
    uniform = [random.integers(0, shards, global_batch) for _ in starts]
    return [_mixing("ours", ours), _mixing("uniform shuffle", uniform)]


def _mixing(name: str, batches: list[Ints]) -> Mixing:
    distances: list[int] = []
    for batch in batches:
        by_shard = np.argsort(batch, kind="stable")
        same = np.diff(batch[by_shard]) == 0
        distances += np.diff(by_shard)[same].tolist()
    per_batch = np.mean([len(np.unique(batch)) for batch in batches])
    return Mixing(name, float(per_batch), float(np.mean(distances)) if distances else None)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost and mixing of the sample order.")
    parser.add_argument("--shards", type=int, default=585_000, help="tars (default 585000)")
    parser.add_argument("--rows", type=int, default=10_000, help="samples a tar (default 10000)")
    parser.add_argument("--batch", type=int, default=4_096, help="global batch (default 4096)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    planning = measure_planning(args.shards, args.rows, args.batch)
    mixing = [
        *(
            (shards, m)
            for shards in (100, args.shards)
            for m in measure_mixing(shards, args.rows, args.batch)
        ),
    ]
    if args.json:
        mixed = [{"shards": shards} | asdict(m) for shards, m in mixing]
        print(json.dumps(asdict(planning) | {"mixing": mixed}, indent=1))
        return
    print(
        f"{planning.samples:,} samples in {planning.shards:,} shards\n"
        f"first batch after {planning.seconds_to_first_batch:.2f} s, "
        f"resumed at the end of the epoch after {planning.seconds_to_last_batch:.2f} s\n"
        f"then {planning.microseconds_per_position:.2f} us a position; "
        f"{planning.peak_mib:.0f} MiB"
    )
    for shards, m in mixing:
        apart = "no two" if m.nearest is None else f"those {m.nearest:.0f} positions apart are"
        print(
            f"{shards:>7} shards, {m.name:16} {m.shards_per_batch:7.0f} shards in a batch of "
            f"{args.batch}, {apart} of one shard"
        )


if __name__ == "__main__":
    main()
