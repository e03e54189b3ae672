"""The feature store: what is exported is what is read, by us or by pyarrow alone, and only that."""

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.feature_part import (
    FeatureColumn,
    FeatureMismatchError,
    PartInfo,
    encode_part,
    part_moments,
    select_columns,
)
from data_pipelines.feature_store import (
    FeatureManifest,
    part_name,
    publish_manifest,
    read_features,
    read_manifest,
)
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectStore,
    join,
)

LOCAL = ObjectStore()  # reads and writes folders without a server
COLUMNS = (
    FeatureColumn("z000", (0, 50), (0, 4)),
    FeatureColumn("z001", (50, 300), (4, 104)),
    FeatureColumn("z002", (300, 500), (104, 200)),
    FeatureColumn("z003", (500, 1000), (200, 256)),
)
D = 256
FOOTER_BYTES = 64 * 1024  # what pyarrow fetches first, from the end of the file


@dataclass(frozen=True)
class Part:
    name: str
    shard: str
    keys: list[str]
    rows: list[int]
    features: np.ndarray = field(repr=False)

    def encoded(self) -> bytes:
        return encode_part(
            COLUMNS, keys=self.keys, shard=self.shard, rows=self.rows, features=self.features
        )


def make_part(stem: str, num_rows: int, *, source: str = "avatars") -> Part:
    """Normal noise; every third row of the shard is absent, as after quarantine."""
    rows = [row for row in range(2 * num_rows) if row % 3 != 2][:num_rows]
    noise = np.random.default_rng([num_rows, *stem.encode()]).standard_normal((num_rows, D))
    keys = [f"{stem}{row:04d}" for row in rows]
    return Part(part_name(source, stem), f"{stem}.tar", keys, rows, noise.astype(np.float32))


def rows_of(data: bytes) -> int:
    return pq.ParquetFile(io.BytesIO(data)).metadata.num_rows


def make_manifest(
    parts: dict[str, bytes], columns: tuple[FeatureColumn, ...] = COLUMNS
) -> FeatureManifest:
    infos = {
        name: PartInfo(rows_of(data), len(data), hashlib.sha256(data).hexdigest())
        for name, data in parts.items()
    }
    return FeatureManifest(
        columns=columns,
        dtype="float16",
        encoder_sha256="e" * 64,
        checkpoint="step-00000100",
        backbone_sha256="b" * 64,
        config={"encoder": {"latent_dim": D}},
        source_url="s3://diti/avatars",
        index_digest="d" * 64,
        rows=sum(info.rows for info in infos.values()),
        parts=infos,
        mean=[0.0] * columns[-1].dims[1],
        std=[1.0] * columns[-1].dims[1],
    )


def export(store: ObjectStore, url: str, parts: list[Part]) -> FeatureManifest:
    encoded = {part.name: part.encoded() for part in parts}
    for name, data in encoded.items():
        store.write(join(url, name), data)
    manifest = make_manifest(encoded)
    publish_manifest(store, url, manifest)
    return manifest


def rounded(features: np.ndarray) -> np.ndarray:
    return features.astype(np.float16).astype(np.float32)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "features")


@pytest.fixture(params=["s3", "path"])
def base(request: pytest.FixtureRequest, s3_url: str, tmp_path: Path) -> str:
    return {"s3": s3_url, "path": str(tmp_path / "features")}[request.param]


# --------------------------------------------------------------------------------- the round trip


def test_what_is_exported_is_read_back_in_manifest_order(store: ObjectStore, base: str):
    # An empty part is a shard of which nothing could be decoded.
    parts = [make_part("00001", 30), make_part("00000", 50), make_part("00000", 0, source="emoji")]
    manifest = export(store, base, parts)
    assert read_manifest(store, base) == manifest
    features = read_features(store, base)
    assert features.columns == COLUMNS
    assert features.keys == [key for part in parts for key in part.keys]
    assert features.shards == ["00001.tar"] * 30 + ["00000.tar"] * 50
    assert features.rows.dtype == np.int32
    assert features.rows.tolist() == [row for part in parts for row in part.rows]
    assert features.values.dtype == np.float32
    expected = rounded(np.concatenate([part.features for part in parts]))
    np.testing.assert_array_equal(features.values, expected)


