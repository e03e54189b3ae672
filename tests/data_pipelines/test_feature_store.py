"""The feature store: what is exported is what is read, by us or by pyarrow alone, and only that."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loading import digest_of_json
from data_pipelines.feature_layout import FeatureColumn, FeatureLayout, select_columns
from data_pipelines.feature_part import (
    FeatureMismatchError,
    PartOrigin,
    PartSummary,
    encode_part,
    open_part,
    summary_of,
)
from data_pipelines.feature_store import (
    FeatureManifest,
    open_features,
    part_name,
    publish_manifest,
    read_manifest,
    tar_of,
)
from data_pipelines.local_s3 import LocalS3
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectStore,
    join,
)
from tests.feature_sets import manifest_of

LOCAL = ObjectStore()  # reads and writes folders without a server
COLUMNS = (
    FeatureColumn("z000", (0, 50), (0, 4)),
    FeatureColumn("z001", (50, 300), (4, 104)),
    FeatureColumn("z002", (300, 500), (104, 200)),
    FeatureColumn("z003", (500, 1000), (200, 256)),
)
D = 256
LAYOUT = FeatureLayout(COLUMNS)
FOOTER_BYTES = 64 * 1024  # what pyarrow fetches first, from the end of the file


@dataclass(frozen=True)
class Part:
    name: str
    shard: str
    keys: list[str]
    rows: list[int]
    features: np.ndarray = field(repr=False)

    @property
    def origin(self) -> PartOrigin:
        return origin_of(self.shard)

    def encoded(self, layout: FeatureLayout = LAYOUT, **more) -> bytes:
        return encode_part(
            layout, self.origin, keys=self.keys, rows=self.rows, features=self.features, **more
        )


def origin_of(shard: str) -> PartOrigin:
    return PartOrigin("e" * 64, shard, "a" * 64)


def make_part(stem: str, num_rows: int, *, source: str = "avatars") -> Part:
    """Normal noise; every third row of the shard is absent, as after quarantine."""
    rows = [row for row in range(2 * num_rows) if row % 3 != 2][:num_rows]
    noise = np.random.default_rng([num_rows, *stem.encode()]).standard_normal((num_rows, D))
    keys = [f"{stem}{row:04d}" for row in rows]
    return Part(part_name(source, stem), f"{stem}.tar", keys, rows, noise.astype(np.float32))


def export(
    store: ObjectStore, url: str, parts: list[Part], layout: FeatureLayout = LAYOUT
) -> FeatureManifest:
    encoded = {part.name: part.encoded(layout) for part in parts}
    for name, data in encoded.items():
        store.write(join(url, name), data)
    manifest = manifest_of(layout, encoded)
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
    features = open_features(base, store=store).arrays()
    assert features.columns == COLUMNS
    assert features.keys == [key for part in parts for key in part.keys]
    assert features.shards == ["00001.tar"] * 30 + ["00000.tar"] * 50
    assert features.rows.dtype == np.int32
    assert features.rows.tolist() == [row for part in parts for row in part.rows]
    assert features.values.dtype == np.float32
    expected = rounded(np.concatenate([part.features for part in parts]))
    np.testing.assert_array_equal(features.values, expected)


def test_many_parts_of_any_size_keep_their_order(url: str):
    layout = FeatureLayout(
        (FeatureColumn("z000", (0, 1), (0, 1)), FeatureColumn("z001", (1, 2), (1, 3)))
    )
    sizes = [70_000, 1, 0, 99, *[7] * 20]  # the first one has three row groups
    values = np.random.default_rng(0).standard_normal((sum(sizes), 3)).astype(np.float32)
    parts = {}
    for number, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        rows = np.arange(start, start + size)
        name = part_name("set", f"{99 - number}")
        parts[name] = encode_part(
            layout,
            origin_of(tar_of(name)),
            keys=[str(r) for r in rows],
            rows=rows.tolist(),
            features=values[rows],
        )
        LOCAL.write(join(url, name), parts[name])
    publish_manifest(LOCAL, url, manifest_of(layout, parts))
    features = open_features(url).arrays()
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


@pytest.mark.parametrize(
    ("dtype", "most_bytes_a_dimension"), [("float32", 4.0), ("float16", 960 / 512), ("int8", 1.1)]
)
def test_bytes_of_a_sample_of_512_dimensions(dtype, most_bytes_a_dimension: float):
    columns = tuple(FeatureColumn(f"z{i:03d}", (i, i + 1), (8 * i, 8 * i + 8)) for i in range(64))
    scales = (4 / 127,) * 512 if dtype == "int8" else None
    layout = FeatureLayout(columns, dtype, scales)
    noise = np.random.default_rng(0).standard_normal((10_000, 512)).astype(np.float32)
    keys = [f"00007{row:04d}" for row in range(10_000)]
    data = encode_part(
        layout, origin_of("00007.tar"), keys=keys, rows=range(10_000), features=noise
    )
    assert len(data) / 10_000 / 512 < most_bytes_a_dimension
    chunks = [pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(n) for n in (3, 66)]
    assert not any(chunk.has_dictionary_page for chunk in chunks)


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
        ((replace(COLUMNS[0], name="z001"),), "z001 cannot begin at time-step 0"),
        ((COLUMNS[0], replace(COLUMNS[1], name="z002")), "must be named z001"),
        ((COLUMNS[0], replace(COLUMNS[1], dims=(5, 104))), "dimensions of column z001"),
        ((COLUMNS[0], replace(COLUMNS[1], timesteps=(49, 300))), "time-steps of column z001"),
        ((replace(COLUMNS[0], dims=(0, 0)),), r"dimensions of column z000.*\[0, 0\)"),
    ],
)
def test_columns_that_do_not_tile_z_are_refused(columns, message: str):
    with pytest.raises(ValueError, match=message):
        FeatureLayout(columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "not as 'float64'"),
        ({"dtype": "int8"}, "int8 features, and no others, have scales"),
        ({"scales": (1.0,) * D}, "int8 features, and no others, have scales"),
        ({"dtype": "int8", "scales": (1.0,)}, "256 dimensions need as many scales"),
        ({"dtype": "int8", "scales": (0.0,) * D}, "positive and finite"),
        ({"copied": {"caption": "text"}}, "cannot be copied as 'text'"),
        ({"copied": {"key": "string"}}, "cannot be called key"),
        ({"copied": {"z007": "int"}}, "cannot be called z007"),
        ({"copied": {"exif.width": "int"}}, "cannot be called exif.width"),
        ({"dtype": "int8", "scales": (1e-50,) * D}, "positive and finite"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(LAYOUT, **change)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (FeatureColumn("z002", (300, 500), (104, 200)), None),
        (FeatureColumn("z002", (1, 500), (104, 200)), "cannot begin at time-step 1"),
        (FeatureColumn("z2", (300, 500), (104, 200)), "named z000 or so"),
    ],
)
def test_a_range_of_the_partition_keeps_its_names(first: FeatureColumn, message: str | None):
    columns = (first, replace(COLUMNS[3]))
    if message is None:
        assert FeatureLayout(columns).dims == (104, 256)
    else:
        with pytest.raises(ValueError, match=message):
            FeatureLayout(columns)


# ------------------------------------------------------------------------------ dtypes and columns


@pytest.mark.parametrize("timesteps", [None, (300, 500)])
def test_int8_is_read_back_to_half_a_step_and_saturates(url: str, timesteps):
    scales = tuple(np.linspace(0.01, 0.05, D).tolist())
    part = make_part("00000", 200)
    export(LOCAL, url, [part], FeatureLayout(COLUMNS, "int8", scales))
    features = open_features(url, timesteps).arrays()
    first, last = features.columns[0].dims[0], features.columns[-1].dims[1]
    steps = np.array(scales, np.float32)[first:last]
    expected = np.clip(part.features[:, first:last], -127 * steps, 127 * steps)
    assert (np.abs(features.values - expected) <= 0.5001 * steps).all()
    assert (np.abs(part.features) > 127 * np.array(scales)).any(), "nothing saturated"


def test_float32_is_read_back_as_it_was(url: str):
    part = make_part("00000", 50)
    export(LOCAL, url, [part], FeatureLayout(COLUMNS, "float32"))
    np.testing.assert_array_equal(open_features(url).arrays().values, part.features)


def test_a_set_of_some_time_steps_has_their_dimensions_only(url: str):
    layout = FeatureLayout(COLUMNS[1:3])
    part = replace(make_part("00000", 50), features=make_part("00000", 50).features[:, 4:200])
    export(LOCAL, url, [part], layout)
    features = open_features(url, (300, 301)).arrays()
    np.testing.assert_array_equal(features.values, rounded(part.features[:, 100:]))
    with pytest.raises(ValueError, match=r"these features cover \[50, 500\)"):
        open_features(url, (0, 300))


def test_copied_columns_come_along_with_their_nulls(url: str):
    layout = FeatureLayout(COLUMNS, copied={"caption": "string", "width": "int"})
    part = make_part("00000", 3)
    data = part.encoded(layout, copied={"caption": ["a", None, "c"], "width": [1, 2, None]})
    LOCAL.write(join(url, part.name), data)
    publish_manifest(LOCAL, url, manifest_of(layout, {part.name: data}))
    copied = open_features(url, (0, 1)).arrays().copied
    assert copied.to_pydict() == {"caption": ["a", None, "c"], "width": [1, 2, None]}


def test_parts_come_one_by_one_as_they_come_together(url: str):
    export(LOCAL, url, [make_part("00000", 20), make_part("00001", 30)])
    features = open_features(url, (50, 500))
    together = features.arrays()
    assert [len(part.keys) for part in features] == [20, 30]
    np.testing.assert_array_equal(
        np.concatenate([part.values for part in features]), together.values
    )


# -------------------------------------------------------------------------------------- moments


def summary(part: Part, layout: FeatureLayout = LAYOUT, **more) -> PartSummary:
    data = part.encoded(layout, **more)
    return summary_of(data, open_part(data, layout, part.origin, "x"), layout, "x")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_moments_of_the_parts_add_up_to_mean_and_std_of_what_is_read(url: str, dtype):
    layout = FeatureLayout(COLUMNS, dtype, (0.03,) * D if dtype == "int8" else None)
    parts = [make_part("00000", 300), make_part("00001", 0), make_part("00002", 200)]
    export(LOCAL, url, parts, layout)
    values = open_features(url).arrays().values.astype(np.float64)
    moments = [summary(part, layout) for part in parts]
    count = sum(m.info.rows for m in moments)
    mean = sum(m.sum for m in moments) / count
    std = np.sqrt(sum(m.sum_of_squares for m in moments) / count - mean**2)
    assert count == 500
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-9)


def test_a_summary_is_read_back_as_it_was_and_counts_what_was_skipped():
    part = make_part("00000", 30)
    made = summary(part, skipped={2: "undecodable image", 5: "no image"})
    again = PartSummary.from_json(made.to_json())
    assert (again.info, again.skipped) == (made.info, made.skipped)
    assert (made.info.rows, made.info.skipped) == (30, 2)
    np.testing.assert_array_equal(again.sum, made.sum)
    np.testing.assert_array_equal(again.sum_of_squares, made.sum_of_squares)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_part_is_refused(damage: str):
    part = make_part("00000", 100)
    data = bytearray(part.encoded())
    data[len(data) // 2] ^= 1
    damaged = {"cut": bytes(data[:-1]), "flipped": bytes(data), "other": b"no parquet"}[damage]
    with pytest.raises(FeatureMismatchError, match=r"out/0\.parquet is (damaged|not a readable)"):
        open_part(damaged, LAYOUT, part.origin, "out/0.parquet")


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"shard": "00001.tar"}, LAYOUT, "of the tar 00000.tar, not 00001.tar"),
        ({"encoder_sha256": "f" * 64}, LAYOUT, "by the encoder eee.*, not fff"),
        ({"shard_sha256": "b" * 64}, LAYOUT, "of the tar with SHA-256 aaa.*, not bbb"),
        ({}, FeatureLayout(COLUMNS[:-1]), "with the layout"),
        ({}, FeatureLayout(COLUMNS, copied={"a": "int"}), "with the layout"),
    ],
)
def test_a_part_is_the_one_that_was_asked_for_or_refused(change, layout, message: str):
    part = make_part("00000", 30)
    with pytest.raises(FeatureMismatchError, match=rf"^out/0\.parquet was made {message}"):
        open_part(part.encoded(), layout, replace(part.origin, **change), "out/0.parquet")


def test_a_parquet_file_that_is_no_part_is_named():
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"]}), sink)
    with pytest.raises(FeatureMismatchError, match="does not say which encoder made it"):
        open_part(sink.getvalue(), LAYOUT, origin_of("0.tar"), "out/0.parquet")


def test_rows_out_of_order_or_twice_are_refused():
    part = make_part("00000", 30)
    for rows in ([part.rows[1], part.rows[0], *part.rows[2:]], [part.rows[1], *part.rows[1:]]):
        with pytest.raises(FeatureMismatchError, match="once each, in order"):
            summary(replace(part, rows=rows))
    with pytest.raises(FeatureMismatchError, match=r"skipped rows which it has: \[0\]"):
        summary(part, skipped={0: "no image"})


# ------------------------------------------------------------------------------------ the manifest


def edit_manifest(url: str, **change: object) -> None:
    """Change fields of a published manifest behind the store's back, its digest as well."""
    where = join(url, "manifest.json")
    value = {**json.loads(LOCAL.read(where)), **change}
    del value["sha256"]
    LOCAL.write(where, json.dumps(value | {"sha256": digest_of_json(value)}).encode())


