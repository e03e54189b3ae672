"""`diti data make`: what the verbs say, and what they refuse."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import Result

from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_labels import attributes_in
from data_pipelines.shard_index import INDEX_NAME, read_index
from tests.diti_command import diti
from tests.emoji_art import real_packages
from tools.labels import read_samples


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that holds all these words."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("diti: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def test_making_avatars_says_what_was_made(tmp_path: Path) -> None:
    out = str(tmp_path / "avatars")
    arguments = ("--count", "30", "--rows-per-shard", "20", "--workers", "1", "--out", out)
    result = diti("data", "make", "avatars", *arguments)
    assert result.exit_code == 0, result.output
    assert "30 samples in 2 shards" in result.output
    refused(diti("data", "make", "avatars", *arguments), "holds a shard set already")


def test_a_data_set_that_does_not_exist_is_named(tmp_path: Path) -> None:
    result = diti("data", "make", "horses", "--count", "9", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "horses" in result.stderr


def test_making_emoji_says_what_was_made(tmp_path: Path) -> None:
    real_packages()
    out = str(tmp_path / "emoji")
    arguments = ("--count", "6", "--vendors", "noto,fluent", "--workers", "1", "--out", out)
    result = diti("data", "make", "emoji", *arguments)
    assert result.exit_code == 0, result.output
    assert "6 samples in 1 shard" in result.output
    samples = read_samples(ObjectStore(), read_index(ObjectStore(), out))
    vendors = {json.loads(sample["json"])["classes"]["vendor"] for sample in samples}
    assert vendors == {"noto", "fluent"}
    refused(diti("data", "make", "emoji", *arguments), "holds a shard set already")


def test_emoji_by_unknown_hands_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = ("--count", "6", "--cache", str(cache), "--out", str(tmp_path / "set"))
    refused(diti("data", "make", "emoji", *arguments, "--vendors", "noto,apple"), "'apple'", "noto")
    refused(
        diti("data", "make", "emoji", *arguments, "--split", "all"), "'all'", "train, val, test"
    )
    refused(diti("data", "make", "emoji", *arguments, "--size", "48"), "48", "32, 64, 128")
    assert list(tmp_path.iterdir()) == []


def test_making_a_raw_set_says_what_was_made_and_never_overwrites(tmp_path: Path) -> None:
    out = str(tmp_path / "raw")
    arguments = ("--count", "30", "--rows-per-shard", "20", "--workers", "1", "--out", out)
    result = diti("data", "make", "laion-like", *arguments, "--faults", "0.5")
    assert result.exit_code == 0, result.output
    tables = [pq.read_table(path) for path in Path(out).glob("*.parquet")]
    faulty = sum(fault != "" for table in tables for fault in table["fault"].to_pylist())
    assert 5 < faulty < 25
    assert f"30 rows at {out}, {faulty} rows with a fault" in result.output
    refused(diti("data", "make", "laion-like", *arguments), "holds 2 tars already", "delete")


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Three images of CelebA's size, its two files beside them."""
    images = tmp_path / "img_align_celeba"
    images.mkdir()
    for number in range(1, 4):
        Image.effect_noise((178, 218), 50).convert("RGB").save(images / f"{number:06d}.jpg")
    rows = "000001.jpg -1  1\n000002.jpg  1 -1\n000003.jpg -1 -1\n"
    (tmp_path / "list_attr_celeba.txt").write_text("3\nBald Male \n" + rows)
    (tmp_path / "train.txt").write_text("000001.jpg\n000003.jpg\n")
    return tmp_path


def make_folder(root: Path, *options: str) -> Result:
    out = str(root / "set")
    return diti(
        "data", "make", "folder", str(root / "img_align_celeba"), "--out", out, "--workers", "1",
        *options,
    )  # fmt: skip


def test_celeba_is_imported_as_it_comes(celeba: Path) -> None:
    files = ("--labels", str(celeba / "list_attr_celeba.txt"), "--only", str(celeba / "train.txt"))
    treatment = ("--crop", "25,57,128,128", "--size", "64")
    result = make_folder(celeba, *files, *treatment)
    assert result.exit_code == 0, result.output
    assert "2 samples in 1 shard" in result.output
    samples = read_samples(ObjectStore(), read_index(ObjectStore(), str(celeba / "set")))
    assert [sample["__key__"] for sample in samples] == ["000001", "000003"]
    assert [attributes_in(sample) for sample in samples] == [
        {"Bald": 0, "Male": 1},
        {"Bald": 0, "Male": 0},
    ]
    refused(make_folder(celeba, *files, *treatment), "holds a shard set already")


def test_a_folder_that_cannot_be_imported_is_refused_in_one_line(celeba: Path) -> None:
    labels = celeba / "labels.csv"
    labels.write_text("file,hat\n000001,1\n000002,x,0\n")
    refused(make_folder(celeba, "--labels", str(labels)), f"{labels}, line 3: 3 cells")
    refused(make_folder(celeba, "--labels", str(celeba / "no.csv")), "no.csv")
    refused(make_folder(celeba, "--crop", "1,2,3"), "LEFT,TOP,WIDTH,HEIGHT", "'1,2,3'")
    refused(make_folder(celeba, "--crop", "25,57,178,10"), "000001.jpg: 178x218 pixels, too few")
    (celeba / "img_align_celeba" / "000002.jpg").write_bytes(b"\xff\xd8 cut")
    refused(make_folder(celeba), "1 of the images", "000002.jpg: damaged JPEG")
    refused(diti("data", "make", "folder", str(celeba / "no"), "--out", "o"), "is not a folder")
    assert not (celeba / "set" / INDEX_NAME).exists()


@pytest.mark.parametrize(
    "options",
    [
        ("folder", "d", "--out", "o", "--size", "0"),
        ("folder", "d", "--out", "o", "--rows-per-shard", "10001"),
        ("folder", "d", "--out", " "),
        ("emoji", "--out", "o", "--count", "0"),
        ("emoji", "--out", "o"),
        ("laion-like", "--out", "o", "--count", "9", "--faults", "1.5"),
        ("laion-like", "--out", "o", "--count", "9", "--faults", "nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: tuple[str, ...]) -> None:
    assert diti("data", "make", *options).exit_code == 2
