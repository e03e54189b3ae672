"""`python -m tools.benchmarks.gpu_step`: images per second of a step on one GPU, and its memory.

The CelebA-64 model in the published sizes with random weights takes steps on random images: the way
the published code does (`plain_model`), in float32 and under autocast, and as this project trains
it, in several ways. Each has a process of its own; once all have warmed up they take turns, so that
whatever else the machine does falls on all. Held is the most of the GPU's memory at a time; planned
is what `diti plan` says of it.
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
STEPS_A_TURN = 5
PLAIN_WAYS = {"published, fp32": "fp32", "published, autocast to bf16": "bf16"}
OUR_WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, SDPA": {"precision": "bf16", "attention": "sdpa"},
    "bf16, compiled": {"precision": "bf16", "compile": "both"},
    "fp16, compiled": {"precision": "fp16", "compile": "both"},
    "bf16, ZeRO 3": {"precision": "bf16", "zero_stage": 3},
    "bf16, optimizer offloaded": {"precision": "bf16", "offload_optimizer": True},
    "bf16, activations recomputed": {"precision": "bf16", "recompute_activations": True},
}
"""Changes to ZeRO-2 in fp32, which is what a run has where its file says nothing else."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of training."""

    way: str
    milliseconds: list[float]
    """Of a step; the median of each turn."""
    images_per_second: float
    tflops: float
    """The model's, whichever were really executed."""
    held_mib: float
    planned_mib: float | None


def measure(ways: list[str], batch: int, turns: int) -> list[Row]:
    """Take the steps. Ways that fail say why on standard error, and are left out."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for way in ways:
        pipes[way], far_end = spawn.Pipe()
        spawn.Process(target=_work, args=(way, batch, far_end), daemon=True).start()
        far_end.close()
    flops = sum(op.flops * count for op, count in model_operations(batch).items())
    held: dict[str, int] = {}
    for way, pipe in list(pipes.items()):
        try:
            held[way] = pipe.recv()
        except EOFError:
            del pipes[way]
    seconds: dict[str, list[float]] = {way: [] for way in pipes}
    for _ in range(turns):
        for way, pipe in pipes.items():
            pipe.send("turn")
            seconds[way].append(pipe.recv())
    return [
        Row(
            way,
            milliseconds=[1e3 * each for each in of_way],
            images_per_second=batch / statistics.median(of_way),
            tflops=flops / statistics.median(of_way) / 1e12,
            held_mib=held[way] / 2**20,
            planned_mib=_planned(way, batch) / 2**20 if way in OUR_WAYS else None,
        )
        for way, of_way in seconds.items()
    ]


def _work(way: str, batch: int, pipe: Connection) -> None:
    step = _our_step(way, batch) if way in OUR_WAYS else _plain_step(way, batch)
    for _ in range(WARM_STEPS):
        step()
    torch.cuda.synchronize()
    pipe.send(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    while pipe.recv():
        laps = []
        for _ in range(STEPS_A_TURN):
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            laps.append(time.perf_counter() - start)
        pipe.send(statistics.median(laps))


def _engine_of(way: str) -> EngineConfig:
    return EngineConfig.model_validate({"zero_stage": 2, **OUR_WAYS[way]})


def _our_step(way: str, batch: int) -> Callable[[], None]:
    steps = Steps(make_model(), _engine_of(way), plan_of(batch, 1))
    return lambda: steps.take(1)


def _plain_step(way: str, batch: int) -> Callable[[], None]:
    trainer = Trainer("published", batch, torch.device("cuda"))

    def step() -> None:
        bf16 = PLAIN_WAYS[way] == "bf16"
        with torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext():
            trainer.step()

    return step


def _planned(way: str, batch: int) -> int:
    """Bytes on the GPU."""
    engine = _engine_of(way)
    sizes = sizes_of(make_model(), image_size_px=IMAGE_SIZE_PX, micro_batch=batch)
    parts = plan_memory(sizes, engine, plan_of(batch, 1))
    return sum(size for part, size in parts.items() if part not in in_host_memory(engine))


def line(row: Row, plain: float) -> str:
    """The row for people; `plain`: images per second of the first way."""
    planned = "" if row.planned_mib is None else f", planned {row.planned_mib:.0f}"
    return (
        f"{row.way:30} {statistics.median(row.milliseconds):7.1f} ms "
        f"{row.images_per_second:6.0f} images/s ({row.images_per_second / plain:.2f}) "
        f"{row.tflops:6.1f} TFLOP/s, held {row.held_mib:.0f} MiB{planned}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of CelebA-64 on one GPU.")
    parser.add_argument("--batch", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--turns", type=int, default=5, help="of 5 steps each (default 5)")
    parser.add_argument("--ways", nargs="+", default=[*PLAIN_WAYS, *OUR_WAYS], help="default: all")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use")
    rows = measure(args.ways, args.batch, args.turns)
    for row in rows:
        plain = rows[0].images_per_second
        print(json.dumps(asdict(row)) if args.json else line(row, plain))


if __name__ == "__main__":
    main()
