"""Labels out of real shards: exact, in order, and a sample that has none is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.avatars import AvatarSpec, attribute_granularity, draw_avatar
from data_pipelines.decoding import decode_image
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import publish_shard, read_index, write_index
from data_pipelines.shard_writer import write_shard
from tests.tars import tar_of
from tests.tiny_run import make_shards
from tools.labels import (
    Labels,
    attributes_of,
    classes_of,
    numbers_of,
    read_pixels,
    read_samples,
)

STORE = ObjectStore()


def read_labels(store: ObjectStore, url: str) -> Labels:
    return attributes_of(read_samples(store, read_index(store, url)))


SPEC = AvatarSpec(split="val")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of five avatars."""
    folder = str(tmp_path_factory.mktemp("shards"))
    make_shards(STORE, folder, split="val", shards=2, rows=5)
    return folder


def test_labels_are_those_that_the_avatars_were_drawn_with(url: str):
    labels = read_labels(STORE, url)
    assert labels.places == tuple(
        (f"{url}/{shard:05d}.tar", row) for shard in (0, 1) for row in range(5)
    )
    assert set(labels.names) == set(attribute_granularity())
    assert labels.values.shape == (10, len(labels.names))
    assert labels.values.dtype == np.int8
    for row, values in enumerate(labels.values):
        drawn = draw_avatar(SPEC, row).metadata["attributes"]
        assert dict(zip(labels.names, values.tolist(), strict=True)) == drawn


def test_rows_can_be_asked_for_in_any_order(url: str):
    labels = read_labels(STORE, url)
    first, second = f"{url}/00000.tar", f"{url}/00001.tar"
    rows = labels.of([(second, 2), (first, 0), (second, 2)])
    assert np.array_equal(rows, labels.values[[7, 0, 7]])


def test_samples_of_two_tars_may_have_the_same_key(tmp_path: Path):
    tars = []
    for number, hat in enumerate((0, 1)):
        described = json.dumps({"attributes": {"hat": hat}}).encode()
        tar = tar_of([("a.jpg", b"\xff\xd8"), ("a.json", described)])
        tars.append(publish_shard(STORE, str(tmp_path), f"{number}.tar", tar))
    write_index(STORE, str(tmp_path), tars)
    labels = read_labels(STORE, str(tmp_path))
    places = [(f"{tmp_path}/{number}.tar", 0) for number in (1, 0)]
    assert labels.of(places).tolist() == [[1], [0]]


def test_samples_without_labels_are_counted_and_named(url: str):
    tar = f"{url}/00009.tar"
    with pytest.raises(
        ValueError, match=r"2 of 3 features have no labels.* row 4 of .*9\.tar;"
    ) as e:
        read_labels(STORE, url).of([(f"{url}/00000.tar", 1), (tar, 4), (tar, 5)])
    assert "the shards changed after the export: export again" in str(e.value)


def test_pixels_are_the_avatars_own(url: str):
    pixels = read_pixels(read_samples(STORE, read_index(STORE, url)), 32)
    assert pixels.shape == (10, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[6], decode_image(draw_avatar(SPEC, 6).jpeg, 32))


# --- samples that cannot be used ------------------------------------------------------------------


def write_labelled(folder: Path, *metadata: dict[str, Any]) -> str:
    """One shard of samples with this metadata; the images are never looked at."""
    shard = write_shard(STORE, str(folder), 0, [(b"\xff\xd8", described) for described in metadata])
    write_index(STORE, str(folder), [shard])
    return str(folder)


