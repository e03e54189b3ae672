"""The writer: plain WebDataset tars, byte for byte the same every time."""

import hashlib
import json
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset as wds

from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import (
    ShardIndex,
    read_members,
    verify_listing,
    write_index,
)
from data_pipelines.shard_writer import sample_key, shard_name, write_shard
from data_pipelines.tar_members import ShardMismatchError

STORE = ObjectStore()
SAMPLES = [(b"\xff\xd8 first", {"caption": "süß", "a": 1}), (b"\xff\xd8 second", {})]


def test_names_and_keys_are_img2datasets():
    assert shard_name(7) == "00007.tar"
    assert sample_key(7, 123) == "000070123"
    assert sample_key(99_999, 9_999) == "999999999"


@pytest.mark.parametrize("row", [-1, 10_000])
def test_a_row_that_four_digits_cannot_name_is_refused(row: int):
    with pytest.raises(ValueError, match=f"at most 10000 rows, got row {row}"):
        sample_key(0, row)


def test_a_shard_that_is_too_long_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="at most 10000 rows"):
        write_shard(STORE, str(tmp_path), 0, [(b"x", {})] * 10_001)
    assert STORE.list(str(tmp_path)) == []


def test_a_shard_without_samples_is_refused(tmp_path: Path):
    with pytest.raises(ShardMismatchError, match=r"00000\.tar holds no sample"):
        write_shard(STORE, str(tmp_path), 0, [])
    assert STORE.list(str(tmp_path)) == []


def test_webdatasets_own_reader_reads_our_tars(tmp_path: Path):
    write_shard(STORE, str(tmp_path), 3, SAMPLES)
    data = wds.WebDataset(str(tmp_path / "00003.tar"), shardshuffle=False)
    samples = [{k: v for k, v in sample.items() if k in ("__key__", "jpg")} for sample in data]
    assert samples == [
        {"__key__": "000030000", "jpg": SAMPLES[0][0]},
        {"__key__": "000030001", "jpg": SAMPLES[1][0]},
    ]
    described = [sample["json"] for sample in data.decode()]
    assert described == [{"key": "000030000", "caption": "süß", "a": 1}, {"key": "000030001"}]


def test_what_is_returned_describes_what_was_written(store: ObjectStore, s3_url: str):
    shard = write_shard(store, s3_url, 3, iter(SAMPLES))
    tar = store.read(join(s3_url, "00003.tar"))
    assert (shard.name, shard.size_bytes, shard.num_samples) == ("00003.tar", len(tar), 2)
    assert shard.sha256 == hashlib.sha256(tar).hexdigest()
    assert shard.etag == store.stat(join(s3_url, "00003.tar")).etag
    index = write_index(store, s3_url, [shard])
    verify_listing(store, index)
    table = read_members(store, shard)
    assert table.keys == ("000030000", "000030001")
    start = int(table.offsets["jpg"][1])
    assert tar[start : start + int(table.sizes["jpg"][1])] == SAMPLES[1][0]


def test_the_same_samples_make_the_same_bytes_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = write_shard(STORE, str(tmp_path / "a"), 3, SAMPLES)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setenv("USER", "somebody-else")
    unordered = [(jpeg, dict(reversed(described.items()))) for jpeg, described in SAMPLES]
    second = write_shard(STORE, str(tmp_path / "b"), 3, unordered)
    assert replace(first, folder=second.folder, etag=second.etag) == second  # but for the time
    files = [Path(tmp_path, side, "00003.tar").read_bytes() for side in "ab"]
    assert files[0] == files[1]
    assert ShardIndex("a", (first,)).digest == ShardIndex("b", (second,)).digest


def test_the_bytes_never_change_between_versions(tmp_path: Path):
    shard = write_shard(STORE, str(tmp_path), 3, SAMPLES)
    with tarfile.open(tmp_path / "00003.tar") as tar:
        assert [(m.name, m.mtime, m.uname, m.mode) for m in tar][0::2] == [
            ("000030000.jpg", 0, "diti", 0o444),
            ("000030001.jpg", 0, "diti", 0o444),
        ]
        described = tar.extractfile("000030000.json")
        assert described is not None
        assert json.loads(described.read())["caption"] == "süß"
    assert shard.sha256 == "ed9e3441ab268e990b0d4ac2532f00fecad5bcf2564759a7c6837660528cf462"