def test_the_manifest_is_refused_while_a_part_is_missing_or_cut(store: ObjectStore, base: str):
    parts = {part.name: part.encoded() for part in (make_part("00000", 5), make_part("00001", 5))}
    store.write(join(base, "avatars/00000.parquet"), parts["avatars/00000.parquet"][:-7])
    with pytest.raises(FeatureMismatchError) as error:
        publish_manifest(store, base, manifest_of(LAYOUT, parts))
    assert "avatars/00001.parquet is missing" in str(error.value)
    assert "avatars/00000.parquet has " in str(error.value)
    with pytest.raises(ObjectMissingError):
        read_manifest(store, base)


def test_without_manifest_the_export_is_not_finished(store: ObjectStore, base: str):
    part = make_part("00000", 5)
    store.write(join(base, part.name), part.encoded())
    with pytest.raises(ObjectMissingError, match=r"manifest\.json: this is no feature set"):
        open_features(base, store=store).arrays()


def test_a_missing_bucket_is_not_taken_for_an_unfinished_export(store: ObjectStore):
    with pytest.raises(BucketMissingError, match="no-such-bucket"):
        read_manifest(store, "s3://no-such-bucket/features")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format_version is 1, this code reads 2"),
        ({"dtype": "int8"}, "int8 features, and no others, have scales"),
        ({"rows": 6}, "parts have 5 rows, but the set has 6"),
        ({"skipped": 6}, "parts have 0 skipped, but the set has 6"),
        ({"parts": {}}, "at least one part"),
        ({"mean": [0.0]}, "256 dimensions, got 1 and 256"),
        ({"columns": []}, "at least one column"),
        ({"mean": ["0"] * D}, "mean and std must be finite numbers"),
        ({"std": [float("nan")] * D}, "mean and std must be finite numbers"),
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


