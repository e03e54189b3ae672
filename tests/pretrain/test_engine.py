"""The DeepSpeed engine in one process: what ZeRO may touch, and what it must not."""

import numpy as np
import pytest
import torch

from configs.schema import EngineConfig, OptimizerConfig, TrainConfig
from data_pipelines.object_store import ObjectStore
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.position_noise import draw
from pretrain.run_plan import plan_run
from pretrain.timesteps import uniform_timesteps
from pretrain.train import build_model
from pretrain.trained import digest_of
from pretrain.world import World
from tests.tiny_run import make_run

TRAIN = TrainConfig(total_images=64, global_batch=8, checkpoint_every_images=8, max_micro_batch=4)


def make_engine(tmp_path, world: World, *, stage: int, precision: str = "fp32"):
    torch.manual_seed(0)
    store = ObjectStore()
    config = make_run(store, str(tmp_path), f"engine.precision={precision}")
    model, _ = build_model(config, store, world.device)
    assert isinstance(model, DiTi)
    engine = EngineConfig(zero_stage=stage, precision=precision)
    optimizer = OptimizerConfig(learning_rate=1e-3, clip_norm=1.0)
    return model, Engine(model, engine, optimizer, plan_run(TRAIN, 1), world)


def micro_batches(step: int) -> list[tuple[torch.Tensor, ...]]:
    batches = []
    for half in range(2):
        positions = np.arange(4) + 8 * step + 4 * half
        drawn = draw(
            positions,
            seed=0,
            timesteps=uniform_timesteps(0, 200, 1000),
            global_batch=8,
            image_shape=(3, 32, 32),
        )
        noise = drawn.noise_BCHW
        batches.append((noise.flip(0).clamp(-1, 1), drawn.t_B, noise))
    return batches


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_moves_the_trainable_part_and_not_one_byte_of_the_backbone(
    tmp_path, world: World, stage: int
) -> None:
    model, engine = make_engine(tmp_path, world, stage=stage)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith("decoder.backbone.") for name in frozen)
    before = None if stage == 3 else digest_of(model.decoder.backbone)
    start = engine.whole_state()
    losses = [engine.step(1e-3, micro_batches(0)).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    moved = [name for name, tensor in engine.whole_state().items() if (tensor != start[name]).any()]
    assert len(moved) > 0.9 * len(start)
    if before is not None:
        assert digest_of(model.decoder.backbone) == before
    trainable = sum(tensor.numel() for tensor in start.values())
    assert 0 <= engine.num_optimized() - trainable < 4096  # ZeRO pads its flat buffers
    assert all(p.grad is None for p in frozen.values())


def test_stages_agree_in_fp32(tmp_path, world: World) -> None:
    curves = {}
    for stage in (0, 1, 2, 3):
        _, engine = make_engine(tmp_path / str(stage), world, stage=stage)
        curves[stage] = [engine.step(1e-3, micro_batches(step)).item() for step in range(4)]
    for stage, curve in curves.items():
        assert curve == pytest.approx(curves[0], rel=1e-5), stage


def test_bf16_trains(tmp_path, world: World) -> None:
    _, engine = make_engine(tmp_path, world, stage=2, precision="bf16")
    losses = [engine.step(1e-3, micro_batches(0)).item() for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_ema_follows_its_formula_and_is_whole_after_gathering(
    tmp_path, world: World, stage: int
) -> None:
    _, engine = make_engine(tmp_path, world, stage=stage)
    ema = Ema(engine.local_shards(), decay=0.75)
    expected = engine.whole_state()
    for step in range(2):
        engine.step(1e-3, micro_batches(step))
        ema.update(engine.local_shards())
        live = engine.whole_state()
        expected = {name: 0.75 * expected[name] + 0.25 * live[name] for name in live}
    ema.swap(engine.local_shards())
    average = engine.whole_state()
    ema.swap(engine.local_shards())
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, rtol=1e-5, atol=1e-7)
    for name, tensor in engine.whole_state().items():
        assert torch.equal(tensor, live[name]), f"{name} was not swapped back"


def test_resume_is_bit_identical(tmp_path, world: World) -> None:
    _, engine = make_engine(tmp_path / "a", world, stage=2)
    engine.step(1e-3, micro_batches(0))
    engine.save(tmp_path / "saved")
    undisturbed = [engine.step(1e-3, micro_batches(step)).item() for step in (1, 2)]
    _, fresh = make_engine(tmp_path / "b", world, stage=2)
    fresh.load(tmp_path / "saved")
    assert [fresh.step(1e-3, micro_batches(step)).item() for step in (1, 2)] == undisturbed