def test_many_parts_of_any_size_keep_their_order(url: str):
    columns = (FeatureColumn("z000", (0, 1), (0, 1)), FeatureColumn("z001", (1, 2), (1, 3)))
    sizes = [70_000, 1, 0, 99, *[7] * 20]  # the first one has three row groups
    values = np.random.default_rng(0).standard_normal((sum(sizes), 3)).astype(np.float32)
    parts = {}
    for number, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        rows = np.arange(start, start + size)
        name = part_name("set", f"{99 - number}")
        parts[name] = encode_part(
            columns, keys=[str(r) for r in rows], shard=name, rows=rows, features=values[rows]
        )
        LOCAL.write(join(url, name), parts[name])
    publish_manifest(LOCAL, url, make_manifest(parts, columns))
    features = read_features(LOCAL, url)
    assert features.rows.tolist() == [int(key) for key in features.keys] == [*range(sum(sizes))]
    np.testing.assert_array_equal(features.values, rounded(values))


def test_equal_input_gives_equal_bytes():
    part = make_part("00000", 500)
    again = replace(part, features=np.asfortranarray(part.features))
    assert part.encoded() == again.encoded()
    changed = part.features.copy()
    changed[499, 255] += 1
    assert part.encoded() != replace(part, features=changed).encoded()


def test_columns_are_stored_so_that_any_parquet_reader_gets_at_one():
    parquet = pq.ParquetFile(io.BytesIO(make_part("00000", 500).encoded()))
    assert parquet.schema_arrow.names == ["key", "shard", "row", "z000", "z001", "z002", "z003"]
    assert not any(entry.nullable for entry in parquet.schema_arrow)
    z001 = parquet.schema_arrow.field("z001").type
    assert z001 == pa.list_(pa.field("element", pa.float16(), nullable=False), 100)
    assert parquet.num_row_groups == 1
    for number in range(3, 7):
        chunk = parquet.metadata.row_group(0).column(number)
        assert not chunk.has_dictionary_page
        # DuckDB 2.0 reads float16 in no other encoding.
        assert set(chunk.encodings) == {"RLE", "PLAIN"}


def test_a_sample_of_512_dimensions_takes_less_than_its_float16_values():
    columns = tuple(FeatureColumn(f"z{i:03d}", (i, i + 1), (8 * i, 8 * i + 8)) for i in range(64))
    noise = np.random.default_rng(0).standard_normal((10_000, 512)).astype(np.float32)
    keys = [f"00007{row:04d}" for row in range(10_000)]
    data = encode_part(columns, keys=keys, shard="00007.tar", rows=range(10_000), features=noise)
    assert len(data) / 10_000 < 960 < 2 * 512


def test_a_part_is_named_after_source_and_shard():
    assert part_name("avatars", "00007") == "avatars/00007.parquet"


@pytest.mark.parametrize(("source", "stem"), [("", "0"), ("a", ""), ("a/b", "0"), ("..", "0")])
def test_a_part_name_that_leaves_its_folder_is_refused(source: str, stem: str):
    with pytest.raises(ValueError, match="plain names"):
        part_name(source, stem)


# ---------------------------------------------------------------------------- what encode refuses


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -1e30])
def test_a_value_that_float16_cannot_hold_is_refused_by_key_and_dimension(value: float):
    part = make_part("00000", 10)
    part.features[7, 104] = value
    with pytest.raises(ValueError, match=rf"{part.keys[7]} of 00000\.tar .* dimension 104 "):
        part.encoded()


def test_values_that_round_into_float16_are_kept():
    part = make_part("00000", 1)
    part.features[0, :3] = [65519.0, -65504.0, 1e-9]
    stored = pq.read_table(io.BytesIO(part.encoded()))["z000"].to_pylist()[0]
    assert stored[:3] == [65504.0, -65504.0, 0.0]


@pytest.mark.parametrize(
    "change",
    [{"keys": ["a"]}, {"rows": [0]}, {"features": np.zeros((2, D - 1), np.float32)}],
)
def test_lengths_that_differ_are_refused(change: dict):
    with pytest.raises(ValueError, match=r"features of 00000\.tar have shape"):
        replace(make_part("00000", 2), **change).encoded()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((), "at least one column"),
        ((replace(COLUMNS[0], name="z001"),), "must be named z000"),
        ((COLUMNS[0], replace(COLUMNS[1], dims=(5, 104))), "dimensions of column z001"),
        ((COLUMNS[0], replace(COLUMNS[1], timesteps=(49, 300))), "time-steps of column z001"),
        ((replace(COLUMNS[0], dims=(0, 0)),), r"dimensions of column z000.*\[0, 0\)"),
    ],
)
def test_columns_that_do_not_tile_z_are_refused(columns, message: str):
    with pytest.raises(ValueError, match=message):
        encode_part(columns, keys=[], shard="s", rows=[], features=np.zeros((0, D), np.float32))