@pytest.mark.parametrize(
    "name", ["../../etc/x.parquet", "/etc/x.parquet", "", "a.parquet", "a/b/c.parquet", "a/b.tar"]
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(url: str, name: str):
    part = make_part("00000", 5)
    manifest = export(LOCAL, url, [part])
    edit_manifest(url, parts={name: asdict(manifest.parts[part.name])})
    with pytest.raises(FeatureMismatchError, match=r"no name of a part|plain names"):
        read_manifest(LOCAL, url)


@pytest.mark.parametrize(
    ("field", "value"), [("rows", 5.0), ("rows", -5), ("skipped", True), ("size_bytes", 10**20)]
)
def test_counts_of_a_part_are_whole_numbers(url: str, field: str, value: object):
    part = make_part("00000", 5)
    manifest = export(LOCAL, url, [part])
    edit_manifest(url, parts={part.name: asdict(manifest.parts[part.name]) | {field: value}})
    with pytest.raises(FeatureMismatchError, match=f"{field} of a part must be a whole number"):
        read_manifest(LOCAL, url)


def test_a_part_with_rows_of_another_tar_is_refused():
    part = make_part("00000", 30)
    table = pq.read_table(io.BytesIO(part.encoded()))
    other = pa.array(["00009.tar"] * 30)
    sink = io.BytesIO()
    pq.write_table(table.set_column(1, table.schema.field("shard"), other), sink)
    with pytest.raises(FeatureMismatchError, match=r"has rows of 00009\.tar, not 00000\.tar"):
        open_part(sink.getvalue(), LAYOUT, part.origin, "x")


@pytest.mark.parametrize("skipped", ["none", [], {"x": "y"}])
def test_a_part_that_does_not_say_what_it_skipped_is_refused(skipped: object):
    part = make_part("00000", 30)
    table = pq.read_table(io.BytesIO(part.encoded()))
    notes = json.loads(table.schema.metadata[b"diti"]) | {"skipped": skipped}
    spoilt = table.replace_schema_metadata({b"diti": json.dumps(notes).encode()})
    with pytest.raises(FeatureMismatchError, match="does not say what it skipped"):
        summary_of(b"", spoilt, LAYOUT, "x")


def test_a_flipped_digit_in_the_manifest_is_found(url: str):
    export(LOCAL, url, [make_part("00000", 5)])
    where = join(url, "manifest.json")
    LOCAL.write(where, LOCAL.read(where).replace(b"step-00000100", b"step-00000101"))
    with pytest.raises(FeatureMismatchError, match="it was changed"):
        read_manifest(LOCAL, url)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}'])
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
        open_features(base, store=store).arrays()


