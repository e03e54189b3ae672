"""Indexing sets that others wrote, and saying what became of a set since; all on real Ray."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cluster.index import index_set
from cluster.session import ray_session
from cluster.stats import count_set
from configs.schema import DataConfig
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_order import SampleOrder
from data_pipelines.sample_stream import open_stream
from data_pipelines.shard_index import read_index, verify_listing
from tests.tars import headers, tar_of
from tools.cli import app


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(number: int, *, interleaved: bool = False, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Three samples in img2dataset's naming."""
    images = [(f"{number:05d}{row:04d}.jpg", jpeg(10 * number + row)) for row in range(3)]
    texts = [(f"{number:05d}{row:04d}.txt", b"a face") for row in range(3)]
    pairs = [member for pair in zip(images, texts, strict=True) for member in pair]
    return tar_of([*images, *texts] if interleaved else pairs, tar_format)


@pytest.fixture
def written(store: ObjectStore, s3_url: str) -> str:
    """A set of another writer's tars, without an index."""
    formats = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    for number, tar_format in enumerate(formats):
        store.write(join(s3_url, f"{number:05d}.tar"), tar(number, tar_format=tar_format))
    store.write(join(s3_url, "00003.tar"), tar(3, interleaved=True))
    store.write(join(s3_url, "00003_stats.json"), b"{}")  # img2dataset leaves such beside them
    return s3_url


