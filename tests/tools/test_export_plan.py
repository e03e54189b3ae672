"""`diti plan --export`: hours by arithmetic, bytes by encoding, refusals."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import configs
from tools.cli import app

RUNS = Path(configs.__file__).parent / "runs"
NEEDED = (
    "task.backbone.weights=x.safetensors",
    f"task.backbone.sha256={'a' * 64}",
    "data.shards=d",
)


def plan(recipe: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", str(RUNS / f"{recipe}.yaml"), *NEEDED, *arguments])


def test_hours_are_those_of_the_worker_with_most_shards() -> None:
    options = ("--images", "100001", "--world-size", "4", "--images-per-second", "50", "--json")
    found = json.loads(plan("celeba64_diti", "--export", *options).stdout)
    assert (found["shards"], found["shards_per_worker"]) == (11, 3)
    assert found["hours"] == pytest.approx(3 * 10_000 / 50 / 3600)


def test_bytes_are_those_of_the_dtype_and_of_the_time_steps() -> None:
    found = json.loads(
        plan("celeba64_diti", "--export", "--images-per-second", "1", "--json").stdout
    )
    assert found["images"] == 2_322_161_807
    choices = {choice["name"]: choice for choice in found["choices"]}
    assert list(choices) == ["all", "fine", "middle", "coarse"]
    assert sum(choices[name]["dims"] for name in ("fine", "middle", "coarse")) == 512
    for choice in choices.values():
        key_and_row = 8
        for dtype, at_most in (("int8", 1.1), ("float16", 2), ("float32", 4)):
            size = choice["bytes_per_sample"][dtype]
            assert 0.8 * at_most * choice["dims"] < size < at_most * choice["dims"] + key_and_row


def test_without_a_rate_the_encoder_is_timed_here() -> None:
    result = plan("demo", "--export", "--images", "1000000", "--world-size", "2")
    assert result.exit_code == 0, result.output
    assert "1,000,000 images in 100 shards: 50 for each of 2 workers" in result.stdout
    rate = int(result.stdout.split(" images/s")[0].rsplit(" ", 1)[1])
    assert rate > 10


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("avatars32_backbone", ("--export",), "only the export of a DiTi run is planned"),
        ("demo", ("--images", "5"), "belong to --export"),
        ("demo", ("--images-per-second", "5"), "belong to --export"),
    ],
)
def test_what_cannot_be_planned_is_refused(recipe: str, options, message: str) -> None:
    needed = NEEDED[2:] if recipe == "avatars32_backbone" else NEEDED
    command = ["plan", str(RUNS / f"{recipe}.yaml"), *needed, *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
