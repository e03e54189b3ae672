"""The index: what a shard set is, the proof that it is still that, and named errors if not."""

import hashlib
import io
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from data_pipelines.shard_index import (
    Shard,
    ShardIndex,
    publish_shard,
    read_index,
    read_members,
    verify_listing,
    write_index,
)
from data_pipelines.tar_members import ShardMismatchError
from tests.tars import tar_of

STORE = ObjectStore()


# ---------------------------------------------------------------------------------------- the index


def publish_set(store: ObjectStore, url: str, count: int = 3) -> ShardIndex:
    shards = [
        publish_shard(store, url, f"{n}.tar", tar_of([(f"{n}{row}.jpg", b"%d" % row * 9)
                      for row in range(n + 1)]))
        for n in range(count)
    ]  # fmt: skip
    return write_index(store, url, shards)


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return publish_set(STORE, str(tmp_path / "set"))


def test_an_index_is_read_back_equal_and_counts_its_samples(index: ShardIndex):
    assert read_index(STORE, index.url) == index
    assert index.sizes.tolist() == [1, 2, 3]
    assert index.num_samples == 6
    tar = Path(index.url, "1.tar").read_bytes()
    assert index.shards[1].size_bytes == len(tar)
    assert index.shards[1].sha256 == hashlib.sha256(tar).hexdigest()


def test_an_index_and_its_members_are_read_back_from_s3(store: ObjectStore, s3_url: str):
    index = publish_set(store, s3_url)
    again = read_index(store, s3_url)
    assert again == index
    assert all(shard.etag for shard in again.shards)
    verify_listing(store, again)
    assert read_members(store, again.shards[2]).keys == ("20", "21", "22")


def test_extensions_may_be_named_like_columns(tmp_path: Path):
    data = tar_of([("a.jpg", b"1"), ("b.seg.png", b"2"), ("b.block", b"3"), ("c.key", b"")])
    index = write_index(STORE, str(tmp_path), [publish_shard(STORE, str(tmp_path), "0.tar", data)])
    table = read_members(STORE, index.shards[0])
    assert table.extensions == ("block", "jpg", "key", "seg.png")


@pytest.mark.parametrize("data", [tar_of([]), tar_of([("README", b"hi")])])
def test_a_tar_without_samples_is_not_published(data: bytes, tmp_path: Path):
    with pytest.raises(ShardMismatchError, match=r"0\.tar holds no sample"):
        publish_shard(STORE, str(tmp_path), "0.tar", data)
    assert STORE.list(str(tmp_path)) == []


def test_the_digest_is_of_content_and_order_not_of_place(index: ShardIndex, tmp_path: Path):
    shutil.copytree(index.url, tmp_path / "copy")
    assert read_index(STORE, str(tmp_path / "copy")).digest == index.digest
    assert publish_set(STORE, str(tmp_path / "again")).digest == index.digest
    backwards = ShardIndex(index.url, index.shards[::-1])
    fewer = ShardIndex(index.url, index.shards[:2])
    other_tar = publish_shard(STORE, str(tmp_path / "x"), "2.tar", tar_of([("20.jpg", b"?")]))
    changed = ShardIndex(index.url, (*index.shards[:2], other_tar))
    assert len({i.digest for i in (index, backwards, fewer, changed)}) == 4


def test_the_digest_never_changes_between_versions():
    shard = Shard("s3://b/x", "0.tar", 1, "etag", "aa" * 32, 2, "bb" * 32)
    assert ShardIndex("s3://b/x", (shard,)).digest == (
        hashlib.sha256(b"0.tar\x002\x00" + b"\xaa" * 32 + b"\xbb" * 32).hexdigest()
    )


def test_without_an_index_there_is_no_shard_set(tmp_path: Path):
    with pytest.raises(ObjectMissingError, match=r"no shard index at .*index\.parquet; check"):
        read_index(STORE, str(tmp_path))


def test_an_index_that_is_none_is_refused_by_name(tmp_path: Path):
    def refused(data: bytes, why: str) -> None:
        STORE.write(join(str(tmp_path), "index.parquet"), data)
        with pytest.raises(ShardMismatchError, match=rf"shard index .*index\.parquet {why}"):
            read_index(STORE, str(tmp_path))

    sink = io.BytesIO()
    pq.write_table(pa.table({"file": ["a"]}), sink)
    refused(b"", "cannot be read")
    refused(b"PAR1 half", "cannot be read")
    refused(sink.getvalue(), "cannot be read")
    refused(sink.getvalue()[:-20], "cannot be read")
    write_index(STORE, str(tmp_path), [])
    refused(STORE.read(join(str(tmp_path), "index.parquet")), "lists no shard")


