"""The DeepSpeed engine in one process: what ZeRO may touch, and what it must not."""

from math import prod

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch._dynamo.utils import counters

from configs.schema import EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from data_pipelines.object_store import ObjectStore
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.pieces import assemble, fill_pieces, pack
from pretrain.position_noise import draw
from pretrain.run_plan import plan_run
from pretrain.timesteps import uniform_timesteps
from pretrain.train import build_model, set_execution
from pretrain.trained import digest_of
from pretrain.unet import set_recomputing
from pretrain.world import World
from tests.tiny_run import make_run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as `world` has it
TRAIN = TrainConfig(total_images=64, global_batch=8, checkpoint_every_images=8, max_micro_batch=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_run(ObjectStore(), str(tmp_path_factory.mktemp("run")))


def make_engine(
    config: RunConfig,
    world: World,
    *,
    stage: int,
    **settings: object,
):
    torch.manual_seed(0)
    engine = EngineConfig.model_validate({"zero_stage": stage, **settings})
    config = config.model_copy(update={"engine": engine})
    model, _ = build_model(config, ObjectStore(), world.device)
    assert isinstance(model, DiTi)
    set_execution(model, engine)
    optimizer = OptimizerConfig(learning_rate=1e-3, clip_norm=1.0)
    return model, Engine(model, engine, optimizer, plan_run(TRAIN, 1), world)


def micro_batches(step: int) -> list[tuple[torch.Tensor, ...]]:
    batches = []
    for half in range(2):
        positions = np.arange(4) + 8 * step + 4 * half
        drawn = draw(
            positions,
            seed=0,
            global_batch=8,
            noise_shape=(3, 32, 32),
        )
        noise = drawn.noise_BCHW.to(DEVICE)
        t_B = torch.from_numpy(uniform_timesteps(0, 200, 1000).quantile(drawn.place_B))
        batches.append((noise.flip(0).clamp(-1, 1), t_B.to(DEVICE), noise))
    return batches


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_moves_the_trainable_part_and_not_one_byte_of_the_backbone(
    config: RunConfig, world: World, stage: int
) -> None:
    model, engine = make_engine(config, world, stage=stage)
    frozen = list(model.decoder.backbone.parameters())
    before = digest_of(model.decoder.backbone)
    start = weights_of(engine)
    losses = [engine.step(1e-3, micro_batches(0)).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    moved = [name for name, tensor in weights_of(engine).items() if (tensor != start[name]).any()]
    assert len(moved) > 0.9 * len(start)
    assert digest_of(model.decoder.backbone) == before
    trainable = sum(tensor.numel() for tensor in start.values())
    assert 0 <= engine.num_optimized() - trainable < 4096  # ZeRO pads its flat buffers
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_stages_agree_in_fp32(config: RunConfig, world: World) -> None:
    curves = {}
    for stage in (0, 1, 2, 3):
        _, engine = make_engine(config, world, stage=stage)
        curves[stage] = [engine.step(1e-3, micro_batches(step)).item() for step in range(4)]
    for stage, curve in curves.items():
        assert curve == pytest.approx(curves[0], rel=1e-5), stage


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_activations_changes_no_loss(
    config: RunConfig, world: World, stage: int
) -> None:
    curves = []
    for recomputes in (False, True):
        model, engine = make_engine(config, world, stage=stage)
        set_recomputing(model, recomputes)
        curves.append([engine.step(1e-3, micro_batches(step)).item() for step in range(3)])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("stage", "backbone"), [(2, "partitioned"), (3, "partitioned"), (3, "offloaded")]
)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_backbone_in_parts_changes_no_loss_and_is_let_go_after_use(
    config: RunConfig, world: World, stage: int, backbone: str, precision: str
) -> None:
    curves = []
    for placement in ("replicated", backbone):
        model, engine = make_engine(
            config, world, stage=stage, backbone=placement, precision=precision
        )
        curves.append([engine.step(1e-3, micro_batches(step)).item() for step in range(3)])
    assert curves[0] == curves[1]
    weights = list(model.decoder.backbone.parameters())
    whole = sum(weight.ds_numel for weight in weights)
    held = sum(weight.untyped_storage().nbytes() // weight.element_size() for weight in weights)
    assert 0 < held < 0.2 * whole, "biases and norms only"
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("compiled", ["frozen", "trained", "both"])
def test_compiled_parts_follow_the_same_losses(
    config: RunConfig, world: World, compiled: str
) -> None:
    curves, graphs = [], []
    for choice in ("nothing", compiled):
        torch._dynamo.reset()
        counters.clear()
        _, engine = make_engine(config, world, stage=2, compile=choice)
        curves.append([engine.step(1e-3, micro_batches(step)).item() for step in range(4)])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 < graphs[1]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_bf16_trains(config: RunConfig, world: World) -> None:
    _, engine = make_engine(config, world, stage=2, precision="bf16")
    losses = [engine.step(1e-3, micro_batches(0)).item() for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("backbone", ["replicated", "partitioned", "offloaded"])
def test_fp16_trains_and_goes_on(
    config: RunConfig, world: World, stage: int, backbone: str
) -> None:
    _, engine = make_engine(config, world, stage=stage, precision="fp16", backbone=backbone)
    losses = [engine.step(1e-3, micro_batches(0)).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert {"cur_scale", "cur_iter"} <= engine.counters().keys()


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]
)
def test_ema_follows_its_formula_in_float32(
    config: RunConfig, world: World, stage: int, precision: str
) -> None:
    _, engine = make_engine(config, world, stage=stage, precision=precision)
    ema = Ema([piece.weights for piece in engine.pieces], decay=0.75)
    expected = weights_of(engine)
    for step in range(2):
        engine.step(1e-3, micro_batches(step))
        ema.update()
        expected = {n: 0.75 * expected[n] + 0.25 * live for n, live in weights_of(engine).items()}
    for piece, average in zip(engine.pieces, ema.tensors, strict=True):
        flat = expected[piece.name].flatten()[piece.start : piece.end]
        torch.testing.assert_close(average, flat, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_are_the_whole_trained_part_and_alive(
    config: RunConfig, world: World, stage: int, precision: str
) -> None:
    model, engine = make_engine(config, world, stage=stage, precision=precision)
    assert sum(p.weights.numel() for p in engine.pieces) == sum(map(prod, engine.shapes.values()))
    assert all(p.weights.dtype == torch.float32 for p in engine.pieces)
    before = {piece.place: piece.weights.clone() for piece in engine.pieces}
    for step in range(3):  # the first moves the zero-initialised end of the shift path only
        engine.step(1e-3, micro_batches(step))
    moved = [p for p in engine.pieces if not torch.equal(p.weights, before[p.place])]
    assert len(moved) > 0.9 * len(before)
    assert all(piece.exp_avg.abs().sum() > 0 for piece in moved)
    assert engine.counters()["updates"] == 3
    if stage < 3:  # what the model computes with is what the pieces say
        for name, whole in weights_of(engine).items():
            live = dict(model.named_parameters())[name].detach()
            torch.testing.assert_close(live, whole.to(live.dtype), rtol=0, atol=0)


def test_packed_pieces_are_a_safetensors_file_and_stay_as_they_were() -> None:
    live = {"a@0": torch.arange(3.0), "b@7": torch.empty(0), "c@5": torch.tensor([2.5])}
    file = pack(list(live), list(live.values()))
    before = {name: tensor.clone() for name, tensor in live.items()}
    live["a@0"].add_(1)
    found = load_safetensors(bytes(file.bytes))
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert load_safetensors(packed([], [])) == {}


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [(2, "fp32", False), (3, "fp32", True), (0, "bf16", False), (1, "bf16", False)],
)
def test_state_of_any_stage_goes_on_under_any_other_to_the_last_bit(
    config: RunConfig, world: World, stage: int, precision: str, offload: bool
) -> None:
    """In one process; over several ranks only the order of summation differs."""
    _, engine = make_engine(config, world, stage=2, precision=precision)
    engine.step(1e-3, micro_batches(0))
    kept = {
        kind: packed([p.place for p in engine.pieces], [getattr(p, kind) for p in engine.pieces])
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }
    counters = engine.counters()
    undisturbed = [engine.step(1e-3, micro_batches(step)).item() for step in (1, 2)]
    _, fresh = make_engine(
        config, world, stage=stage, precision=precision, offload_optimizer=offload
    )
    for kind, file in kept.items():
        fill_pieces(fresh.pieces, [getattr(p, kind) for p in fresh.pieces], [file])
    fresh.restore(counters)
    found = [fresh.step(1e-3, micro_batches(step)).item() for step in (1, 2)]
    # bf16: stages 0 and 1 add micro-batches' gradients in float32, stage 2 in bf16.
    assert found == (undisturbed if precision == "fp32" else pytest.approx(undisturbed, rel=1e-2))


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Every trained parameter, whole, as its pieces have it."""
    whole = packed([p.place for p in engine.pieces], [p.weights for p in engine.pieces])
    return assemble([whole], engine.shapes)


def packed(places: list[str], tensors: list[torch.Tensor]) -> bytes:
    """As it is read again."""
    return bytes(pack(places, tensors).bytes)
