"""Rows of the table of methods: each another run, and each leaves what the table needs."""

import json
from pathlib import Path

import pytest

import configs
from configs.loading import load_run
from configs.task import DenoiserTask, DiffAeTask, DitiTask
from tools.benchmarks import method_quality
from tools.benchmarks.method_quality import run_row
from tools.benchmarks.method_rows import ROWS, config_of, digest_of_config


def test_every_row_is_a_run_that_differs_from_the_others_and_by_its_seed(tmp_path: Path) -> None:
    digests = [digest_of_config(config_of(tmp_path, row, seed)) for row in ROWS for seed in (0, 1)]
    assert len(set(digests)) == 2 * len(ROWS)


def test_diffaes_denoiser_is_of_the_frozen_ones_shape_and_its_encoder_of_the_others(
    tmp_path: Path,
) -> None:
    task, authors = (config_of(tmp_path, row, 0).task for row in ("diffae", "authors"))
    backbone = load_run(Path(configs.__file__).parent / "runs" / "avatars32_backbone.yaml").task
    assert isinstance(task, DiffAeTask)
    assert isinstance(authors, DitiTask)
    assert isinstance(backbone, DenoiserTask)
    assert task.unet == backbone.unet
    assert task.schedule == backbone.schedule
    assert task.encoder == authors.encoder


def test_a_digest_does_not_depend_on_where_things_lie(tmp_path: Path) -> None:
    places = [config_of(folder, "early", 0) for folder in (tmp_path, tmp_path / "elsewhere")]
    assert len({digest_of_config(config) for config in places}) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_row_leaves_its_curve_attributes_and_shots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("train.total_images=128", "train.checkpoint_every_images=64", "train.global_batch=32")
    monkeypatch.setitem(ROWS, "tiny", (*ROWS["early"], *tiny, "optimizer.warmup_images=0"))
    monkeypatch.setattr(method_quality, "RESULTS", tmp_path / "results")
    counts = {"train": 256, "val": 1024, "test": 1024}
    monkeypatch.setattr(method_quality, "COUNTS", counts)
    result = run_row(tmp_path, "tiny", 0)
    assert [point.images for point in result.curve] == [0, 64, 128]
    assert result.pixels.all > result.curve[0].all > 0.5
    assert result.few_shot.keys() == result.misled.keys() == {"5", "10", "20", "50"}
    assert result.few_shot["50"] > result.misled["50"]
    assert result.core_hours == pytest.approx(2 * 128 / result.images_per_second / 3600)
    assert result.counterfactual is not None
    assert {"best_reached", "whole_leak", "whole_flipped"} < result.counterfactual.keys()

    monkeypatch.setattr("sys.argv", ["method_quality", "tiny", "--folder", str(tmp_path)])
    method_quality.main()
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text())["attributes"] == result.attributes
    assert "tiny" in capsys.readouterr().out.splitlines()[-2]