def diti(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", *arguments, "--workers", "1"])


def test_tars_of_other_writers_become_a_set_that_can_be_trained_on(
    store: ObjectStore, written: str
):
    result = diti("index", written)
    assert result.exit_code == 0, result.output
    assert "12 samples in 4 shards" in result.output
    assert "3 samples have members of others among theirs" in result.output
    index = read_index(store, written)
    verify_listing(store, index)
    order = SampleOrder(index.sizes, seed=0, lanes=4, window_rows=2)
    data = DataConfig(shards=written, image_size_px=16)
    batches = open_stream(
        store, index, order, data, global_batch=12, micro_batch=12, rank=0, world_size=1,
        first_batch=0,
    )  # fmt: skip
    assert sorted(next(batches).keys) == [f"{n:05d}{row:04d}" for n in range(4) for row in range(3)]


def test_damaged_tars_are_named_and_left_out(store: ObjectStore, written: str):
    whole = tar(4)
    second = headers(whole)[2].offset
    store.write(join(written, "00004.tar"), whole[:second])  # exactly at a member's boundary
    store.write(join(written, "00005.tar"), b"")
    result = diti("index", written)
    assert result.exit_code == 1
    assert "12 samples in 4 shards" in result.stdout
    assert "00004.tar has no end-of-archive mark" in result.stderr
    assert "00005.tar is not a readable tar (empty file)" in result.stderr
    assert "2 problems left out" in result.stderr
    assert "00005.tar is not in the index" in diti("verify", written).stderr
    store.write(join(written, "00006.tar"), tar(6))
    deep = diti("verify", written, "--deep").stderr
    cut = join(written, "00004.tar")
    assert f"00004.tar is not in the index: {cut} has no end-of-archive mark" in deep
    assert "00005.tar is not in the index" in deep
    assert "(empty file)" in deep
    assert "00006.tar is not in the index: it is sound and came later (samples: 3)" in deep
    assert "3 problems found" in deep


def test_indexing_goes_on_where_it_was_and_reads_again_what_was_replaced(
    store: ObjectStore, written: str
):
    index_set(store, written, num_workers=1)
    before = read_index(store, written)
    for name in ("00000.members.parquet", "index.parquet"):
        store.delete(join(written, name))
    store.write(join(written, "00002.tar"), tar(9))
    kept = store.stat(join(written, "00001.members.parquet"))
    index, _ = index_set(store, written, num_workers=1)
    assert store.stat(join(written, "00001.members.parquet")) == kept
    assert index.shards[:2] == before.shards[:2]
    assert index.shards[2].sha256 != before.shards[2].sha256
    assert read_index(store, written) == index


def test_indexing_again_mends_a_damaged_member_table(store: ObjectStore, written: str):
    index_set(store, written, num_workers=1)
    where = join(written, "00001.members.parquet")
    data = bytearray(store.read(where))
    data[45] ^= 1
    store.write(where, bytes(data))
    result = diti("verify", written, "--deep")
    assert "00001.tar has no usable member table" in result.stderr
    index_set(store, written, num_workers=1)
    assert diti("verify", written, "--deep").exit_code == 0


def test_a_folder_without_a_usable_tar_is_refused(store: ObjectStore, s3_url: str):
    assert "there is no .tar below" in diti("index", s3_url).stderr
    store.write(join(s3_url, "x.tar"), b"<html>")
    result = diti("index", s3_url)
    assert result.exit_code == 2
    assert "none of the 1 tars" in result.stderr


def test_verify_finds_every_kind_of_change(store: ObjectStore, written: str):
    index_set(store, written, num_workers=2)
    for options, said in (((), "every tar is there"), (("--deep",), "every image can be decoded")):
        sound = diti("verify", written, *options)
        assert sound.exit_code == 0
        assert said in sound.stdout
    store.delete(join(written, "00000.tar"))
    store.write(join(written, "00001.tar"), tar(1)[:-512])
    other = bytearray(tar(2, tar_format=tarfile.GNU_FORMAT))
    member = headers(bytes(other))[2]
    other[member.offset_data + 40] ^= 1
    store.write(join(written, "00002.tar"), bytes(other))
    store.write(join(written, "00007.tar"), tar(7))
    result = diti("verify", written)
    assert result.exit_code == 1
    for line in (
        "00000.tar is missing",
        "00001.tar has 9728 bytes instead of 10240",
        "00002.tar was replaced (ETag",
        "00007.tar is not in the index",
    ):
        assert line in result.stderr, result.stderr


def test_a_local_tar_is_compared_by_its_content_and_deep_verification_names_the_member(
    store: ObjectStore, tmp_path: Path
):
    folder = str(tmp_path)
    for number in range(3):
        store.write(join(folder, f"{number}.tar"), tar(number % 2))
    index_set(store, folder, num_workers=1)
    content = bytearray(store.read(join(folder, "1.tar")))
    member = headers(bytes(content))[2]
    content[member.offset_data + 40] ^= 1
    store.write(join(folder, "1.tar"), bytes(content))
    (tmp_path / "0.tar").touch()  # copied, perhaps, but the same
    shallow, deep = diti("verify", folder), diti("verify", folder, "--deep")
    assert "2.tar holds the same bytes as 0.tar" in shallow.stderr
    assert "1.tar was replaced (of the same size, with other content)" in shallow.stderr
    assert "2 problems found" in shallow.stderr
    assert f"1.tar was replaced (members with other content: 1, first {member.name})" in deep.stderr
    assert "2 problems found" in deep.stderr


def test_a_tar_that_is_gone_is_missing_whatever_it_held(store: ObjectStore, tmp_path: Path):
    for name in ("0.tar", "1.tar"):
        store.write(str(tmp_path / name), tar(0))
    index_set(store, str(tmp_path), num_workers=1)
    (tmp_path / "1.tar").unlink()
    for options in ((), ("--deep",)):
        assert "1.tar is missing" in diti("verify", str(tmp_path), *options).stderr


def test_deep_verification_finds_images_that_were_broken_before_they_were_indexed(
    store: ObjectStore, s3_url: str
):
    store.write(join(s3_url, "0.tar"), tar(0, interleaved=True))
    store.write(join(s3_url, "1.tar"), tar_of([("a.jpg", jpeg(1)[:-200]), ("b.jpg", jpeg(2))]))
    index_set(store, s3_url, num_workers=1)
    assert diti("verify", s3_url).exit_code == 0
    deep = diti("verify", s3_url, "--deep")
    assert deep.exit_code == 1
    assert "1.tar has unusable images (1), first: sample a of" in deep.stderr
    assert "3 samples have members of others among theirs" in deep.stdout


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_count_members_sizes_captions_scores_and_what_is_broken(
    store: ObjectStore, s3_url: str, tmp_path: Path
):
    def image(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "JPEG")
        return buffer.getvalue()

    store.write(join(s3_url, "0.tar"), tar_of([
        ("a.jpg", image(200, 100)), ("a.txt", b"four"), ("a.json", b'{"aesthetic": 5.5}'),
        ("b.jpg", image(100, 400)), ("b.json", b'{"similarity": 0.25, "caption": "sixsix"}'),
    ]))  # fmt: skip
    store.write(join(s3_url, "1.tar"), tar_of([
        ("c.jpg", b"no image"), ("c.json", b"no json"), ("d.json", b'{"aesthetic": true}'),
        ("e.png", image(3000, 3000)), ("e.json", b'{"AESTHETIC_SCORE": 6.5}'),
    ]))  # fmt: skip
    index, _ = index_set(store, s3_url, num_workers=1)
    stats = count_set(store, index, num_workers=1)
    assert stats.samples == 5
    assert stats.members == {"jpg": 3, "txt": 1, "json": 5, "png": 1}
    assert stats.problems == {
        "image header cannot be read": 1, "json cannot be read": 1, "no image": 1
    }  # fmt: skip
    short_side, aesthetic = stats.histograms["short_side"], stats.histograms["aesthetic"]
    assert (short_side.count, short_side.least, short_side.most) == (3, 100, 3000)
    assert (short_side.counts[3], short_side.counts[-1]) == (2, 1)  # bins of 32 px; beyond 2048
    assert (aesthetic.least, aesthetic.mean, aesthetic.most) == (5.5, 6.0, 6.5)
    assert stats.histograms["similarity"].mean == 0.25
    assert stats.histograms["caption"].mean == 5

    result = diti("stats", s3_url, "--out", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    assert "5 samples in 2 shards" in result.stdout
    assert "Aesthetic score" in result.stdout
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "image header cannot be read" in page


def test_indexing_says_what_it_replaces_and_which_samples_have_no_image(
    store: ObjectStore, s3_url: str
):
    store.write(join(s3_url, "0.tar"), tar_of([("a.jpg", jpeg(1)), ("b.2.final.jpg", jpeg(2))]))
    first = diti("index", s3_url)
    assert "without an image (jpg, jpeg, png, webp): 1 sample\n" in first.stdout
    assert "it was" not in first.stdout
    assert "it was" not in diti("index", s3_url).stdout, "nothing has changed"
    store.write(join(s3_url, "0.tar"), tar_of([("a.jpg", jpeg(1))]))
    again = diti("index", s3_url)
    assert "it was 2 samples in 1 shard, index " in again.stdout
    assert "cannot go on with this one" in again.stdout
    assert "without an image" not in again.stdout
