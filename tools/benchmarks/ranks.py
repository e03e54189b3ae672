"""Ranks that benchmarks start themselves, and the steps that they take on random images."""

import os
import socket

import torch

from configs.schema import EngineConfig, OptimizerConfig, TrainConfig
from pretrain.attention import DTYPES, choose_kernel
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.engine import Engine, place_frozen
from pretrain.run_plan import RunPlan, plan_run
from pretrain.train import set_execution
from pretrain.unet import set_attention
from pretrain.world import join_world
from tools.benchmarks.train_step import EMA_DECAY, IMAGE_SIZE_PX


def free_port() -> int:
    """Where ranks can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become_rank(rank: int, world_size: int, port: int) -> None:
    """This process is one of several on this machine, with a thread of its own."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)


def plan_of(micro_batch: int, world_size: int) -> RunPlan:
    """One step of one micro-batch on each rank."""
    batch = micro_batch * world_size
    train = TrainConfig(total_images=batch, global_batch=batch, checkpoint_every_images=batch)
    return plan_run(train, world_size)


class Steps:
    """A model under ZeRO with its average, on the same random images again and again."""

    def __init__(self, model: DiTi, engine: EngineConfig, plan: RunPlan) -> None:
        world = join_world()
        dtype = DTYPES[engine.precision]
        set_attention(model, choose_kernel(engine.attention, device=world.device, dtype=dtype))
        place_frozen(model.decoder.trunk, engine, world.device)
        model.tables_to(world.device)
        model.to(world.device, dtype)
        set_execution(model, engine)
        self._engine = Engine(model, engine, OptimizerConfig(), plan, world)
        self._ema = Ema([piece.weights for piece in self._engine.pieces], EMA_DECAY)
        images = torch.rand(plan.micro_batch, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
        t_B = torch.randint(0, 1000, (plan.micro_batch,))
        self._batch = images.to(world.device), t_B.to(world.device), images.to(world.device)

    def take(self, number: int) -> None:
        for _ in range(number):
            self._engine.step(1e-4, [self._batch])
            self._ema.update()