def test_a_part_that_is_gone_is_named(url: str):
    part = make_part("00000", 50)
    export(LOCAL, url, [part])
    LOCAL.delete(join(url, part.name))
    with pytest.raises(ObjectMissingError, match=r"avatars/00000\.parquet"):
        open_features(url).arrays()


def test_a_part_with_other_rows_than_listed_is_named(url: str):
    part = make_part("00000", 50)
    manifest = export(LOCAL, url, [part])
    info = manifest.parts[part.name]
    listed = asdict(info) | {"rows": 49}
    edit_manifest(url, rows=49, parts={part.name: listed})
    with pytest.raises(FeatureMismatchError, match=r"00000\.parquet has 50 rows instead of .* 49"):
        open_features(url).arrays()


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
        open_features(url, (0, 1)).arrays()


def test_a_flipped_bit_is_found_where_it_is_read(url: str):
    part = make_part("00000", 500)
    export(LOCAL, url, [part])
    data = bytearray(part.encoded())
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(6)
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1  # in the middle of z003
    LOCAL.write(join(url, part.name), bytes(data))
    assert open_features(url, (0, 500)).arrays().columns == COLUMNS[:3]
    with pytest.raises(FeatureMismatchError, match=r"00000\.parquet is damaged"):
        open_features(url, (500, 501)).arrays()


class ReplacingStore(ObjectStore):
    """Between opening a part and reading it, somebody else replaces it."""

    def open_for_reading(self, url: str) -> BinaryIO:
        file = super().open_for_reading(url)
        self.write(url, make_part("00000", 51).encoded())
        return file


def test_errors_of_the_store_stay_errors_of_the_store(store: ObjectStore, s3_url: str):
    export(store, s3_url, [make_part("00000", 50)])
    with pytest.raises(ObjectChangedError, match=r"avatars/00000\.parquet"):
        open_features(s3_url, store=ReplacingStore()).arrays()


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
    features = open_features(url, timesteps).arrays()
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
        open_features(url, timesteps).arrays()


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
def test_open_features_fetches_footer_join_columns_and_the_selection(
    store: ObjectStore, base: str, timesteps
):
    part = make_part("00000", 4000)
    export(store, base, [part])
    counting = CountingStore()
    features = open_features(base, timesteps, store=counting).arrays()
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
