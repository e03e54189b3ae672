"""The index: what is in a tar, the proof that it is still that, and named errors when it is not."""

import gzip
import hashlib
import io
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from webdataset import tariterators

from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from data_pipelines.shard_index import (
    MemberTable,
    Shard,
    ShardIndex,
    ShardMismatchError,
    publish_shard,
    read_index,
    read_members,
    scan_tar,
    verify_listing,
    write_index,
)

Members = Sequence[tuple[str, bytes]]
TWO: Members = [("a.jpg", b"x" * 700), ("a.json", b"{}"), ("b.jpg", b"y" * 700), ("b.json", b"[]")]
LONG = "long-name-" * 30
STORE = ObjectStore()


def tar_of(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def headers(data: bytes) -> list[tarfile.TarInfo]:
    return tarfile.open(fileobj=io.BytesIO(data)).getmembers()


def contents(table: MemberTable, data: bytes) -> dict[str, dict[str, bytes]]:
    """Every sample read back out of the tar through the table, CRC checked."""
    samples: dict[str, dict[str, bytes]] = {}
    for row, key in enumerate(table.keys):
        samples[key] = {}
        for extension in table.extensions:
            offset = int(table.offsets[extension][row])
            if offset >= 0:
                content = data[offset : offset + int(table.sizes[extension][row])]
                assert zlib.crc32(content) == table.crc32s[extension][row]
                samples[key][extension] = content
    return samples


def by_webdataset(data: bytes) -> dict[str, dict[str, bytes]]:
    """The same by WebDataset's own code."""
    files = tariterators.tar_file_expander([{"url": "u", "stream": io.BytesIO(data)}])
    return {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in tariterators.group_by_keys(files)
    }


# --------------------------------------------------------------------------------- what is in a tar


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_a_tar_is_read_by_offset_size_and_checksum(tar_format: int):
    data = tar_of(TWO, tar_format)
    table = scan_tar(data, "u")
    assert table.keys == ("a", "b")
    assert table.extensions == ("jpg", "json")
    assert contents(table, data) == {
        "a": {"jpg": b"x" * 700, "json": b"{}"},
        "b": {"jpg": b"y" * 700, "json": b"[]"},
    }


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_that_plain_tarfile_writes_are_read(tar_format: int):
    members = [(LONG + ".jpg", b"1"), (LONG + ".json", b"2"), ("ü/" + "ñ" * 90 + ".jpg", b"3")]
    data = tar_of(members, tar_format)
    assert contents(scan_tar(data, "u"), data) == {
        LONG: {"jpg": b"1", "json": b"2"},
        "ü/" + "ñ" * 90: {"jpg": b"3"},
    }


def test_a_sample_may_lack_a_member_and_a_member_may_be_empty():
    data = tar_of([("a.jpg", b""), ("b.json", b"{}"), ("c.jpg", b"1"), ("c.json", b"2")])
    table = scan_tar(data, "u")
    assert table.offsets["jpg"].tolist()[1] == table.offsets["json"].tolist()[0] == -1
    assert contents(table, data) == {
        "a": {"jpg": b""},
        "b": {"json": b"{}"},
        "c": {"jpg": b"1", "json": b"2"},
    }


def test_folders_and_links_are_no_samples():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/a.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("d/b.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    assert scan_tar(buffer.getvalue(), "u").keys == ("d/b",)


names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "d/", "d.e/", "./", "d/e/"]),
    st.text("aBü-_", min_size=1, max_size=3),
    st.text("jJ.g", min_size=1, max_size=4),
) | st.sampled_from(["README", ".hidden", ".DS_Store", "d/NOTES", "d/.hidden", "__meta__"])


@settings(deadline=None, max_examples=100)
@given(st.lists(names, max_size=6, unique=True))
def test_names_make_the_same_samples_as_in_webdataset(found: list[str]):
    data = tar_of([(name, name.encode()) for name in sorted(found)])
    try:
        table = scan_tar(data, "u")
    except ShardMismatchError:
        assume(False)  # repeats and interruptions have tests of their own
    assert contents(table, data) == by_webdataset(data)


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"3")],
        [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"1")],
    ],
)
def test_interleaved_samples_are_refused_with_member_and_sample(members: Members):
    with pytest.raises(ShardMismatchError, match=r"u: member a\.jp?\w+ .* sample a; .* again"):
        scan_tar(tar_of(members), "u")


