"""`python -m tools.benchmarks.memory`: the memory that `diti plan` predicts beside what was held.

Two ranks take steps on random images, for each ZeRO stage and each of two models: CelebA-64 in the
published sizes, and one with twice its channels. Measured is the most that the process of rank 0
held, less what it held once a tiny model had been through the same steps: that is the interpreter,
its libraries, and what they keep.

Here freed memory goes back to the system at once. In a run it does not, because that is faster:
`keep_freed_memory`. What its process holds beyond the plan is measured too, in the last column.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pretrain.engine
from configs.schema import EngineConfig
from configs.task import UNetConfig
from pretrain.memory_plan import plan_memory, sizes_of
from pretrain.run_plan import RunPlan
from tools.benchmarks.ranks import Steps, become_rank, free_port, plan_of
from tools.benchmarks.train_step import IMAGE_SIZE_PX, UNET, make_model

RANKS = 2
STEPS = 3
MODELS = {
    "celeba64": UNET,
    "celeba64, twice the channels": UNET.model_copy(update={"base_channels": 128}),
}
TINY = UNET.model_copy(update={"base_channels": 32, "channel_multipliers": (1, 1, 1, 1)})


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one stage; bytes on rank 0."""

    model: str
    zero_stage: int
    planned: dict[str, int]
    measured: int
    measured_in_a_run: int
    """The same with memory kept for the next step."""

    @property
    def ratio(self) -> float:
        return sum(self.planned.values()) / self.measured


def measure(model: str, engine: EngineConfig, micro_batch: int) -> Row:
    """Predict, then let two pairs of ranks do it."""
    unet, plan = MODELS[model], plan_of(micro_batch, RANKS)
    sizes = sizes_of(make_model(unet), image_size_px=IMAGE_SIZE_PX, micro_batch=micro_batch)
    planned = plan_memory(sizes, engine, plan) | {"checkpoint": 0}  # none is published here
    held, kept = (_on_ranks(unet, engine, plan, keeps=keeps) for keeps in (False, True))
    return Row(model, engine.zero_stage, planned, held, kept)


def _on_ranks(unet: UNetConfig, engine: EngineConfig, plan: RunPlan, *, keeps: bool) -> int:
    port = free_port()
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    ranks = [
        spawn.Process(target=_one_rank, args=(rank, port, unet, engine, plan, keeps, far))
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    far.close()
    found = near.recv()
    for rank in ranks:
        rank.join()
    return found


def _one_rank(
    rank: int,
    port: int,
    unet: UNetConfig,
    engine: EngineConfig,
    plan: RunPlan,
    keeps: bool,
    found: Connection,
) -> None:
    become_rank(rank, RANKS, port)
    if not keeps:
        pretrain.engine.keep_freed_memory = _give_back_freed_memory
    _take_steps(TINY, engine, plan)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    _take_steps(unet, engine, plan)
    if rank == 0:
        found.send(resident("VmHWM") - before)


def _give_back_freed_memory() -> None:
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**18)


def _take_steps(unet: UNetConfig, engine: EngineConfig, plan: RunPlan) -> None:
    Steps(make_model(unet), engine, plan).take(STEPS)


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {what}")


def table_row(row: Row) -> str:
    """The row for people, in MiB."""
    mib = {part: size / 2**20 for part, size in row.planned.items()}
    parts = ", ".join(f"{part} {size:.0f}" for part, size in mib.items() if size)
    return (
        f"{row.model}, ZeRO {row.zero_stage}: planned {sum(mib.values()):.0f} MiB, measured "
        f"{row.measured / 2**20:.0f} (planned / measured {row.ratio:.2f}), in a run "
        f"{row.measured_in_a_run / 2**20:.0f}; {parts}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned and measured memory of a training step.")
    parser.add_argument("--micro-batch", type=int, default=4, help="images a rank (default 4)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--precision", default="fp32", help="fp32 (default) or bf16")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="default: both")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    for model in args.models:
        for stage in args.stages:
            engine = EngineConfig(zero_stage=stage, precision=args.precision)
            row = measure(model, engine, args.micro_batch)
            print(json.dumps(asdict(row)) if args.json else table_row(row), flush=True)


if __name__ == "__main__":
    main()