# -------------------------------------------------------------------------- what changed afterwards


def test_a_member_table_that_is_not_the_indexed_one_is_refused(index: ShardIndex):
    shutil.copy(Path(index.url, "1.members.parquet"), Path(index.url, "2.members.parquet"))
    assert read_members(STORE, index.shards[1]).keys == ("10", "11")
    with pytest.raises(ShardMismatchError, match=r"2\.members\.parquet is not the member table"):
        read_members(STORE, index.shards[2])
    Path(index.url, "2.members.parquet").unlink()
    with pytest.raises(ObjectMissingError, match=r"2\.members\.parquet"):
        read_members(STORE, index.shards[2])


def test_a_whole_set_passes_also_with_other_objects_beside_it(index: ShardIndex):
    verify_listing(STORE, index)
    verify_listing(STORE, ShardIndex(index.url + "/", index.shards))
    STORE.write(join(index.url, "notes.txt"), b"")
    verify_listing(STORE, index)


def test_every_missing_and_every_cut_shard_is_named(index: ShardIndex):
    Path(index.url, "0.tar").unlink()
    with Path(index.url, "2.tar").open("r+b") as tar:
        tar.truncate(5_120)  # nothing but the padding is gone
    with pytest.raises(ShardMismatchError) as caught:
        verify_listing(STORE, index)
    assert str(caught.value) == (
        f"shards at {index.url} do not match their index: 0.tar is missing; "
        f"2.tar has 5120 bytes instead of 10240. Restore them; or index the set again with "
        "`diti data index`, for new runs and exports; or have a training run replace their samples "
        "(data.error_budget of at least 0.667)."
    )


def test_the_budget_that_is_told_has_room_for_what_is_lost(index: ShardIndex):
    Path(index.url, "1.tar").unlink()  # a third of the samples
    with pytest.raises(ShardMismatchError, match=r"of at least 0\.334\)\.$"):
        verify_listing(STORE, index)


def test_a_backup_in_a_folder_below_does_not_stand_in_for_a_missing_shard(index: ShardIndex):
    STORE.write(join(index.url, "old", "1.tar"), Path(index.url, "1.tar").read_bytes())
    verify_listing(STORE, index)
    Path(index.url, "1.tar").unlink()
    with pytest.raises(ShardMismatchError, match=r"1\.tar is missing"):
        verify_listing(STORE, index)


def test_of_many_problems_the_first_ten_are_named_and_the_rest_counted(tmp_path: Path):
    index = publish_set(STORE, str(tmp_path), count=12)
    for shard in index.shards:
        Path(index.url, shard.name).unlink()
    with pytest.raises(ShardMismatchError, match=r"9\.tar is missing and 2 more\."):
        verify_listing(STORE, index)


def test_a_local_shard_replaced_by_one_of_the_same_size_is_named(index: ShardIndex):
    tar = Path(index.url, "1.tar")
    tar.touch()  # as a copy would: another time, the same bytes
    verify_listing(STORE, index)
    tar.write_bytes(tar.read_bytes().replace(b"111", b"222"))
    with pytest.raises(ShardMismatchError, match=r"1\.tar was replaced \(of the same size, with o"):
        verify_listing(STORE, index)


def test_a_set_that_was_copied_to_s3_or_from_there_is_the_same_set(
    store: ObjectStore, s3_url: str, index: ShardIndex, tmp_path: Path
):
    for info in STORE.list(index.url):
        store.upload(Path(info.url), join(s3_url, Path(info.url).name))
    there = read_index(store, s3_url)
    verify_listing(store, there)
    for info in store.list(s3_url):
        store.download(info.url, tmp_path / "back" / Path(info.url).name)
    back = read_index(store, str(tmp_path / "back"))
    verify_listing(store, back)
    assert back.digest == there.digest == index.digest


def test_a_shard_replaced_by_one_of_the_same_size_is_named(store: ObjectStore, s3_url: str):
    index = publish_set(store, s3_url)
    old = store.read(join(s3_url, "1.tar"))
    store.write(join(s3_url, "1.tar"), old)
    verify_listing(store, index)  # the same bytes again are the same shard
    store.write(join(s3_url, "1.tar"), old.replace(b"111", b"222"))
    with pytest.raises(ShardMismatchError, match=r"1\.tar was replaced \(ETag \w+, not \w+\)"):
        verify_listing(store, index)
    store.delete(join(s3_url, "1.tar"))
    with pytest.raises(ShardMismatchError, match=r"1\.tar is missing"):
        verify_listing(store, index)