@pytest.mark.parametrize("second", ["a.jpg", "a.JPG"])
def test_a_name_that_stands_twice_is_refused(second: str):
    with pytest.raises(ShardMismatchError, match=rf"member {second} repeats or interrupts sample"):
        scan_tar(tar_of([("a.jpg", b"1"), (second, b"2")]), "u")


# ----------------------------------------------------------------------------------- what is no tar


@pytest.mark.parametrize(
    ("fill", "why"),
    [(b"x", "is cut short"), (b"\0", "is cut short|unexpected end of data")],
    ids=["text", "zeros"],
)
def test_a_tar_that_was_cut_anywhere_is_refused(fill: bytes, why: str):
    data = tar_of([(f"{n}.npy", fill * 1_600) for n in range(3)])
    last = headers(data)[-1]
    end = last.offset_data + 2_048
    cuts = set(range(0, end + 1_024, 128)) | {end + 1_023}
    cuts |= {header.offset for header in headers(data)}  # exactly at member boundaries
    for cut in sorted(cuts):
        with pytest.raises(ShardMismatchError, match=rf"s3://b/x\.tar .*({why})"):
            scan_tar(data[:cut], "s3://b/x.tar")
    whole = scan_tar(data[: end + 1_024], "u")  # the padding behind the end mark is not content
    assert whole.keys == scan_tar(data, "u").keys == ("0", "1", "2")


def test_a_damaged_header_does_not_end_the_tar_in_silence():
    data = bytearray(tar_of(TWO))
    at = headers(bytes(data))[2].offset
    data[at + 3] ^= 1
    assert len(by_webdataset(bytes(data))) == 1, "the reason for the check: half the samples"
    with pytest.raises(ShardMismatchError, match=f"goes on after byte {at}, .* is damaged"):
        scan_tar(bytes(data), "u")


def test_a_tar_with_a_second_one_behind_it_is_refused():
    with pytest.raises(ShardMismatchError, match="a second tar was appended"):
        scan_tar(tar_of(TWO) + tar_of([("c.jpg", b"1")]), "u")


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"x" * 600 + b"\0" * 2_048, gzip.compress(tar_of(TWO))]
)
def test_what_is_no_tar_at_all_is_refused(data: bytes):
    with pytest.raises(ShardMismatchError, match="u "):
        scan_tar(data, "u")


@pytest.mark.parametrize("data", [tar_of([]), tar_of([("README", b"hi")])])
def test_a_tar_without_samples_is_scanned_but_not_published(data: bytes, tmp_path: Path):
    assert scan_tar(data, "u").keys == ()
    with pytest.raises(ShardMismatchError, match=r"0\.tar holds no sample"):
        publish_shard(STORE, str(tmp_path), "0.tar", data)
    assert STORE.list(str(tmp_path)) == []


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
    assert index.sizes == (1, 2, 3)
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
    assert read_members(store, again, again.shards[2]).keys == ("20", "21", "22")


def test_a_member_table_is_read_back_as_it_was_scanned(tmp_path: Path):
    data = tar_of([("a.jpg", b"1"), ("b.seg.png", b"2"), ("b.offset", b"3"), ("c.key", b"")])
    index = write_index(STORE, str(tmp_path), [publish_shard(STORE, str(tmp_path), "0.tar", data)])
    table = read_members(STORE, index, index.shards[0])
    assert contents(table, data) == contents(scan_tar(data, "u"), data)
    assert table.extensions == ("jpg", "key", "offset", "seg.png")


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
    shard = Shard("0.tar", 1, "etag", "aa", 2, "bb")
    assert ShardIndex("s3://b/x", (shard,)).digest == (
        hashlib.sha256(b'[["0.tar", 2, "aa", "bb"]]').hexdigest()
    )


def test_without_an_index_there_is_no_shard_set(tmp_path: Path):
    with pytest.raises(ObjectMissingError, match=r"no shard index at .*index\.parquet; check data"):
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
    assert read_members(STORE, index, index.shards[1]).keys == ("10", "11")
    with pytest.raises(ShardMismatchError, match=r"2\.members\.parquet is not the member table"):
        read_members(STORE, index, index.shards[2])
    Path(index.url, "2.members.parquet").unlink()
    with pytest.raises(ObjectMissingError, match=r"2\.members\.parquet"):
        read_members(STORE, index, index.shards[2])


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
        f"2.tar has 5120 bytes instead of 10240. Restore them, or make the set again."
    )


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
