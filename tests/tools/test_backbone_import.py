"""Published checkpoints on the command line: imported, inspected, exported from."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from configs.task import BackboneConfig, DitiTask
from data_pipelines.feature_layout import FeatureLayout
from data_pipelines.feature_part import PartOrigin, open_part
from data_pipelines.feature_store import open_features, read_manifest
from data_pipelines.object_store import ObjectStore, join
from pretrain.backbone import load_backbone
from pretrain.published import load_authors_checkpoint
from pretrain.shard_features import EncoderOnDevice, columns_of, encode_shard
from pretrain.trained import load_encoder, load_published_encoder
from tests.diti_command import diti
from tests.published_files import (
    RUN_CONFIG,
    UNET,
    changed,
    denoiser_state,
    write_denoiser,
    write_run,
)
from tests.tiny_release import write_checkpoint
from tests.tiny_run import make_run, make_shards

STORE = ObjectStore()


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that holds all these words."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


# --- import ---------------------------------------------------------------------------------------


def test_a_denoiser_becomes_a_backbone_file_and_a_card(tmp_path: Path) -> None:
    file, out = write_denoiser(tmp_path / "faces"), tmp_path / "faces.safetensors"
    said = done(diti("backbone", "import", str(file), "--out", str(out), "--image-size", "8"))
    sha256 = hashlib.sha256(out.read_bytes()).hexdigest()
    first, second = said.splitlines()
    assert first == f"{out}: SHA-256 {sha256}"
    assert "step 300" in second
    assert "8 px" in second
    backbone = load_backbone(STORE, BackboneConfig(weights=str(out), sha256=sha256))
    assert (backbone.unet.config, backbone.image_size_px) == (UNET, 8)
    for name, tensor in denoiser_state().items():
        assert torch.equal(backbone.unet.state_dict()[name], tensor), name
    card = json.loads(out.with_suffix(".json").read_text())
    assert (card["source"], card["source_step"]) == ("checkpoint.pt", 300)
    assert card["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert card["command"] == f"diti backbone import {file} --out {out} --image-size 8"
    assert card["prediction"] == "epsilon"


def test_the_frozen_part_of_a_run_is_the_same_backbone(tmp_path: Path) -> None:
    outs = [tmp_path / "run.safetensors", tmp_path / "dpm.safetensors"]
    done(diti("backbone", "import", str(write_run(tmp_path)), "--out", str(outs[0])))
    file = write_denoiser(tmp_path / "faces")
    done(diti("backbone", "import", str(file), "--out", str(outs[1]), "--image-size", "8"))
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_an_adm_state_dict_is_told_its_heads(tmp_path: Path) -> None:
    file, out = tmp_path / "adm.pt", tmp_path / "adm.safetensors"
    torch.save(denoiser_state(), file)
    command = ("backbone", "import", str(file), "--out", str(out), "--image-size", "8")
    refused(diti(*command), str(file), "num_heads or head_channels")
    done(diti(*command, "--head-channels", "32", "--attention-order", "new"))
    unet = json.loads(out.with_suffix(".json").read_text())["unet"]
    assert (unet["head_channels"], unet["attention_order"]) == (32, "new")


def test_a_bad_import_leaves_nothing_behind(tmp_path: Path) -> None:
    file, out = write_denoiser(tmp_path / "faces"), tmp_path / "out" / "faces.safetensors"
    refused(diti("backbone", "import", str(file), "--out", str(out)), "--image-size")
    refused(diti("backbone", "import", str(file), "--out", str(tmp_path / "a.pt")), ".safetensors")
    refused(
        diti("backbone", "import", str(file), "--out", str(out), "--no-ema"), "has no denoise_fn"
    )
    refused(
        diti("backbone", "import", str(tmp_path / "no.pt"), "--out", str(out)), "does not exist"
    )
    assert not out.exists()
    assert not out.with_suffix(".json").exists()


# --- inspect --------------------------------------------------------------------------------------


def test_inspecting_a_run_tells_parts_and_origins(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    found = json.loads(done(diti("backbone", "inspect", str(file), "--json")))
    authors = load_authors_checkpoint(file)
    assert (found["kind"], found["step"], found["image_size_px"]) == ("diti", 7000, 8)
    assert found["sha256"] == authors.sha256
    assert set(found["parts"]) == {"encoder", "shift path", "backbone"}
    assert found["parts"]["encoder"] == {
        "tensors": len(authors.encoder),
        "parameters": sum(tensor.numel() for tensor in authors.encoder.values()),
    }
    assert found["partition"]["dim_ends"] == [4, 9, 16, 24]
    assert found["origins"]["U-Net"] == "shapes of the weights"
    assert found["config"].endswith("runs/faces/diti/config.yml")
    text = done(diti("backbone", "inspect", str(file)))
    for word in ("diti, step 7000, averaged", "shift path", "4 subsets of 24", "config.yml"):
        assert word in text


def test_inspecting_a_backbone_reads_its_card() -> None:
    url = "builtin/avatars32.safetensors"
    found = json.loads(done(diti("backbone", "inspect", url, "--json")))
    assert (found["kind"], found["image_size_px"], found["prediction"]) == (
        "backbone",
        32,
        "v",
    )
    assert found["parts"]["backbone"]["parameters"] > 0
    assert "backbone" in done(diti("backbone", "inspect", url))


def test_inspecting_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latest.pt"
    file.write_text("nothing")
    refused(diti("backbone", "inspect", str(file)), str(file), "not a whole PyTorch checkpoint")


# --- encoders of runs -----------------------------------------------------------------------------


def test_the_encoder_of_a_run_comes_with_or_without_averaging(tmp_path: Path) -> None:
    config = make_run(STORE, str(tmp_path))
    assert isinstance(config.task, DitiTask)
    run = str(tmp_path / "run")
    states = write_checkpoint(STORE, run, config, step=3)
    for ema, name in ((True, "ema"), (False, "weights")):
        trained = load_encoder(STORE, run, ema=ema)
        first = trained.encoder.state_dict()["encoder.0.weight"]
        assert torch.equal(first, states[name]["encoder.0.weight"])
        assert (trained.checkpoint, trained.step) == ("step-00000003", 3)
        assert trained.image_size_px == 32
        assert trained.backbone_sha256 == config.task.backbone.sha256
        assert trained.config == config.model_dump(mode="json")
        assert trained.partition.dim_ends == (8, 16, 24)


# --- export ---------------------------------------------------------------------------------------


def test_subsets_without_a_dimension_give_their_time_steps_to_a_neighbour(tmp_path: Path) -> None:
    config = changed(RUN_CONFIG, "ssl_config", k=10, dims_per_stage="2,22", stages="300,1000")
    trained = load_published_encoder(write_run(tmp_path, config=config))
    sizes = [subset.dims[1] - subset.dims[0] for subset in trained.partition.subsets]
    assert sizes[:4] == [0, 0, 2, 3]
    columns = columns_of(trained.partition)
    assert [column.name for column in columns] == [f"z{number:03d}" for number in range(8)]
    assert [column.timesteps for column in columns[:2]] == [(0, 300), (300, 400)]
    assert (columns[-1].timesteps[1], columns[-1].dims[1]) == (1000, 24)


def test_a_shard_is_encoded_with_an_authors_file(tmp_path: Path) -> None:
    trained = load_published_encoder(write_run(tmp_path))
    index = make_shards(STORE, str(tmp_path / "shards"), shards=1, rows=5)
    encoder = EncoderOnDevice(trained, use_gpu=False)
    layout, shard = FeatureLayout(columns_of(trained.partition)), index.shards[0]
    origin = PartOrigin(trained.sha256, shard.name, shard.sha256)
    part = encode_shard(STORE, encoder, shard, layout, origin)
    assert open_part(part, layout, origin, "part").num_rows == 5


@pytest.mark.timeout(300)
def test_features_are_exported_from_an_authors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_shards(STORE, "shards", shards=2, rows=6)
    relative = str(file.relative_to(tmp_path))
    command = ("export", "--checkpoint", relative, "--shards", "shards", "--workers", "1")
    assert "12 rows of latest.pt" in done(diti(*command, "--out", "features"))
    manifest, trained = read_manifest(STORE, "features"), load_published_encoder(file)
    assert manifest.encoder_sha256 == trained.sha256
    assert manifest.backbone_sha256 == trained.backbone_sha256
    assert manifest.config == trained.config
    assert [column.dims for column in manifest.columns] == [(0, 4), (4, 9), (9, 16), (16, 24)]
    assert open_features("features").arrays().values.shape == (12, 24)
    refused(diti(*command, "--no-ema", "--out", "features"), "another encoder")
    assert STORE.exists(join("features", "manifest.json"))
