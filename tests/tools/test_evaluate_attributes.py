"""A probe's two halves must belong together; whatever does not is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.object_store import ObjectStore
from tests.diti_command import diti
from tests.labelled_export import export_labels
from tests.tiny_run import make_shards
from tools.evaluate_attributes import evaluate_attributes

STORE = ObjectStore()
Export = Callable[..., str]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def make(split: str, name: str = "features", encoder: str = "a" * 64) -> str:
        shards = tmp_path / split
        if not shards.exists():
            make_shards(STORE, str(shards), split=split, shards=1, rows=60)
        return export_labels(str(shards), str(tmp_path / f"{name}-{split}"), encoder=encoder)

    return make


def evaluate(train: str, test: str, **options) -> dict[str, dict[str, float]]:
    results = evaluate_attributes(STORE, train_url=train, test_url=test, **options)
    return {
        r.name: dict(zip(r.attributes, r.average_precision, strict=True)) | {"dims": r.dims}
        for r in results
    }


def test_what_a_subset_holds_is_found_there_and_nowhere_else(export: Export) -> None:
    untrained = (export("val", "before", "c" * 64), export("test", "before", "c" * 64))
    found = evaluate(export("val"), export("test"), untrained=untrained)
    assert [found[name]["dims"] for name in found] == [8, 4, 4, 8, 3072]
    whole, first, second, _, pixels = found.values()
    assert whole["glasses"] == first["glasses"] == pytest.approx(1)
    assert second["glasses"] < 0.9
    assert pixels["glasses"] > second["glasses"]


def test_halves_of_different_encoders_are_refused(export: Export) -> None:
    with pytest.raises(ValueError, match="different encoders"):
        evaluate(export("val"), export("test", encoder="d" * 64))


def test_halves_of_the_same_images_are_refused(export: Export) -> None:
    with pytest.raises(ValueError, match="has not seen"):
        evaluate(export("val"), export("val", "again"))


def test_an_untrained_encoder_on_other_images_is_refused(export: Export) -> None:
    untrained = (export("train", "before", "c" * 64), export("test", "before", "c" * 64))
    with pytest.raises(ValueError, match="export the same splits"):
        evaluate(export("val"), export("test"), untrained=untrained)


def test_shards_that_changed_after_the_export_are_refused(export: Export, tmp_path: Path) -> None:
    train, test = export("val"), export("test")
    make_shards(STORE, str(tmp_path / "test"), split="test", shards=1, rows=61)
    with pytest.raises(ValueError, match="are not those that the features were exported from"):
        evaluate(train, test)


def test_the_weights_command_says_where_a_probe_looks(export: Export) -> None:
    shares = json.loads(diti("eval", "weights", export("val"), "--json").stdout)["shares"]
    assert shares["glasses"][0] > 0.95
    table = diti("eval", "weights", export("val"))
    assert table.exit_code == 0, table.stderr
    assert "glasses" in table.stdout
    assert "of the dimensions" in table.stdout


def test_the_papers_probe_wants_three_sets_of_images(export: Export) -> None:
    train, val, test = (export(split) for split in ("train", "val", "test"))
    found = json.loads(diti("eval", "published-probe", train, val, test, "--json").stdout)
    assert [row["dims"] for row in found] == [8, 4, 4]
    assert found[0]["attributes"].keys() == found[2]["attributes"].keys()
    for same in ((train, test, test), (train, train, test), (train, val, train)):
        refused = diti("eval", "published-probe", *same)
        assert refused.exit_code == 2
        assert "that it has not seen" in refused.stderr


@pytest.mark.parametrize("verb", ["knn", "linear"])
def test_a_class_is_recognised_where_the_feature_holds_it(export: Export, verb: str) -> None:
    halves = export("val"), export("test")
    found = json.loads(diti("eval", verb, *halves, "--label", "glasses", "--json").stdout)
    whole, first, second, _ = (row["accuracy"] for row in found)
    assert [row["dims"] for row in found] == [8, 4, 4, 3072]
    assert min(whole, first) > second + 0.1
    table = diti("eval", verb, *halves, "--label", "glasses", "--no-pixels")
    assert "recognition of glasses" in table.stdout
    assert "raw pixels" not in table.stdout
    refused = diti("eval", verb, *halves, "--label", "glases")
    assert refused.exit_code == 2
    assert "there is no label glases; there are: beard, eyes, flip, glasses" in refused.stderr


def test_numbers_are_told_from_pixels_and_not_from_noise(export: Export) -> None:
    halves = export("val"), export("test")
    found = json.loads(diti("eval", "regression", *halves, "--json").stdout)
    whole, *_, pixels = found
    by_name = dict(zip(pixels["numbers"], pixels["pearson"], strict=True))
    assert by_name["x"] > 0.5
    assert abs(dict(zip(whole["numbers"], whole["pearson"], strict=True))["x"]) < 0.4
    table = diti("eval", "regression", *halves)
    assert "Pearson r" in table.stdout


def test_what_lives_in_one_subset_leaks_into_no_other(export: Export) -> None:
    halves = export("val"), export("test")
    found = json.loads(diti("eval", "disentanglement", *halves, "--json").stdout)
    assert found["leakage"]["subsets"] == ["z000: time-steps 0-100", "z001: time-steps 100-1000"]
    inside, outside = found["leakage"]["attributes"]["glasses"]
    assert inside > 0.9 > 0.4 > outside
    table = diti("eval", "disentanglement", *halves)
    assert table.exit_code == 0, table.stderr
    assert "glasses" in table.stdout
