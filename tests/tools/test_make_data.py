"""Making shard sets: the same shards whatever the number of processes."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.emoji import EmojiSpec, draw_emoji
from data_pipelines.emoji_art import load_art
from data_pipelines.image_folder import plan_folder
from data_pipelines.image_import import BadImagesError, FolderShard, Treatment
from data_pipelines.laion_like import SCHEMA, LaionSpec, draw_row
from data_pipelines.object_store import AlreadyExistsError, ObjectStore
from data_pipelines.shard_index import INDEX_NAME, ShardIndex, read_index, verify_listing
from tests.emoji_art import real_packages
from tools.labels import read_samples
from tools.make_data import import_folder, make_avatars, make_emoji, make_laion_like

STORE = ObjectStore()
SPEC = AvatarSpec(split="test")


def make(url: Path, *, workers: int, count: int = 7, rows_per_shard: int = 3) -> ShardIndex:
    return make_avatars(
        SPEC, count, STORE, str(url), rows_per_shard=rows_per_shard, workers=workers
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Seven avatars in shards of three, by two processes."""
    return make(tmp_path_factory.mktemp("avatars"), workers=2)


def test_the_last_shard_holds_what_is_left(made: ShardIndex):
    assert [shard.name for shard in made.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert made.sizes.tolist() == [3, 3, 1]
    assert read_index(STORE, made.url) == made
    verify_listing(STORE, made)


def test_every_row_is_there_once_and_in_order(made: ShardIndex):
    samples = read_samples(STORE, made)
    assert [sample["jpg"] for sample in samples] == [
        draw_avatar(SPEC, row).jpeg for row in range(7)
    ]
    assert [sample["__key__"] for sample in samples] == [
        *("000000000", "000000001", "000000002"),
        *("000010000", "000010001", "000010002"),
        "000020000",
    ]


def test_tars_of_an_attempt_with_other_numbers_are_not_left_among_the_new_ones(tmp_path: Path):
    STORE.write(str(tmp_path / "00002.tar"), b"of a larger set that was never finished")
    with pytest.raises(AlreadyExistsError, match=r"1 tars that would not belong.*00002\.tar"):
        make_avatars(SPEC, 4, STORE, str(tmp_path), rows_per_shard=2, workers=1)


def test_the_number_of_processes_changes_nothing(made: ShardIndex, tmp_path: Path):
    reported: list[int] = []
    alone = make_avatars(
        SPEC, 7, STORE, str(tmp_path), rows_per_shard=3, workers=1, on_shard=reported.append
    )
    assert alone.digest == made.digest
    assert alone.table.drop(["etag"]) == made.table.drop(["etag"])  # but for the time
    assert sorted(reported) == [1, 3, 3]


def test_a_set_that_is_there_is_not_overwritten(made: ShardIndex):
    before = STORE.read(f"{made.url}/00000.tar")
    with pytest.raises(AlreadyExistsError, match="holds a shard set already"):
        make(Path(made.url), workers=1, count=2)
    assert STORE.read(f"{made.url}/00000.tar") == before


@pytest.mark.parametrize(("count", "rows_per_shard"), [(0, 3), (7, 0), (-1, 3), (7, 10_001)])
def test_nothing_to_make_is_refused(tmp_path: Path, count: int, rows_per_shard: int):
    with pytest.raises(ValueError, match=f"1 to 10000, got {count} and {rows_per_shard}"):
        make(tmp_path, workers=1, count=count, rows_per_shard=rows_per_shard)
    assert STORE.list(str(tmp_path)) == []


# ----------------------------------------------------------------------------------------- emoji


def test_processes_draw_the_same_emoji_as_this_one(tmp_path: Path) -> None:
    packages, spec = real_packages(), EmojiSpec(split="val")
    made = make_emoji(spec, packages, 5, STORE, str(tmp_path / "set"), rows_per_shard=3, workers=2)
    assert made.sizes.tolist() == [3, 2]
    art = load_art(packages)
    for row, sample in enumerate(read_samples(STORE, made)):
        expected = draw_emoji(spec, art, row)
        assert sample["jpg"] == expected.jpeg
        described = json.loads(sample["json"])
        assert described == {"key": sample["__key__"], **expected.metadata}
    with pytest.raises(AlreadyExistsError):
        make_emoji(spec, packages, 5, STORE, str(tmp_path / "set"), rows_per_shard=3, workers=1)


# ---------------------------------------------------------------------------------- raw image-text

LAION = LaionSpec(faults=0.6, rows_per_shard=9)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen rows in shards of nine, by two processes."""
    url = tmp_path_factory.mktemp("raw")
    reported: list[int] = []
    faults = make_laion_like(LAION, 13, STORE, str(url), workers=2, on_shard=reported.append)
    assert sorted(reported) == [4, 9]
    tables = [pq.read_table(path) for path in url.glob("*.parquet")]
    assert faults == Counter(fault for table in tables for fault in table["fault"].to_pylist())
    assert 0 < faults[""] < 13
    return url


def test_a_raw_set_has_three_files_a_shard_and_no_index(raw: Path) -> None:
    assert sorted(path.name for path in raw.iterdir()) == [
        *("00000.parquet", "00000.tar", "00000_stats.json"),
        *("00001.parquet", "00001.tar", "00001_stats.json"),
    ]


def test_webdataset_reads_every_row_and_the_parquet_file_describes_it(raw: Path) -> None:
    expected = [draw_row(LAION, row) for row in range(13)]
    for number, rows in ((0, expected[:9]), (1, expected[9:])):
        samples = wds.WebDataset(str(raw / f"{number:05d}.tar"), shardshuffle=False)
        assert [
            (one["__key__"], {k: v for k, v in one.items() if not k.startswith("__")})
            for one in samples
        ] == [(row.key, row.members) for row in rows]
        table = pq.read_table(raw / f"{number:05d}.parquet")
        assert table.schema == SCHEMA
        assert table.to_pylist() == [row.columns for row in rows]


def test_the_number_of_processes_changes_no_byte_of_a_raw_set(raw: Path, tmp_path: Path) -> None:
    make_laion_like(LAION, 13, STORE, str(tmp_path), workers=1)
    for path in raw.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_no_raw_set_is_written_where_tars_are(raw: Path, made: ShardIndex) -> None:
    for url in (str(raw), made.url):
        before = STORE.list(url)
        with pytest.raises(AlreadyExistsError, match=r"tars already, first .*00000\.tar; delete"):
            make_laion_like(LAION, 3, STORE, url, workers=1)
        assert STORE.list(url) == before


def test_a_raw_set_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        make_laion_like(LAION, 0, STORE, str(tmp_path), workers=1)


# ---------------------------------------------------------------------------------------- folders


def folder_of(path: Path, count: int) -> list[FolderShard]:
    path.mkdir()
    for number in range(count):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path / f"{number}.png")
    return plan_folder(path, treatment=Treatment(), rows_per_shard=2)


def test_an_imported_folder_can_be_read_and_is_the_same_from_any_number_of_processes(
    tmp_path: Path,
) -> None:
    shards = folder_of(tmp_path / "images", 5)
    one, two = (
        import_folder(shards, STORE, str(tmp_path / f"by{workers}"), workers=workers)
        for workers in (1, 2)
    )
    assert one.digest == two.digest
    assert read_index(STORE, two.url) == two
    verify_listing(STORE, two)
    samples = read_samples(STORE, two)
    assert [sample["__key__"] for sample in samples] == ["0", "1", "2", "3", "4"]
    assert samples[4]["png"] == (tmp_path / "images" / "4.png").read_bytes()
    assert json.loads(samples[4]["json"]) == {
        "key": "4",
        "path": "4.png",
        "width": 9,
        "height": 9,
    }


def test_bad_images_of_every_shard_are_named_together_and_there_is_no_set(tmp_path: Path) -> None:
    shards = folder_of(tmp_path / "images", 6)
    for number in (1, 4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"<html>")
    with pytest.raises(BadImagesError, match=r"^2 of the images .* 1\.png: .*; 4\.png: "):
        import_folder(shards, STORE, str(tmp_path / "set"), workers=2)
    assert not STORE.exists(str(tmp_path / "set" / INDEX_NAME))
    for number in (1, 4):
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / f"{number}.png")
    assert import_folder(shards, STORE, str(tmp_path / "set"), workers=1).num_samples == 6
