"""A run goes on at another world size, another ZeRO stage, or with the optimizer offloaded."""

from pathlib import Path

import pytest

from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.preflight import run_url
from pretrain.train import run
from tests.ranks import run_on_ranks
from tests.tiny_run import make_run

STORE = ObjectStore()
STEPS = (
    "train.global_batch=8",
    "train.total_images=72",
    "train.checkpoint_every_images=400",
    "train.max_micro_batch=2",
)
pytestmark = [pytest.mark.usefixtures("world"), pytest.mark.timeout(600)]


def at(config: RunConfig, workers: int, zero_stage: int, *, offload: bool = False) -> RunConfig:
    engine = {"zero_stage": zero_stage, "offload_optimizer": offload}
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"num_workers": workers}),
            "engine": config.engine.model_copy(update=engine),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["partitioned", "offloaded"])
def test_ranks_that_share_the_backbone_take_the_steps_of_those_that_each_have_it(
    tmp_path: Path, shared: str
) -> None:
    found = []
    for placement in ("replicated", shared):
        settings = f"name={placement}", f"engine.backbone={placement}"
        config = make_run(STORE, str(tmp_path), *STEPS, *settings)
        run_on_ranks(at(config, 2, 2), tmp_path, stop_at=3)
        manifest = checkpoint.find(STORE, run_url(config), None)
        lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
        found.append([line["loss"] for line in lines])
    assert len(found[0]) == 3
    assert found[0] == found[1]


def losses(config: RunConfig) -> list[float]:
    manifest = checkpoint.find(STORE, run_url(config), None)
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    assert [line["step"] for line in lines] == list(range(1, 10))
    return [line["loss"] for line in lines]


def test_a_run_that_moves_between_world_sizes_and_stages_follows_the_undisturbed_curve(
    tmp_path: Path,
) -> None:
    moved = make_run(STORE, str(tmp_path), *STEPS, "name=moved")
    run_on_ranks(at(moved, 2, 2), tmp_path, stop_at=3)
    assert checkpoint.complete_steps(STORE, run_url(moved)) == [0, 3]
    run_on_ranks(at(moved, 1, 3), tmp_path, stop_at=5)
    run_on_ranks(at(moved, 4, 1), tmp_path, stop_at=7)
    run_on_ranks(at(moved, 2, 2, offload=True), tmp_path)
    manifest = checkpoint.find(STORE, run_url(moved), None)
    line = checkpoint.lineage(STORE, run_url(moved), manifest)
    assert [(each.step, each.world_size) for each in line] == [
        (0, 2), (3, 2), (5, 1), (7, 4), (9, 2)
    ]  # fmt: skip

    alone = make_run(STORE, str(tmp_path), *STEPS, "name=alone", "cluster.num_workers=1")
    run(alone, local_dir=tmp_path)
    for step, (undisturbed, found) in enumerate(zip(losses(alone), losses(moved), strict=True), 1):
        print(f"step {step}: {undisturbed:.9f} undisturbed, {found:.9f} moved")
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)
    positions = [
        position for position, _ in checkpoint.read_samples(STORE, run_url(moved), manifest)
    ]
    assert positions == list(range(72))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_and_world_size_follows_one_curve_for_two_hundred_steps(
    tmp_path: Path,
) -> None:
    """In fp32 only the order of sums differs, and training slowly draws its last digits apart."""
    length = ("train.global_batch=8", "train.total_images=1600", "train.max_micro_batch=2")
    curves: dict[str, list[float]] = {}
    for workers, stage, offload in (
        (1, 0, False), (2, 0, False), (2, 1, False), (2, 2, False), (2, 2, True), (2, 3, False),
        (4, 2, False),
    ):  # fmt: skip
        name = f"ranks-{workers}-zero-{stage}{'-offload' if offload else ''}"
        settings = f"name={name}", "train.checkpoint_every_images=1600"
        config = make_run(STORE, str(tmp_path), *length, *settings)
        config = at(config, workers, stage, offload=offload)
        run_on_ranks(config, tmp_path)
        manifest = checkpoint.find(STORE, run_url(config), None)
        lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
        curves[name] = [line["loss"] for line in lines]
    alone = curves.pop("ranks-1-zero-0")
    assert len(alone) == 200
    for name, curve in curves.items():
        apart = [abs(found - loss) / loss for found, loss in zip(curve, alone, strict=True)]
        print(f"{name}: {max(apart[:20]):.1e} over 20 steps, {max(apart):.1e} over 200")
        assert max(apart[:20]) < 1e-5, name
        assert max(apart) < 1e-3, name
