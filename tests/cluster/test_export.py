"""Exports that are stopped, disturbed or refused; and what `features verify` finds in them.

One Ray session serves the whole file. The encoder is an authors' file with random weights.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from PIL import Image

from cluster.export import _ExportWorker, export_features
from cluster.features import diff_features, features_to_shards, verify_features
from cluster.session import ray_session
from data_pipelines.decoding import decode_image
from data_pipelines.feature_layout import CopiedKind, FeatureLayout
from data_pipelines.feature_part import (
    FeatureMismatchError,
    PartInfo,
    encode_part,
    open_part,
)
from data_pipelines.feature_store import (
    FeatureManifest,
    open_features,
    publish_manifest,
    read_manifest,
)
from data_pipelines.object_store import ObjectInfo, ObjectMissingError, ObjectStore, join
from data_pipelines.shard_index import ShardIndex, read_index, write_index
from data_pipelines.shard_writer import write_shard
from pretrain.feature_dataset import FeatureDataset
from pretrain.feature_export import Export, ExportFailedError, claim, export_shard
from pretrain.shard_features import CopyError, EncoderOnDevice, columns_of, copied_fields
from pretrain.trained import TrainedEncoder, load_published_encoder
from tests.published_files import write_run
from tests.tiny_run import make_shards

STORE = ObjectStore()
ROWS, SHARDS = 20, 9
COPIED: dict[str, CopiedKind] = {"caption": "string", "width": "int", "nothing": "float"}


@pytest.fixture(scope="module", autouse=True)
def ray_for_all() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("authors"))


@pytest.fixture(scope="module")
def encoder(checkpoint_file: Path) -> TrainedEncoder:
    return load_published_encoder(checkpoint_file)


@pytest.fixture(scope="module")
def finished(
    checkpoint_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ShardIndex, str]:
    """A shard set and its features; tests only read them."""
    folder = tmp_path_factory.mktemp("finished")
    folder_url, nothing = str(folder / "shards"), {"nothing": None}
    index = make_shards(STORE, folder_url, shards=SHARDS, rows=ROWS, more=nothing)
    export(checkpoint_file, index, str(folder / "features"), copied=COPIED)
    return index, str(folder / "features")


@pytest.fixture
def shards(finished: tuple[ShardIndex, str], tmp_path: Path) -> ShardIndex:
    """A copy of that set, to be mistreated."""
    shutil.copytree(finished[0].url, tmp_path / "shards")
    return read_index(STORE, str(tmp_path / "shards"))


@pytest.fixture
def out(finished: tuple[ShardIndex, str], tmp_path: Path) -> str:
    """A copy of those features, to be mistreated."""
    return str(shutil.copytree(finished[1], tmp_path / "features"))


@pytest.fixture
def empty(tmp_path: Path) -> str:
    return str(tmp_path / "new")


def export(checkpoint_file: Path, index: ShardIndex, out: str, **more: Any) -> FeatureManifest:
    return export_features(
        STORE,
        checkpoint_url=str(checkpoint_file),
        shards_url=index.url,
        out_url=out,
        num_workers=1,
        **more,
    )


def by_hand(encoder: TrainedEncoder, index: ShardIndex, out: str) -> Export:
    """What a worker is given."""
    return Export(
        out_url=out,
        source="shards",
        encoder_sha256=encoder.sha256,
        checkpoint=encoder.checkpoint,
        index_digest=index.digest,
        precision="fp32",
        layout=FeatureLayout(columns_of(encoder.partition)),
    )


def files_of(out: str) -> dict[str, bytes]:
    root = Path(out)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def problems(out: str, **more: Any) -> list[str]:
    return verify_features(STORE, out, num_workers=1, **more).problems


# ---------------------------------------------------------------------------------- what comes out


def test_every_sample_has_the_row_that_the_encoder_gives_it(
    encoder: TrainedEncoder, finished: tuple[ShardIndex, str]
) -> None:
    index, out = finished
    features = open_features(out).arrays()
    samples = wds.WebDataset([shard.url for shard in index.shards], shardshuffle=False)
    for key, shard, row, z, sample in zip(
        features.keys, features.shards, features.rows, features.values, samples, strict=True
    ):
        assert (key, shard) == (sample["__key__"], Path(sample["__url__"]).name)
        assert key.endswith(f"{row:04d}")
        pixels = torch.from_numpy(decode_image(sample["jpg"], encoder.image_size_px))
        expected = encoder.encoder(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        np.testing.assert_allclose(z, expected.numpy(), rtol=2e-3, atol=2e-3)


def test_fields_of_the_json_become_columns(finished: tuple[ShardIndex, str]) -> None:
    index, out = finished
    copied = open_features(out).arrays().copied.to_pydict()
    samples = wds.WebDataset([shard.url for shard in index.shards], shardshuffle=False).decode()
    assert copied["caption"] == [sample["json"]["caption"] for sample in samples]
    assert copied["width"] == [32] * ROWS * SHARDS
    assert copied["nothing"] == [None] * ROWS * SHARDS


def test_some_time_steps_in_int8_with_scales_that_outlive_a_restart(
    checkpoint_file: Path, shards: ShardIndex, out: str, empty: str
) -> None:
    made = export(checkpoint_file, shards, empty, dtype="int8", timesteps=(0, 300))
    exact, rounded = (open_features(url, (0, 300)) for url in (out, empty))
    assert made.columns == exact.columns != exact.manifest.columns
    # The scales were measured on all of these images: nothing saturates. float16 rounds as well.
    error = np.abs(exact.arrays().values - rounded.arrays().values)
    assert error.max() > 0
    assert (error <= 0.6 * np.array(made.layout.scales)).all()

    files = files_of(empty)
    for name in ("manifest.json", "shards/00001.parquet", "_commits/shards/00002.json"):
        (Path(empty) / name).unlink()
    assert export(checkpoint_file, shards, empty, dtype="int8", timesteps=(0, 300)) == made
    assert files_of(empty) == files
    found = diff_features(STORE, out, empty, num_workers=1)
    assert found.manifests == ["dtype", "columns", "copied columns"]
    assert found.columns.keys() == {column.name for column in made.columns}
    assert not found.is_none


@pytest.mark.parametrize(
    ("content", "kinds", "expected"),
    [
        (b'{"a": "x"}', {"a": "string", "b": "int"}, {"a": "x", "b": None}),
        (b'{"a": 1}', {"a": "float"}, {"a": 1}),
        (b'{"a": true}', {"a": "bool"}, {"a": True}),
        (b'{"a": null}', {"a": "bool"}, {"a": None}),
        (b'{"a": true}', {"a": "int"}, "a is a bool, not a int"),
        (b'{"a": 1.5}', {"a": "int"}, "a is a float, not a int"),
        (b'{"a": 1}', {"a": "string"}, "a is a int, not a string"),
        (b'{"a": 99999999999999999999}', {"a": "int"}, "64 bits"),
        (b'{"a": 1' + b"0" * 400 + b"}", {"a": "float"}, "unusable json"),
        (b'{"a": "cut \\ud83d"}', {"a": "string"}, "unusable json"),
        (b"{", {"a": "int"}, "unusable json"),
        (b"[]", {"a": "int"}, "unusable json"),
        (b"[" * 100_000, {"a": "int"}, "unusable json"),
    ],
)
def test_a_copied_field_is_of_its_kind_or_the_sample_is_refused(content, kinds, expected) -> None:
    if isinstance(expected, dict):
        assert copied_fields({"json": content}, kinds) == expected
    else:
        with pytest.raises(CopyError, match=expected):
            copied_fields({"json": content}, kinds)


@pytest.mark.parametrize(
    ("copied", "message"),
    [
        ({"captoin": "string"}, "has a field captoin; there are: .*caption, .*width"),
        ({"caption": "int"}, "for one: .*caption is a str, not a int"),
    ],
)
def test_a_field_that_no_json_has_is_refused_before_anything_is_written(
    checkpoint_file: Path, shards: ShardIndex, empty: str, copied: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(checkpoint_file, shards, empty, copied=copied)
    assert not Path(empty).exists()


def test_features_as_tars_have_the_names_and_keys_of_their_images(
    finished: tuple[ShardIndex, str], empty: str
) -> None:
    images, out = finished
    index = features_to_shards(STORE, out, empty, num_workers=1, timesteps=(0, 300))
    assert [shard.name for shard in index.shards] == [shard.name for shard in images.shards]
    features = open_features(out, (0, 300)).arrays()
    samples = list(wds.WebDataset([s.url for s in index.shards], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == features.keys
    stored = np.stack([sample["z.npy"] for sample in samples])
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored.astype(np.float32), features.values)
    for there in (empty, images.url):
        with pytest.raises(FileExistsError, match="holds a shard set already"):
            features_to_shards(STORE, out, there, num_workers=1)


def test_tars_of_somebody_else_are_not_written_over(out: str, empty: str) -> None:
    STORE.write(join(empty, "00000.tar"), b"somebody's")
    with pytest.raises(FileExistsError, match="holds a shard set already"):
        features_to_shards(STORE, out, empty, num_workers=1)
    assert STORE.read(join(empty, "00000.tar")) == b"somebody's"


def test_a_set_does_not_differ_from_its_copy(out: str, finished: tuple[ShardIndex, str]) -> None:
    found = diff_features(STORE, finished[1], out, num_workers=1)
    assert found.is_none
    assert [column.rows for column in found.columns.values()] == [ROWS * SHARDS] * 4


def test_rows_that_only_one_set_has_are_counted(out: str, finished: tuple[ShardIndex, str]) -> None:
    manifest = read_manifest(STORE, out)
    parts = {name: part for name, part in manifest.parts.items() if "00000" not in name}
    Path(out, "shards/00000.parquet").unlink()
    publish_manifest(STORE, out, replace(manifest, parts=parts, rows=manifest.rows - ROWS))
    found = diff_features(STORE, finished[1], out, num_workers=1)
    assert (found.only_first, found.only_second) == (ROWS, 0)
    assert not found.is_none


def test_copied_values_that_differ_are_counted(
    encoder: TrainedEncoder, shards: ShardIndex, out: str, finished: tuple[ShardIndex, str]
) -> None:
    manifest, name = read_manifest(STORE, out), "shards/00001.parquet"
    table = pq.read_table(Path(out) / name)
    copied = {field: table[field].to_pylist() for field in COPIED}
    copied["caption"][3] = "another"
    copied["nothing"][3] = float("nan")  # as little as null
    told = by_hand(encoder, shards, out)
    data = encode_part(
        manifest.layout,
        told.origin(shards.shards[1]),
        keys=table["key"].to_pylist(),
        rows=table["row"].to_pylist(),
        features=np.concatenate(
            [told.layout.values(table, c) for c in told.layout.columns], axis=1
        ),
        copied=copied,
    )
    (Path(out) / name).write_bytes(data)
    info = PartInfo(ROWS, 0, len(data), hashlib.sha256(data).hexdigest())
    publish_manifest(STORE, out, replace(manifest, parts=manifest.parts | {name: info}))
    found = diff_features(STORE, finished[1], out, num_workers=1)
    equal = {field: diff.equal for field, diff in found.copied.items()}
    everything = ROWS * SHARDS
    assert equal == {"caption": everything - 1, "width": everything, "nothing": everything}
    assert all(diff.equal == diff.rows for diff in found.columns.values())
    assert not found.is_none


def test_a_torch_data_set_gives_what_was_copied(finished: tuple[ShardIndex, str]) -> None:
    features = open_features(finished[1])
    first = next(iter(FeatureDataset(features)))
    assert first["copied"] == features.arrays().copied.to_pylist()[0]
    assert first["copied"]["width"] == 32


def test_sets_of_one_shard_set_are_compared_wherever_it_lay(
    checkpoint_file: Path, shards: ShardIndex, finished: tuple[ShardIndex, str], empty: str
) -> None:
    elsewhere = shutil.copytree(shards.url, Path(shards.url).parent / "elsewhere")
    export(checkpoint_file, read_index(STORE, str(elsewhere)), empty, copied=COPIED)
    assert diff_features(STORE, finished[1], empty, num_workers=1).is_none


def test_a_part_of_another_encoder_is_not_read_for_one_of_this_set(
    encoder: TrainedEncoder, shards: ShardIndex, out: str, empty: str
) -> None:
    """Of the same size, rows and columns: only its footer tells."""
    shard, layout = shards.shards[1], read_manifest(STORE, out).layout
    ours = replace(by_hand(encoder, shards, empty), layout=layout)
    theirs = replace(ours, encoder_sha256="f" * 64)
    export_shard(STORE, EncoderOnDevice(encoder, use_gpu=False), theirs, shard)
    part = Path(out) / "shards/00001.parquet"
    size_bytes = part.stat().st_size
    shutil.copy(theirs.part_url(shard), part)
    assert part.stat().st_size == size_bytes
    with pytest.raises(FeatureMismatchError, match=r"00001\.parquet was made by the encoder fff"):
        open_features(out).arrays()


# ------------------------------------------------------------------- stopped, and gone on with


def test_what_was_stopped_anywhere_ends_in_the_same_bytes(
    checkpoint_file: Path, shards: ShardIndex, out: str
) -> None:
    undisturbed = files_of(out)
    # One shard without a commit, one without a part, one without either; and no manifest.
    for name in (
        "manifest.json",
        "_commits/shards/00000.json",
        "shards/00001.parquet",
        "shards/00002.parquet",
        "_commits/shards/00002.json",
    ):
        (Path(out) / name).unlink()
    kept = (Path(out) / "shards/00000.parquet").stat().st_mtime_ns
    export(checkpoint_file, shards, out, copied=COPIED)
    now = files_of(out)
    # The manifest says where the shards lie, which are a copy here.
    assert json.loads(now.pop("manifest.json"))["source_url"] == shards.url
    del undisturbed["manifest.json"]
    assert now == undisturbed
    assert (Path(out) / "shards/00000.parquet").stat().st_mtime_ns == kept, "it was made twice"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_sha256": "f" * 64}, "it was changed"),
        ({"summary": {"sum": []}}, "it was changed"),
        (None, "another encoder, layout or tar"),
    ],
)
def test_a_commit_that_was_changed_or_is_another_encoders_is_refused(
    checkpoint_file: Path, shards: ShardIndex, out: str, change, message: str
) -> None:
    """The claim is gone as well, so that only the commits can tell."""
    (Path(out) / "export.json").unlink()
    where = Path(out) / "_commits/shards/00003.json"
    if change is not None:
        where.write_text(json.dumps(json.loads(where.read_text()) | change))
    ema = change is not None
    with pytest.raises(ExportFailedError, match=f"_commits/shards/0000.*{message}"):
        export(checkpoint_file, shards, out, copied=COPIED, ema=ema)


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 200_000, b'{"sha256": 1}', b""])
def test_a_commit_that_is_none_is_named(
    checkpoint_file: Path, shards: ShardIndex, out: str, content: bytes
) -> None:
    Path(out, "_commits/shards/00002.json").write_bytes(content)
    with pytest.raises(ExportFailedError, match=r"00002\.json is damaged"):
        export(checkpoint_file, shards, out, copied=COPIED)


def test_a_part_of_somebody_else_is_neither_taken_nor_overwritten(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    ours = by_hand(encoder, shards, empty)
    on_cpu = EncoderOnDevice(encoder, use_gpu=False)
    theirs = replace(ours, encoder_sha256="f" * 64)
    export_shard(STORE, on_cpu, theirs, shards.shards[0])
    before = files_of(empty)
    with pytest.raises(ValueError, match=r"00000\.parquet was made by the encoder fff.*delete it"):
        export_shard(STORE, on_cpu, ours, shards.shards[0])
    assert files_of(empty) == before


def test_a_second_worker_commits_what_the_first_one_wrote(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    """Of two that hold a lease in turns, whose machines round differently."""
    export, shard = by_hand(encoder, shards, empty), shards.shards[0]
    on_cpu = EncoderOnDevice(encoder, use_gpu=False)

    class Slower(ObjectStore):
        def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
            if url == export.part_url(shard):
                export_shard(STORE, on_cpu, export, shard)  # meanwhile
            return super().write(url, data, only_if_absent=only_if_absent)

    class Rounding(EncoderOnDevice):
        def __call__(self, images_BHWC: Any) -> Any:
            return super().__call__(images_BHWC) * np.float32(1.01)

    export_shard(Slower(), Rounding(encoder, use_gpu=False), export, shard)
    commit = json.loads(STORE.read(export.commit_url(shard)))
    data = STORE.read(export.part_url(shard))
    open_part(data, export.layout, export.origin(shard), "part")
    assert commit["summary"]["info"]["size_bytes"] == len(data)
    alone = replace(export, out_url=empty + "-alone")
    export_shard(STORE, on_cpu, alone, shard)
    assert data == STORE.read(alone.part_url(shard))


def test_a_part_that_lacks_rows_is_not_committed(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    export, shard = by_hand(encoder, shards, empty), shards.shards[1]
    data = encode_part(
        export.layout,
        export.origin(shard),
        keys=["a"],
        rows=[0],
        features=np.zeros((1, export.layout.num_dims), np.float32),
    )
    STORE.write(export.part_url(shard), data)
    with pytest.raises(FeatureMismatchError, match=r"has 1 rows and 0 skipped .* 20 samples; del"):
        export_shard(STORE, EncoderOnDevice(encoder, use_gpu=False), export, shard)
    assert not STORE.exists(export.commit_url(shard))


def test_a_commit_belongs_to_one_layout(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    export, shard = by_hand(encoder, shards, empty), shards.shards[1]
    export_shard(STORE, EncoderOnDevice(encoder, use_gpu=False), export, shard)
    commit = STORE.read(export.commit_url(shard))
    assert export.summary_in(shard, commit).info.rows == ROWS
    other = replace(export, layout=replace(export.layout, dtype="float32"))
    with pytest.raises(ValueError, match="another encoder, layout or tar"):
        other.summary_in(shard, commit)


def test_of_two_that_claim_a_folder_at_once_the_second_is_refused(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    ours = by_hand(encoder, shards, empty)
    theirs = replace(ours, layout=replace(ours.layout, copied={"caption": "string"}))

    class Slower(ObjectStore):
        def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
            claim(STORE, theirs, "float16", encoder, shards)
            return super().write(url, data, only_if_absent=only_if_absent)

    with pytest.raises(ValueError, match=r"copied columns \(caption:string; this is none\)"):
        claim(Slower(), ours, "float16", encoder, shards)


def test_a_claim_that_was_changed_is_damaged(
    checkpoint_file: Path, shards: ShardIndex, out: str
) -> None:
    intent = Path(out) / "export.json"
    intent.write_text(intent.read_text().replace('"precision": "fp32"', '"precision": "fp33"'))
    with pytest.raises(ValueError, match=r"export\.json is damaged .*it was changed"):
        export(checkpoint_file, shards, out, copied=COPIED)


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_exported(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    theirs = replace(by_hand(encoder, shards, empty), encoder_sha256="f" * 64)
    with pytest.raises(ValueError, match="was replaced during the export"):
        _ExportWorker(STORE, lambda store: encoder, theirs)


def test_files_of_others_beside_the_commits_stay(
    checkpoint_file: Path, shards: ShardIndex, out: str
) -> None:
    notes = Path(out) / "_commits/shards/sub/notes.json"
    notes.parent.mkdir()
    notes.write_text("mine")
    export(checkpoint_file, shards, out, copied=COPIED)
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, r"another dtype \(float16; this is int8\)"),
        ({"timesteps": (0, 300)}, r"another range of time-steps \(0:1000; this is 0:"),
        ({"copied": {"caption": "string"}}, "another choice of copied columns"),
        ({"copied": {"Z000": "string"}}, "cannot be called Z000"),
        ({"ema": False}, "another encoder"),
        ({"timesteps": (0, 2000)}, r"cover \[0, 1000\)"),
    ],
)
def test_a_folder_holds_one_export(
    checkpoint_file: Path, shards: ShardIndex, out: str, change: dict[str, Any], message: str
) -> None:
    before = files_of(out)
    with pytest.raises(ValueError, match=message):
        export(checkpoint_file, shards, out, **{"copied": COPIED, **change})
    assert files_of(out) == before


@pytest.mark.parametrize("folder", ["the shards' own", "one with other files"])
def test_a_folder_with_other_parquet_files_is_refused(
    checkpoint_file: Path, shards: ShardIndex, empty: str, folder: str
) -> None:
    out = shards.url if folder == "the shards' own" else empty
    STORE.write(join(empty, "other/00000.parquet"), b"somebody's")
    with pytest.raises(ValueError, match="Parquet files that are no part of this export, first "):
        export(checkpoint_file, shards, out)
    assert not STORE.exists(join(out, "export.json"))


# ------------------------------------------------------------------------------------ bad input


def broken_shards(url: str, broken: int) -> ShardIndex:
    """10 samples, of which some are no images."""
    face = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 90)).save(face, "JPEG")
    pictures = [(b"no image" if row < broken else face.getvalue(), {}) for row in range(10)]
    return write_index(STORE, url, [write_shard(STORE, url, 0, pictures)])


def test_samples_that_cannot_be_used_have_no_row_within_the_budget(
    checkpoint_file: Path, tmp_path: Path, empty: str
) -> None:
    out, index = empty, broken_shards(str(tmp_path / "shards"), 2)
    with pytest.raises(
        ExportFailedError,
        match=r"2 of 10 .* \(2 undecodable image\), 1 are allowed; first row 0 of 00000\.tar: ",
    ):
        export(checkpoint_file, index, out, error_budget=0.19)
    assert not (Path(out) / "manifest.json").exists()
    manifest = export(checkpoint_file, index, out, error_budget=0.2)
    assert (manifest.rows, manifest.skipped) == (8, 2)
    features = open_features(out).arrays()
    assert features.rows.tolist() == list(range(2, 10))
    assert [p for p in problems(out) if "in every row" not in p] == []  # one colour: all constant
    assert len(problems(out)) == manifest.layout.num_dims


def test_a_set_without_a_single_image_is_refused(
    checkpoint_file: Path, tmp_path: Path, empty: str
) -> None:
    out, index = empty, broken_shards(str(tmp_path / "shards"), 10)
    with pytest.raises(ExportFailedError, match="10 of 10 samples could not be used"):
        export(checkpoint_file, index, out, error_budget=1.0)
    with pytest.raises(ValueError, match="hold no image that can be used"):
        export(checkpoint_file, index, out + "8", dtype="int8")


def test_an_encoder_that_gives_no_numbers_fails_with_the_sample(
    encoder: TrainedEncoder, shards: ShardIndex, empty: str
) -> None:
    class Broken(EncoderOnDevice):
        def __call__(self, images_BHWC: Any) -> Any:
            z = super().__call__(images_BHWC).copy()
            z[3, 5] = np.nan
            return z

    with pytest.raises(ValueError, match=r"sample 000000003 of 00000\.tar has nan in dimension 5"):
        export_shard(
            STORE,
            Broken(encoder, use_gpu=False),
            by_hand(encoder, shards, empty),
            shards.shards[0],
        )
    assert not Path(empty).exists()


def test_a_shard_that_changed_is_refused_by_name(
    checkpoint_file: Path, shards: ShardIndex, empty: str
) -> None:
    tar = Path(shards.shards[1].url)
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001\.tar has \d+ bytes instead of"):
        export(checkpoint_file, shards, empty)
    assert not Path(empty).exists()


# ---------------------------------------------------------------------------- what verify finds


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_verify_names_every_culprit_and_no_other(
    encoder: TrainedEncoder, shards: ShardIndex, out: str
) -> None:
    assert problems(out, shards_url=shards.url) == []
    parts = [Path(out) / f"shards/{number:05d}.parquet" for number in range(SHARDS)]
    parts[1].unlink()
    chunk = pq.ParquetFile(parts[2]).metadata.row_group(0).column(6)
    flip(parts[2], chunk.data_page_offset + chunk.total_compressed_size // 2)
    flip(parts[3], -20)  # in the footer
    parts[4].unlink()
    theirs = replace(by_hand(encoder, shards, out), encoder_sha256="f" * 64)
    export_shard(STORE, EncoderOnDevice(encoder, use_gpu=False), theirs, shards.shards[4])
    (parts[0].parent / "00099.parquet").write_bytes(parts[0].read_bytes())
    with_nan(parts[5])
    with_other_keys(parts[6], encoder, shards)
    replaced = write_shard(STORE, shards.url, 7, [(b"other", {})] * ROWS)
    index = [replaced if shard.name == replaced.name else shard for shard in shards.shards]
    write_index(STORE, shards.url, index)
    Path(shards.shards[8].url).write_bytes(b"cut")

    found = problems(out, shards_url=shards.url)
    for said in (
        r"00001\.parquet is missing",
        r"00002\.parquet is damaged",
        r"00003\.parquet is not a readable Parquet file",
        r"00004\.parquet was made by the encoder ffff",
        r"00099\.parquet is no part of this set",
        r"00005\.parquet has nan in dimension \d+ of sample 00005",
        r"00006\.parquet has sha256",
        r"row 0 has key 000060001, .*00006\.tar says 000060000",
        r"and 17 rows more",
        r"00007\.parquet was made of the tar with SHA-256",
        r"00008\.tar has 3 bytes instead of",
        r"are others than those exported: their index is",
    ):
        assert any(re.search(said, problem) for problem in found), (said, found)
    assert not [problem for problem in found if "/00000." in problem], "a sound part is blamed"


def test_verify_finds_what_the_manifest_only_says(
    encoder: TrainedEncoder, shards: ShardIndex, out: str
) -> None:
    """Manifests in good order, of parts in good order, that do not tell the truth."""
    manifest = read_manifest(STORE, out)
    publish_manifest(STORE, out, replace(manifest, mean=[manifest.mean[0] + 1, *manifest.mean[1:]]))
    told = problems(out, shards_url=shards.url)
    assert told == ["the manifest's mean is not that of the parts, first in dimension 0"]

    publish_manifest(STORE, out, replace(manifest, std=[manifest.std[0] + 1, *manifest.std[1:]]))
    told = problems(out, shards_url=shards.url)
    wrong = "standard deviation is not that of the parts, first in dimension 0"
    assert told == [f"the manifest's {wrong}"]

    part = Path(out) / "shards/00001.parquet"
    shard, layout = shards.shards[1], manifest.layout
    table = pq.read_table(part).slice(0, ROWS - 1)
    data = encode_part(
        layout,
        by_hand(encoder, shards, out).origin(shard),
        keys=table["key"].to_pylist(),
        rows=table["row"].to_pylist(),
        features=np.concatenate([layout.values(table, c) for c in layout.columns], axis=1),
        copied={name: table[name].to_pylist() for name in COPIED},
    )
    part.write_bytes(data)
    info = PartInfo(ROWS - 1, 0, len(data), hashlib.sha256(data).hexdigest())
    parts = manifest.parts | {"shards/00001.parquet": info}
    del parts["shards/00000.parquet"]
    Path(out, "shards/00000.parquet").unlink()
    rows = manifest.rows - ROWS - 1
    publish_manifest(STORE, out, replace(manifest, parts=parts, rows=rows))
    told = problems(out, shards_url=shards.url)
    assert "shards/00000.parquet has no part" in told
    assert any(re.search(r"1 samples of .*00001\.tar have no row, first 19", t) for t in told)


def with_nan(part: Path) -> None:
    """Somebody wrote it anew, with a value that is no number."""
    table = pq.read_table(part)
    values = table["z001"].combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False).copy()
    flat[7] = np.nan
    spoilt = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=values.type)
    place = table.schema.get_field_index("z001")
    pq.write_table(table.set_column(place, table.schema.field("z001"), spoilt), part)


def with_other_keys(part: Path, encoder: TrainedEncoder, index: ShardIndex) -> None:
    """In good order, of the right tar and encoder, with keys that are not its samples'."""
    shard = index.shards[int(part.stem)]
    told = by_hand(encoder, index, "")
    table = pq.read_table(part)
    layout = replace(told.layout, copied=COPIED)
    z = np.concatenate([layout.values(table, column) for column in layout.columns], axis=1)
    data = encode_part(
        layout,
        told.origin(shard),
        keys=[*table["key"].to_pylist()[1:], "surplus"],
        rows=table["row"].to_pylist(),
        features=z,
        copied={name: table[name].to_pylist() for name in COPIED},
    )
    part.write_bytes(data)


def test_features_are_read_and_verified_without_their_shards(shards: ShardIndex, out: str) -> None:
    shutil.rmtree(shards.url)
    assert len(open_features(out).arrays().keys) == ROWS * SHARDS
    assert problems(out, with_shards=False) == []
    with pytest.raises(ObjectMissingError, match=r"no shard index.*--shards.*--without-shards"):
        problems(out, shards_url=shards.url)
