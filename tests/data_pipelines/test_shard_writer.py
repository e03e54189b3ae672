"""The writer: plain WebDataset tars, byte for byte the same every time."""

import hashlib
import json
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import (
    ShardIndex,
    read_members,
    verify_listing,
    write_index,
)
from data_pipelines.shard_writer import (
    sample_key,
    shard_name,
    write_raw_shard,
    write_shard,
)
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


RAW = [
    ("000030000", {"jpg": b"\xff\xd8 first", "txt": b"a", "json": b"{}"}, {"n": 1, "caption": "a"}),
    ("000030001", {"jpg": b"no image"}, {"n": 2, "caption": None}),
]
RAW_SCHEMA = pa.schema([("n", pa.int32()), ("caption", pa.string())])


def test_a_raw_shard_is_what_img2dataset_leaves(store: ObjectStore, s3_url: str):
    write_raw_shard(store, s3_url, 3, iter(RAW), RAW_SCHEMA)
    names = ("00003.parquet", "00003.tar", "00003_stats.json")
    assert [info.url for info in store.list(s3_url)] == [join(s3_url, name) for name in names]
    with store.local_copy(join(s3_url, "00003.tar")) as tar:
        samples = list(wds.WebDataset(str(tar), shardshuffle=False))
    assert [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in samples
    ] == [(key, members) for key, members, _ in RAW]
    table = pq.read_table(pa.BufferReader(store.read(join(s3_url, "00003.parquet"))))
    assert table == pa.Table.from_pylist([line for *_, line in RAW], RAW_SCHEMA)
    stats = json.loads(store.read(join(s3_url, "00003_stats.json")))
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (2, 2, {"success": 2})


def test_raw_shards_are_the_same_bytes_at_any_time_and_leave_no_scratch_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    write_raw_shard(STORE, str(tmp_path / "a"), 3, RAW, RAW_SCHEMA)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setenv("USER", "somebody-else")
    write_raw_shard(STORE, str(tmp_path / "b"), 3, RAW, RAW_SCHEMA)
    for name in ("00003.tar", "00003.parquet", "00003_stats.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert list(scratch.iterdir()) == []


def test_a_raw_shard_whose_rows_fail_leaves_nothing(tmp_path: Path):
    def failing():
        yield RAW[0]
        raise ValueError("this row cannot be drawn")

    with pytest.raises(ValueError, match="cannot be drawn"):
        write_raw_shard(STORE, str(tmp_path), 3, failing(), RAW_SCHEMA)
    assert STORE.list(str(tmp_path)) == []
