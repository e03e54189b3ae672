"""`python -m tools.benchmarks.memory`: the memory that was planned beside the memory it took.

Two ranks take steps on random images, for each ZeRO stage and each of two models: CelebA-64 in the
published sizes, and one with twice its channels. Measured is the most that the process of rank 0
held from the engine's making on, less what it held before there was a model.
"""

import argparse
import json
import multiprocessing
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs.schema import DitiTask, EngineConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from configs.schema import UNetConfig
from pretrain.activations import measure_pass
from pretrain.backbone import Backbone
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.engine import Engine, place_frozen
from pretrain.memory_plan import ModelSizes, plan_memory
from pretrain.run_plan import plan_run
from pretrain.unet import UNet
from pretrain.world import join_world
from tools.benchmarks.train_step import IMAGE_SIZE_PX, TASK, UNET

RANKS = 2
MODELS = {"celeba64": UNET, "twice the channels": UNET.model_copy(update={"base_channels": 128})}


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    zero_stage: int
    micro_batch: int
    planned: dict[str, int]
    measured: int


def make_model(unet: UNetConfig) -> DiTi:
    torch.manual_seed(0)
    backbone = Backbone(UNet(unet).requires_grad_(False), ScheduleConfig(), IMAGE_SIZE_PX, "")
    return DiTi(TASK, backbone, image_size_px=IMAGE_SIZE_PX)


def train_config(micro_batch: int) -> TrainConfig:
    batch = RANKS * micro_batch
    return TrainConfig(total_images=batch, global_batch=batch, checkpoint_every_images=batch)


def plan_of(unet: UNetConfig, engine: EngineConfig, micro_batch: int) -> dict[str, int]:
    """The prediction."""
    model = make_model(unet)
    trunk = model.decoder.trunk
    trained, frozen = (sum(p.numel() for p in m.parameters()) for m in (model, trunk))
    passes = measure_pass(model, trunk, image_size_px=IMAGE_SIZE_PX, micro_batch=micro_batch)
    batch = 2 * 4 * micro_batch * 3 * IMAGE_SIZE_PX**2
    sizes = ModelSizes(trained, frozen, passes, batch)
    return plan_memory(sizes, engine, plan_run(train_config(micro_batch), RANKS))


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {what}")


def one_rank(rank: int, port: int, unet: UNetConfig, engine: EngineConfig, micro_batch: int, out: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join_world()
    small = UNET.model_copy(update={"base_channels": 32, "channel_multipliers": (1,), "attention_factors": ()})
    plan = plan_run(train_config(micro_batch), RANKS)

    def take_steps(unet: UNetConfig, steps: int) -> int:
        model = make_model(unet)
        place_frozen(model.decoder.trunk, engine, world.device)
        model.tables_to(world.device)
        made = Engine(model.train(), engine, OptimizerConfig(), plan, world)
        ema = Ema([piece.weights for piece in made.pieces], 0.999)
        after = resident("VmRSS")
        images = torch.rand(micro_batch, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
        t = torch.randint(0, 1000, (micro_batch,))
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(steps):
            made.step(1e-4, [(images, t, images)])
            ema.update()
        return after

    import deepspeed  # noqa: F401
    import gc
    before = resident("VmRSS")
    after = take_steps(unet, 3)
    out.put((rank, before, after, resident("VmHWM"), resident("VmRSS")))


def measure(unet: UNetConfig, engine: EngineConfig, micro_batch: int) -> tuple[int,...]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    out = spawn.Queue()
    ranks = [
        spawn.Process(target=one_rank, args=(rank, port, unet, engine, micro_batch, out))
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    found = dict((r[0], r[1:]) for r in (out.get() for _ in ranks))
    for rank in ranks:
        rank.join()
    return found[0]


def main() -> None:
    M = 2**20
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--stages", default="0123")
    parser.add_argument("--models", default="celeba64,twice the channels")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    for name in args.models.split(","):
        for stage in map(int, args.stages):
            engine = EngineConfig(zero_stage=stage, precision=args.precision)
            planned = plan_of(MODELS[name], engine, args.micro_batch)
            before, after, peak, end = measure(MODELS[name], engine, args.micro_batch)
            total = sum(planned.values())
            print(name, stage, {k: v // M for k, v in planned.items()}, "total", total // M, "| static", (after - before) // M, "peak", (peak - before) // M, "end", (end-before)//M, "before", before//M, f"planned/measured {total / (peak - before):.3f}", flush=True)


if __name__ == "__main__":
    main()
