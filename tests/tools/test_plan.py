"""`diti plan`: every recipe, on any legal number of workers, without weights or shards."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import configs
from configs.task import ScheduleConfig, UNetConfig
from data_pipelines.object_store import ObjectStore
from pretrain.backbone import save_backbone
from tests.tiny_run import make_shards
from tools.cli import app

RUNS = Path(configs.__file__).parent / "runs"
SLOW = ("laion512_sd21", "laion1024_sdxl")
"""Recipes whose models take long to walk through: the others are of the same classes."""
RECIPES = [
    pytest.param(path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted(RUNS.glob("*.yaml"))
]
# METHOD section 4; the encoder and the shift path have these parameters.
PUBLISHED = {
    64: (UNetConfig(dropout=0.1), 1_487_104 + 52_007_811),
    128: (
        UNetConfig(
            base_channels=128,
            channel_multipliers=(1, 1, 2, 3, 4),
            attention_factors=(8,),
            dropout=0.1,
        ),
        3_914_240 + 78_522_371,
    ),
}


def plan(recipe: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", str(RUNS / f"{recipe}.yaml"), *arguments])


def card_only(folder: Path, image_size_px: int) -> tuple[str, str]:
    """A backbone whose weights are not there."""
    weights = folder / "dpm.safetensors"
    sha256 = save_backbone(
        ObjectStore(),
        str(weights),
        state={},
        unet=PUBLISHED[image_size_px][0],
        schedule=ScheduleConfig(),
        image_size_px=image_size_px,
        provenance={},
    )
    weights.unlink()
    return f"task.backbone.weights={weights}", f"task.backbone.sha256={sha256}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_plans(recipe: str, tmp_path: Path) -> None:
    size = next((size for size in PUBLISHED if str(size) in recipe), None)
    overrides = () if size is None else card_only(tmp_path, size)
    workers = () if recipe.startswith("laion") else ("--world-size", "8")
    result = plan(recipe, *overrides, f"data.shards={tmp_path}", *workers, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    if size is not None:
        assert found["trained_parameters"] == PUBLISHED[size][1]
        assert found["checkpoint_bytes"] == 16 * PUBLISHED[size][1]
    if recipe.startswith("laion"):
        assert_the_head_says_what_is_planned(recipe, found)
    memory = {stage: sum(parts.values()) for stage, parts in found["memory"].items()}
    assert list(memory) == ["0", "1", "2", "3"]
    assert memory["0"] > memory["1"] >= memory["2"]
    assert found["not_counted"].startswith("the loader is not counted: no shard index at")


def assert_the_head_says_what_is_planned(recipe: str, found: dict) -> None:
    head = (RUNS / f"{recipe}.yaml").read_text().partition("name:")[0].replace("\n# ", " ")
    held = found["memory"][str(found["zero_stage"])]
    on_gpu = sum(size for part, size in held.items() if part not in found["in_host_memory"])
    for said in (
        f"{on_gpu / 2**20:,.0f} MiB on each GPU, {held['activations'] / 2**20:,.0f} of them",
        f"{found['plan']['world_size']} workers, {found['plan']['micro_batch']} images each",
        f"{found['plan']['total_steps']:,} steps; {found['checkpoints']} checkpoints of "
        f"{found['checkpoint_bytes'] / 2**20:,.0f} MiB",
        f"{found['trained_parameters']:,} parameters are trained, "
        f"{found['frozen_parameters']:,} are frozen",
    ):
        assert said in head


def test_a_dit_in_its_full_size_is_planned_from_its_shape(tmp_path: Path) -> None:
    backbone = f"{{kind: diffusers, folder: builtin/dit-xl-2-256, sha256: '{'0' * 64}'}}"
    given = f"task.backbone={backbone}", f"data.shards={tmp_path}", "--json"
    found = json.loads(plan("laion256_sd15", *given).stdout)
    assert found["frozen_parameters"] == 749_826_464 + 83_653_863
    in_bf16 = 2 * found["frozen_parameters"]
    assert {parts["backbone"] for parts in found["memory"].values()} == {in_bf16}


def test_a_denoiser_that_is_trained_along_is_planned_as_trained(tmp_path: Path) -> None:
    given = "task={kind: diffae, unet: {dropout: 0.1}}", f"data.shards={tmp_path}"
    found = json.loads(plan("celeba64_diti", *given, "--json").stdout)
    scaled = 2368 + 1024 + 3776  # channels of the blocks that z scales: down, middle, up
    of_z = (512 + 1) * 256 + (256 + 1) * scaled
    assert found["trained_parameters"] == 1_487_104 + 63_958_019 + of_z
    assert found["frozen_parameters"] == 0
    assert found["memory"]["2"]["activations"] > found["memory"]["2"]["weights"]


def test_people_get_a_table_and_what_is_missing_is_said(tmp_path: Path) -> None:
    given = *card_only(tmp_path, 64), f"data.shards={tmp_path}"
    result = plan("celeba64_diti", *given)
    assert result.exit_code == 0, result.output
    for said in (
        "4 workers, 32 images each: 296875 steps; 298 checkpoints",
        "53,494,915 parameters are trained, 63,958,019 of the backbone are not",
        "world sizes that split the batch: 1, 2, 4, 8, 16, 32, 64, 128",
        "ZeRO 2 (set)",
        "activations",
        "the loader is not counted",
    ):
        assert said in result.stdout
    assert "in the host's" in result.stdout
    on_cpu = plan("celeba64_diti", *given, "cluster.use_gpu=false")
    assert "together" in on_cpu.stdout
    assert "in the host's" not in on_cpu.stdout


def test_a_loader_is_counted_where_its_shards_are(tmp_path: Path) -> None:
    shards = str(tmp_path / "shards")
    make_shards(ObjectStore(), shards)
    given = f"data.shards={shards}", f"output={tmp_path}", "--json"
    two, four = (
        json.loads(plan("demo", *given, "--world-size", n).stdout)["memory"]["2"]["data"]
        for n in "24"
    )
    assert two == pytest.approx(2 * four, rel=0.01), "lanes and images are shared out"
    assert two > 0


def test_a_store_that_does_not_let_us_in_costs_one_part_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    result = plan("demo", "data.shards=s3://somewhere/train")
    assert result.exit_code == 0, result.output
    assert "the loader is not counted: no complete S3 credentials" in result.stdout


def test_a_world_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    given = f"data.shards={tmp_path}", f"output={tmp_path}"
    result = plan("demo", *given, "--world-size", "3")
    assert result.exit_code == 2
    assert "cannot be split over 3 workers" in result.stderr
    assert "one of [1, 2, 4, 8, 16]" in result.stderr


def test_a_backbone_without_a_card_is_refused(tmp_path: Path) -> None:
    given = f"task.backbone.weights={tmp_path}/no.safetensors", f"task.backbone.sha256={'a' * 64}"
    result = plan("celeba64_diti", *given)
    assert result.exit_code == 2
    assert "a backbone needs its card" in result.stderr
