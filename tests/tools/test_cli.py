"""The command line: what bad input gets, before anything is started."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import Result

from configs.loading import dump_run
from configs.schema import RunConfig
from data_pipelines.local_s3 import LocalS3, local_s3
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint
from pretrain.backbone import digest_of_state
from pretrain.train import run as run_alone
from tests.diti_command import diti
from tests.published_files import write_denoiser, write_run
from tests.tiny_run import make_run


def train(tmp_path: Path, run: RunConfig, *overrides: str) -> Result:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_run(run))
    return diti("train", str(run_file), *overrides, "--local-dir", str(tmp_path / "local"))


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that holds all these words."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def run(store: ObjectStore, s3_url: str) -> RunConfig:
    return make_run(store, s3_url)


def test_unknown_keys_are_listed_with_the_nearest_name(tmp_path, run) -> None:
    result = train(tmp_path, run, "train.global_bach=3", "engine.zero_stage=7")
    assert result.exit_code == 2
    assert "train.global_bach: unknown key; did you mean 'global_batch'?" in result.stderr
    assert "engine.zero_stage = 7" in result.stderr


def test_text_that_yaml_takes_for_a_number_is_told_to_be_quoted(tmp_path, run) -> None:
    result = train(tmp_path, run, "task.backbone.sha256=0000")
    assert "sha256 = 0: must be text, and YAML reads this as a number; quote it" in result.stderr


def test_a_missing_run_file_is_named(tmp_path) -> None:
    result = diti("train", str(tmp_path / "no.yaml"))
    assert result.exit_code == 2
    assert "no.yaml" in result.stderr


def test_a_missing_bucket_is_named(tmp_path, run) -> None:
    refused(train(tmp_path, run, "output=s3://no-such-bucket/runs"), "no-such-bucket", "bucket")


def test_wrong_credentials_are_refused_and_not_shown(
    tmp_path, run, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    result = train(tmp_path, run)
    refused(result, "AWS_")
    assert "planted-secret" not in result.output
    assert s3.secret_key not in result.output


def test_a_shard_that_does_not_match_its_index_is_named(tmp_path, run, store: ObjectStore) -> None:
    shard = join(run.data.shards, "00002.tar")
    store.write(shard, store.read(shard)[:-512])
    refused(train(tmp_path, run), "00002.tar", "index")


def test_a_missing_shard_is_named(tmp_path, run, store: ObjectStore) -> None:
    store.delete(join(run.data.shards, "00001.tar"))
    refused(train(tmp_path, run), "00001.tar is missing")


def test_shards_without_an_index_are_refused(tmp_path, run, s3_url: str) -> None:
    refused(train(tmp_path, run, f"data.shards={s3_url}/nothing"), "no shard index")


def test_a_backbone_with_another_hash_is_refused(tmp_path, run, store: ObjectStore) -> None:
    weights = run.task.backbone.weights
    content = bytearray(store.read(weights))
    content[-1] ^= 1
    store.write(weights, bytes(content))
    refused(train(tmp_path, run), "SHA-256", weights)


def test_a_backbone_with_other_keys_is_refused(tmp_path, run, store: ObjectStore) -> None:
    card = run.task.backbone.weights.replace(".safetensors", ".json")
    changed = json.loads(store.read(card))
    changed["unet"]["num_res_blocks"] = 2
    store.write(card, json.dumps(changed).encode())
    refused(train(tmp_path, run), "missing", "input_blocks")


def test_a_batch_that_cannot_be_split_lists_the_legal_world_sizes(tmp_path, run) -> None:
    refused(train(tmp_path, run, "cluster.num_workers=3"), "[1, 2, 4, 8, 16, 32]")


def test_credentials_in_a_url_are_refused_and_not_shown(tmp_path, run) -> None:
    for override in (
        "output=s3://me:planted-secret@b/runs",
        "store.endpoint_url='http://u:planted-secret@h'",
    ):
        result = train(tmp_path, run, override)
        assert result.exit_code == 2
        assert "holds credentials" in result.stderr
        assert "planted-secret" not in result.output
    result = diti("features", "show", "s3://me:planted-secret@bucket/features")
    refused(result, "must not hold credentials", "bucket/features")
    assert "planted-secret" not in result.output


def test_gpus_that_this_machine_lacks_are_refused(tmp_path, run) -> None:
    result = train(tmp_path, run, "cluster.use_gpu=true")
    assert result.exit_code == 2
    starting, said = result.stderr.splitlines()
    assert starting == "starting 2 workers", "only Ray knows what GPUs there are"
    assert "wants 2 GPUs" in said
    assert "cluster.use_gpu=false" in said


def test_a_backbone_is_not_trained_by_a_run_of_another_kind_or_into_nowhere(tmp_path, run) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_run(run))
    command = ("backbone", "train", str(run_file), "--out")
    refused(diti(*command, str(tmp_path / "b.safetensors")), "'diti'", "'denoiser'")
    refused(diti(*command, str(tmp_path / "b.pt")), ".safetensors")


@pytest.mark.parametrize(
    "command",
    [
        ("data", "make", "avatars", "--out", "o", "--count", "0"),
        ("data", "make", "avatars", "--out", "o", "--count", "9", "--workers", "0"),
        ("backbone", "samples", "builtin/avatars32.safetensors", "--out", "o", "--count", "0"),
        ("export", "r", "--shards", "s", "--out", "o", "--workers", "0"),
        ("export", "r", "--shards", "s", "--out", "o", "--step", "-1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(command: tuple[str, ...]) -> None:
    result = diti(*command)
    assert result.exit_code == 2
    assert "greater than or equal to" in result.stderr


def test_pictures_are_not_computed_for_a_file_that_cannot_be_written(tmp_path) -> None:
    out = str(tmp_path / "no" / "samples.png")
    refused(diti("backbone", "samples", "builtin/avatars32.safetensors", "--out", out), out)


def test_a_demos_data_can_be_opened_again(tmp_path) -> None:
    with local_s3(tmp_path / "s3") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        ObjectStore().write("s3://diti/kept", b"kept")
    look = (
        "import sys; from data_pipelines.object_store import ObjectStore;"
        "sys.exit(7 if ObjectStore().read('s3://diti/kept') == b'kept' else 1)"
    )
    assert diti("s3", str(tmp_path), sys.executable, "-c", look).exit_code == 7
    refused(diti("s3", str(tmp_path), "no-such-command"), "no-such-command")
    refused(diti("s3", str(tmp_path / "s3")), "holds no demo")


def test_exporting_a_run_without_checkpoints_is_refused(run, s3_url: str) -> None:
    result = diti("export", join(s3_url, "runs", "none"), "--shards", "x", "--out", "y")
    refused(result, "no complete checkpoint")


def test_an_export_is_of_one_run_or_of_one_file(tmp_path) -> None:
    options = ("--shards", "s", "--out", "o")
    refused(diti("export", *options), "exactly one", "neither")
    file = str(write_run(tmp_path))
    refused(diti("export", "r", "--checkpoint", file, *options), "exactly one", "r and", file)
    refused(diti("export", "--checkpoint", file, "--step", "3", *options), "give no step")
    refused(diti("export", "r", "--config", "c.yml", *options), "holds its own")
    refused(diti("export", "--checkpoint", file + "x", *options), file + "x", "does not exist")
    denoiser = str(write_denoiser(tmp_path / "dpm"))
    refused(diti("export", "--checkpoint", denoiser, *options), denoiser, "without an encoder")


@pytest.mark.slow
def test_training_can_start_from_the_folder_of_another_run(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_step = ("train.total_images=8", "train.global_batch=8", "cluster.num_workers=1")
    config = make_run(ObjectStore(), "a folder", *one_step)
    run_alone(config.model_copy(update={"name": "source"}), local_dir=tmp_path / "local")
    result = train(tmp_path, config, "seed=1", "--checkpoint", "a folder/runs/source")
    assert result.exit_code == 0, result.output
    assert "8 images, step-00000001 complete" in result.stdout

    def digest(name: str, step: int, *, ema: bool) -> str:
        url = join("a folder/runs", name)
        manifest = checkpoint.find(ObjectStore(), url, step)
        return digest_of_state(checkpoint.read_tensors(ObjectStore(), url, manifest, ema=ema))

    start = digest("tiny", 0, ema=False)
    assert start == digest("source", 1, ema=True)
    assert start != digest("source", 0, ema=True)


def test_features_without_a_manifest_are_refused(s3_url: str) -> None:
    refused(diti("features", "show", s3_url), "manifest")


@pytest.mark.parametrize(
    "verb",
    [
        (),
        ("demo",),
        ("s3",),
        ("train",),
        ("export",),
        ("report",),
        ("data", "make"),
        ("data", "make", "avatars"),
        ("data", "make", "emoji"),
        ("data", "make", "folder"),
        ("data", "index"),
        ("data", "verify"),
        ("data", "stats"),
        ("data", "repair"),
        ("backbone", "train"),
        ("backbone", "samples"),
        ("backbone", "make-small"),
        ("backbone", "import"),
        ("backbone", "inspect"),
        ("features", "show"),
        ("eval", "attributes"),
        ("eval", "reconstruction"),
    ],
)
def test_every_verb_has_help_with_an_example(verb: tuple[str, ...]) -> None:
    result = diti(*verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert not verb or "Example:" in result.output
