"""`python -m tools.benchmarks.gpu_step`: images per second of a step on one GPU, and its memory.

The CelebA-64 model in the published sizes with random weights takes steps on random images: the way
the published code does (`plain_model`), in float32 and under autocast, and as this project trains
it, in each precision, compiled, and under each ZeRO stage. Each has a process of its own, one after
the other. Held is the most of the GPU's memory at a time; planned is what `diti plan` says of it.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from configs.schema import EngineConfig
from pretrain.memory_plan import in_host_memory, plan_memory, sizes_of
from tools.benchmarks.ranks import Steps, plan_of
from tools.benchmarks.train_step import IMAGE_SIZE_PX, Trainer, make_model, model_operations

WARM_STEPS = 5
PLAIN_WAYS = {"published, fp32": "fp32", "published, autocast to bf16": "bf16"}
OUR_WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bf16, SDPA": {"precision": "bf16", "attention": "sdpa"},
    "bf16, frozen part compiled": {"precision": "bf16", "compile": "frozen"},
    "bf16, compiled": {"precision": "bf16", "compile": "both"},
    "fp32, compiled": {"compile": "both"},
    "bf16, ZeRO 0": {"precision": "bf16", "zero_stage": 0},
    "bf16, ZeRO 1": {"precision": "bf16", "zero_stage": 1},
    "bf16, ZeRO 3": {"precision": "bf16", "zero_stage": 3},
    "fp32, ZeRO 3": {"zero_stage": 3},
    "bf16, optimizer offloaded": {"precision": "bf16", "offload_optimizer": True},
    "bf16, activations recomputed": {"precision": "bf16", "recompute_activations": True},
}
"""Changes to ZeRO-2 in fp32, which is what a run has where its file says nothing else."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of training."""

    way: str
    milliseconds: float
    """Of a step; median."""
    images_per_second: float
    tflops: float
    """The model's, whichever were really executed."""
    held_mib: float
    planned_mib: float | None


def measure(way: str, batch: int, steps: int) -> Row:
    """Take the steps in a process of their own. Raises EOFError where that process fails."""
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    process = spawn.Process(target=_work, args=(way, batch, steps, far), daemon=True)
    process.start()
    far.close()
    seconds, held = near.recv()
    process.join()
    flops = sum(op.flops * count for op, count in model_operations(batch).items())
    return Row(
        way,
        milliseconds=seconds * 1e3,
        images_per_second=batch / seconds,
        tflops=flops / seconds / 1e12,
        held_mib=held / 2**20,
        planned_mib=_planned(OUR_WAYS[way], batch) / 2**20 if way in OUR_WAYS else None,
    )


def _work(way: str, batch: int, steps: int, found: Connection) -> None:
    step = _our_step(OUR_WAYS[way], batch) if way in OUR_WAYS else _plain_step(way, batch)
    for _ in range(WARM_STEPS):
        step()
    torch.cuda.synchronize()
    laps = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        laps.append(time.perf_counter() - start)
    found.send((statistics.median(laps), torch.cuda.max_memory_allocated()))


def _our_step(changes: dict[str, Any], batch: int) -> Callable[[], None]:
    engine = EngineConfig.model_validate({"zero_stage": 2, **changes})
    steps = Steps(make_model(), engine, plan_of(batch, 1))
    return lambda: steps.take(1)


def _plain_step(way: str, batch: int) -> Callable[[], None]:
    trainer = Trainer("published", batch, torch.device("cuda"))

    def step() -> None:
        bf16 = PLAIN_WAYS[way] == "bf16"
        with torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext():
            trainer.step()

    return step


def _planned(changes: dict[str, Any], batch: int) -> int:
    """Bytes on the GPU."""
    engine = EngineConfig.model_validate({"zero_stage": 2, **changes})
    sizes = sizes_of(make_model(), image_size_px=IMAGE_SIZE_PX, micro_batch=batch)
    parts = plan_memory(sizes, engine, plan_of(batch, 1))
    return sum(size for part, size in parts.items() if part not in in_host_memory(engine))


def line(row: Row, plain: float) -> str:
    """The row for people; `plain`: images per second of the published way."""
    planned = "" if row.planned_mib is None else f", planned {row.planned_mib:.0f}"
    return (
        f"{row.way:30} {row.milliseconds:7.1f} ms {row.images_per_second:7.0f} images/s "
        f"({row.images_per_second / plain:.2f}) {row.tflops:6.1f} TFLOP/s, held "
        f"{row.held_mib:.0f} MiB{planned}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of CelebA-64 on one GPU.")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default 128)")
    parser.add_argument("--steps", type=int, default=20, help="measured (default 20)")
    parser.add_argument("--ways", nargs="+", default=[*PLAIN_WAYS, *OUR_WAYS], help="default: all")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    plain = None
    for way in args.ways:
        try:
            row = measure(way, args.batch, args.steps)
        except EOFError:
            print(f"{way:30} failed, see above", flush=True)
            continue
        plain = plain or row.images_per_second
        print(json.dumps(asdict(row)) if args.json else line(row, plain), flush=True)


if __name__ == "__main__":
    main()