GOOD = {"attributes": {"hat": 1, "smiling": 0}}


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"caption": "a face"}, "KeyError: 'attributes'"),
        ({"attributes": ["hat"]}, "AttributeError"),
        ({"attributes": None}, "AttributeError"),
        ({"attributes": {"hat": "yes", "smiling": 0}}, "{'hat': 'yes'} is not 0 or 1"),
        ({"attributes": {"hat": 2, "smiling": 0}}, "{'hat': 2} is not 0 or 1"),
        ({"attributes": {"hat": 0.5, "smiling": 0}}, "{'hat': 0.5} is not 0 or 1"),
        ({"attributes": {"hat": 1, "smiling": None}}, "{'smiling': None} is not 0 or 1"),
    ],
)
def test_a_sample_without_usable_labels_is_named(
    tmp_path: Path, described: dict[str, Any], reason: str
):
    url = write_labelled(tmp_path, GOOD, described)
    with pytest.raises(ValueError, match=f"sample 000000001 of {url}/00000.tar has no labels") as e:
        read_labels(STORE, url)
    assert reason in str(e.value)
    assert "its json needs `attributes`, each 0 or 1" in str(e.value)


def test_numbers_and_classes_are_read_like_attributes(tmp_path: Path):
    described = [
        {"numeric": {"x": 1, "y": -2.5}, "classes": {"top": "cap", "mouth": "frown"}},
        {"numeric": {"y": 0, "x": 4}, "classes": {"mouth": "laugh", "top": "none"}},
    ]
    samples = read_samples(STORE, read_index(STORE, write_labelled(tmp_path, *described)))
    numbers, classes = numbers_of(samples), classes_of(samples)
    assert (numbers.names, numbers.values.tolist()) == (("x", "y"), [[1, -2.5], [4, 0]])
    assert classes.names == ("mouth", "top")
    assert classes.values.tolist() == [["frown", "cap"], ["laugh", "none"]]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("numeric", "1", "{'x': '1'} is not a finite number"),
        ("numeric", True, "{'x': True} is not a finite number"),
        ("numeric", float("nan"), "{'x': nan} is not a finite number"),
        ("numeric", float("inf"), "{'x': inf} is not a finite number"),
        ("classes", 3, "{'x': 3} is not text"),
        ("classes", None, "{'x': None} is not text"),
    ],
)
def test_a_label_of_another_kind_is_named(tmp_path: Path, field: str, value: Any, reason: str):
    url = write_labelled(tmp_path, {field: {"x": value}})
    read = {"numeric": numbers_of, "classes": classes_of}[field]
    with pytest.raises(ValueError, match=r"sample 000000000 of .* has no labels") as e:
        read(read_samples(STORE, read_index(STORE, url)))
    assert reason in str(e.value)
    assert f"its json needs `{field}`" in str(e.value)


def test_a_sample_without_json_is_named():
    sample = {"__key__": "a1", "__url__": "s3://b/0.tar", "jpg": b""}
    with pytest.raises(ValueError, match=r"sample a1 of s3://b/0\.tar has no labels \(KeyError"):
        attributes_of([sample])


@pytest.mark.parametrize("attributes", [{"hat": 1}, {"hat": 1, "smiling": 0, "beard": 0}])
def test_a_sample_with_other_attributes_than_the_first_is_named(
    tmp_path: Path, attributes: dict[str, int]
):
    url = write_labelled(tmp_path, GOOD, {"attributes": attributes})
    with pytest.raises(ValueError, match=r"sample 000000001 of .*label every sample alike") as e:
        read_labels(STORE, url)
    different = GOOD["attributes"].keys() ^ attributes.keys()
    assert str(sorted(different)) in str(e.value)


def test_attributes_may_stand_in_any_order_and_be_booleans():
    def sample(key: str, attributes: dict[str, Any]) -> dict[str, Any]:
        described = json.dumps({"attributes": attributes}).encode()
        return {"__key__": key, "__url__": "u", "__row__": 0, "json": described}

    labels = attributes_of(
        [sample("a", {"hat": 1, "smiling": 0}), sample("b", {"smiling": True, "hat": False})]
    )
    assert labels.names == ("hat", "smiling")
    assert labels.values.tolist() == [[1, 0], [0, 1]]
