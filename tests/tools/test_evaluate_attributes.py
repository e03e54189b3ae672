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
