"""A file of preprocessing is read as a run file is: every problem at once, each with its place."""

from pathlib import Path

import pytest

from configs.loading import ConfigError, load_preprocess

SHIPPED = Path(__file__).parents[2] / "configs" / "shards" / "laion.yaml"


def problems(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        load_preprocess(SHIPPED, overrides)
    return refused.value.problems


def test_the_shipped_file_is_read_with_its_overrides() -> None:
    places = ("raw=s3://b/raw", "out=s3://b/train/")
    config = load_preprocess(SHIPPED, (*places, "filters.max_aspect=3"))
    assert (config.raw, config.work) == ("s3://b/raw", "s3://b/train-work")
    assert config.filters.max_aspect == 3
    assert config.duplicates.exact


def test_every_problem_is_named_with_the_nearest_setting() -> None:
    assert problems("image_size=3", "filters.min_similarty=1", "rows_per_shard=20000") == (
        "rows_per_shard = 20000: Input should be less than or equal to 10000",
        "filters.min_similarty: unknown key; did you mean 'min_similarity'?",
        "image_size: unknown key; did you mean 'image_size_px'?",
    )


@pytest.mark.parametrize(
    "out", ["data/raw", "data/raw/", "data/raw/train", "data", "./data/x/../raw/train", "data/ra"]
)
def test_output_inside_of_the_input_is_refused(out: str) -> None:
    raw = "data/ra-work" if out == "data/ra" else "data/raw"  # ours, beside that one
    (problem,) = problems(f"raw={raw}", f"out={out}")
    assert "must lie beside each other" in problem


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_preprocess(tmp_path / "none.yaml")