# -------------------------------------------------------------------------------------- moments


def test_moments_of_the_parts_add_up_to_mean_and_std_of_what_is_read(url: str):
    parts = [make_part("00000", 300), make_part("00001", 0), make_part("00002", 200)]
    export(LOCAL, url, parts)
    values = read_features(LOCAL, url).values.astype(np.float64)
    moments = [
        part_moments(LOCAL.read(join(url, part.name)), COLUMNS, shard=part.shard, where=part.name)
        for part in parts
    ]
    count = sum(m.count for m in moments)
    mean = sum(m.sum for m in moments) / count
    std = np.sqrt(sum(m.sum_of_squares for m in moments) / count - mean**2)
    assert count == 500
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_moments_of_a_damaged_part_are_refused(damage: str):
    data = bytearray(make_part("00000", 100).encoded())
    data[len(data) // 2] ^= 1
    damaged = {"cut": bytes(data[:-1]), "flipped": bytes(data), "other": b"no parquet"}[damage]
    with pytest.raises(FeatureMismatchError, match=r"out/0\.parquet is (damaged|not a readable)"):
        part_moments(damaged, COLUMNS, shard="00000.tar", where="out/0.parquet")


def test_moments_are_of_the_part_that_was_asked_for_or_none():
    part = make_part("00000", 30)
    swapped = replace(part, rows=[part.rows[1], part.rows[0], *part.rows[2:]])
    for data, columns, shard in (
        (part.encoded(), COLUMNS, "00001.tar"),
        (part.encoded(), COLUMNS[:-1], "00000.tar"),
        (swapped.encoded(), COLUMNS, "00000.tar"),
    ):
        with pytest.raises(FeatureMismatchError, match=r"^out/0\.parquet "):
            part_moments(data, columns, shard=shard, where="out/0.parquet")


# ------------------------------------------------------------------------------------ the manifest


def edit_manifest(url: str, **change: object) -> None:
    """Change fields of a published manifest behind the store's back."""
    where = join(url, "manifest.json")
    LOCAL.write(where, json.dumps({**json.loads(LOCAL.read(where)), **change}).encode())


def test_the_manifest_is_refused_while_a_part_is_missing_or_cut(store: ObjectStore, base: str):
    parts = {part.name: part.encoded() for part in (make_part("00000", 5), make_part("00001", 5))}
    store.write(join(base, "avatars/00000.parquet"), parts["avatars/00000.parquet"][:-7])
    with pytest.raises(FeatureMismatchError) as error:
        publish_manifest(store, base, make_manifest(parts))
    assert "avatars/00001.parquet is missing" in str(error.value)
    assert "avatars/00000.parquet has " in str(error.value)
    with pytest.raises(ObjectMissingError):
        read_manifest(store, base)


def test_without_manifest_the_export_is_not_finished(store: ObjectStore, base: str):
    part = make_part("00000", 5)
    store.write(join(base, part.name), part.encoded())
    with pytest.raises(ObjectMissingError, match=r"manifest\.json: this is no feature set"):
        read_features(store, base)


def test_a_missing_bucket_is_not_taken_for_an_unfinished_export(store: ObjectStore):
    with pytest.raises(BucketMissingError, match="no-such-bucket"):
        read_manifest(store, "s3://no-such-bucket/features")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this code reads 1"),
        ({"dtype": "int8"}, "stored as float16, the manifest says int8"),
        ({"rows": 6}, "parts have 5 rows, but the set has 6"),
        ({"parts": {}}, "at least one part"),
        ({"mean": [0.0]}, "256 dimensions, got 1 and 256"),
        ({"columns": []}, "at least one column"),
        ({"surprise": 1}, "surprise"),
        ({"parts": None}, "manifest.json cannot be used"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(url: str, change: dict, message: str):
    export(LOCAL, url, [make_part("00000", 5)])
    edit_manifest(url, **change)
    with pytest.raises(FeatureMismatchError, match=message) as error:
        read_manifest(LOCAL, url)
    assert join(url, "manifest.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}'])
def test_a_file_that_is_no_manifest_is_named(url: str, text: str):
    LOCAL.write(join(url, "manifest.json"), text.encode())
    with pytest.raises(FeatureMismatchError, match=r"manifest\.json"):
        read_manifest(LOCAL, url)


# -------------------------------------------------------------------- parts that are not as listed


def test_a_cut_part_is_named(store: ObjectStore, base: str):
    parts = [make_part("00000", 50), make_part("00001", 50)]
    export(store, base, parts)
    where = join(base, parts[1].name)
    store.write(where, parts[1].encoded()[:-100])
    with pytest.raises(FeatureMismatchError, match=r"00001\.parquet has \d+ bytes instead of"):
        read_features(store, base)


def test_a_part_that_is_gone_is_named(url: str):
    part = make_part("00000", 50)
    export(LOCAL, url, [part])
    LOCAL.delete(join(url, part.name))
    with pytest.raises(ObjectMissingError, match=r"avatars/00000\.parquet"):
        read_features(LOCAL, url)


def test_a_part_with_other_rows_than_listed_is_named(url: str):
    part = make_part("00000", 50)
    manifest = export(LOCAL, url, [part])
    info = manifest.parts[part.name]
    listed = {"rows": 49, "size_bytes": info.size_bytes, "sha256": info.sha256}
    edit_manifest(url, rows=49, parts={part.name: listed})
    with pytest.raises(FeatureMismatchError, match=r"00000\.parquet has 50 rows instead of .* 49"):
        read_features(LOCAL, url)


def test_a_part_of_another_partition_is_named(url: str):
    part = make_part("00000", 50)
    export(LOCAL, url, [part])
    edit_manifest(
        url,
        columns=[
            {"name": "z000", "timesteps": [0, 50], "dims": [0, 3]},
            {"name": "z001", "timesteps": [50, 1000], "dims": [3, D]},
        ],
    )
    with pytest.raises(FeatureMismatchError, match=r"00000\.parquet has other columns"):
        read_features(LOCAL, url, timesteps=(0, 1))


def test_a_flipped_bit_is_found_where_it_is_read(url: str):
    part = make_part("00000", 500)
    export(LOCAL, url, [part])
    data = bytearray(part.encoded())
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(6)
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1  # in the middle of z003
    LOCAL.write(join(url, part.name), bytes(data))
    assert read_features(LOCAL, url, timesteps=(0, 500)).columns == COLUMNS[:3]
    with pytest.raises(FeatureMismatchError, match=r"00000\.parquet is damaged"):
        read_features(LOCAL, url, timesteps=(500, 501))


class ReplacingStore(ObjectStore):
    """Between opening a part and reading it, somebody else replaces it."""

    def open_for_reading(self, url: str) -> BinaryIO:
        file = super().open_for_reading(url)
        self.write(url, make_part("00000", 51).encoded())
        return file


def test_errors_of_the_store_stay_errors_of_the_store(store: ObjectStore, s3_url: str):
    export(store, s3_url, [make_part("00000", 50)])
    with pytest.raises(ObjectChangedError, match=r"avatars/00000\.parquet"):
        read_features(ReplacingStore(), s3_url)


# ----------------------------------------------------------------------------- time-step selection


@pytest.mark.parametrize(
    ("timesteps", "names"),
    [
        ((0, 1), ["z000"]),
        ((49, 50), ["z000"]),
        ((50, 51), ["z001"]),
        ((49, 51), ["z000", "z001"]),
        ((0, 300), ["z000", "z001"]),
        ((0, 301), ["z000", "z001", "z002"]),
        ((300, 500), ["z002"]),
        ((299, 501), ["z001", "z002", "z003"]),
        ((999, 1000), ["z003"]),
        ((0, 1000), ["z000", "z001", "z002", "z003"]),
        (None, ["z000", "z001", "z002", "z003"]),
    ],
)
def test_a_range_means_every_subset_it_touches(url: str, timesteps, names: list[str]):
    part = make_part("00000", 20)
    export(LOCAL, url, [part])
    features = read_features(LOCAL, url, timesteps=timesteps)
    assert [column.name for column in features.columns] == names
    first, last = features.columns[0].dims[0], features.columns[-1].dims[1]
    np.testing.assert_array_equal(features.values, rounded(part.features[:, first:last]))


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 999), st.integers(1, 1000))
def test_selection_agrees_with_asking_each_timestep(start: int, length: int):
    end = min(1000, start + length)
    touched = [c for c in COLUMNS if any(t in range(*c.timesteps) for t in range(start, end))]
    assert list(select_columns(COLUMNS, (start, end))) == touched


@pytest.mark.parametrize("timesteps", [(0, 0), (10, 5), (-1, 5), (0, 1001), (1000, 1001)])
def test_an_impossible_range_is_refused_with_the_valid_one(url: str, timesteps):
    export(LOCAL, url, [make_part("00000", 2)])
    with pytest.raises(ValueError, match=r"cover \[0, 1000\)"):
        read_features(LOCAL, url, timesteps=timesteps)


# ------------------------------------------------------------------- only the bytes asked for move

READER = """
import json, sys
import pyarrow as pa, pyarrow.fs, pyarrow.ipc, pyarrow.parquet as pq

class Counting:
    closed, fetched = False, 0

    def __init__(self, file):
        self.file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.readable = self.seekable = lambda: True

    def read(self, size=-1):
        data = self.file.read(size)
        self.fetched += len(data)
        return data

url, start, end, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
filesystem, root = pa.fs.FileSystem.from_uri(url)
with filesystem.open_input_stream(root + "/manifest.json") as file:
    manifest = json.loads(file.read())
names = [
    column["name"] for column in manifest["columns"]
    if column["timesteps"][0] < end and start < column["timesteps"][1]
]
files = [Counting(filesystem.open_input_file(root + "/" + part)) for part in manifest["parts"]]
# Arrow's own threads may let go of a Python file only while the interpreter ends, which kills it.
table = pa.concat_tables(
    pq.ParquetFile(file, pre_buffer=False).read(["key", "shard", "row", *names], use_threads=False)
    for file in files
)
with pa.OSFile(output, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table)
ours = {"configs", "data_pipelines", "pretrain", "cluster", "tools", "torch"}
print(json.dumps({
    "fetched": sum(file.fetched for file in files),
    "ours": sorted(ours & {name.split(".")[0] for name in sys.modules}),
}))
"""


def read_with_pyarrow_alone(uri: str, timesteps: tuple[int, int], folder: Path):
    """Table and bytes fetched, from a process that knows pyarrow and the manifest only."""
    output = folder / "table.arrow"
    command = [sys.executable, "-I", "-c", READER, uri, *map(str, timesteps), str(output)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ours"] == []
    with pa.OSFile(str(output), "rb") as file:
        return pa.ipc.open_file(file).read_all(), report["fetched"]


def test_pyarrow_alone_reads_everything_and_fetches_only_the_columns_it_asks_for(
    s3: LocalS3, store: ObjectStore, base: str, tmp_path: Path
):
    parts = [make_part("00000", 4000), make_part("00001", 4000)]
    export(store, base, parts)
    uri = f"file://{base}"
    if base.startswith("s3://"):
        host = s3.endpoint_url.removeprefix("http://")
        uri = f"{base}?scheme=http&region=us-east-1&endpoint_override={host}"

    everything, all_bytes = read_with_pyarrow_alone(uri, (0, 1000), tmp_path)
    assert everything["key"].to_pylist() == [key for part in parts for key in part.keys]
    assert everything["row"].to_pylist() == [row for part in parts for row in part.rows]
    values = np.concatenate([np.stack(everything[c.name].to_numpy()) for c in COLUMNS], axis=1)
    np.testing.assert_array_equal(
        values, np.concatenate([part.features for part in parts]).astype(np.float16)
    )

    fine, fine_bytes = read_with_pyarrow_alone(uri, (0, 300), tmp_path)
    assert fine.column_names == ["key", "shard", "row", "z000", "z001"]
    assert fine["z001"].equals(everything["z001"])
    footers = len(parts) * FOOTER_BYTES
    dims_share = COLUMNS[1].dims[1] / D
    assert (fine_bytes - footers) / (all_bytes - footers) == pytest.approx(dims_share, rel=0.02)


@dataclass
class CountingFile:
    file: BinaryIO
    counts: list[int]

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self) -> BinaryIO:
        return cast("BinaryIO", self)

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.counts.append(len(data))
        return data


class CountingStore(ObjectStore):
    """Notes the size of every read from a part."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def open_for_reading(self, url: str) -> BinaryIO:
        return cast("BinaryIO", CountingFile(super().open_for_reading(url), self.counts))


@pytest.mark.parametrize("timesteps", [(0, 50), (0, 300), (300, 500), (500, 1000), (0, 1000)])
def test_read_features_fetches_footer_join_columns_and_the_selection(
    store: ObjectStore, base: str, timesteps
):
    part = make_part("00000", 4000)
    export(store, base, [part])
    counting = CountingStore()
    features = read_features(counting, base, timesteps=timesteps)
    row_group = pq.ParquetFile(io.BytesIO(part.encoded())).metadata.row_group(0)
    sizes = {
        row_group.column(number).path_in_schema.split(".")[0]: row_group.column(
            number
        ).total_compressed_size
        for number in range(row_group.num_columns)
    }
    names = ["key", "shard", "row", *(column.name for column in features.columns)]
    assert sum(counting.counts) == FOOTER_BYTES + sum(sizes[name] for name in names)
    assert len(counting.counts) <= 3  # on S3 each one is a request
