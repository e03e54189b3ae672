"""Publishing: what a release says is true, what is private stays, what is another's is kept."""

import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import Result

import tools.publish
from cluster.export import export_features
from cluster.session import ray_session
from configs.loading import parse_run
from data_pipelines.decoding import decode_image
from data_pipelines.object_store import AlreadyExistsError, ObjectStore, join
from pretrain.backbone import digest_of_state
from pretrain.encoder import Encoder
from pretrain.released_encoder import ReleaseError, load_encoder, preprocess
from pretrain.trained import load_encoder as load_trained
from pretrain.trained import load_published_encoder
from tests.diti_command import diti
from tests.published_files import RUN_CONFIG, write_denoiser, write_run
from tests.tiny_release import RESNET10, tiny_config, tiny_trained, write_checkpoint
from tests.tiny_run import make_backbone, make_shards
from tools.evaluate_attributes import evaluate_attributes
from tools.publish import publish_encoder

STORE = ObjectStore()
FILES = ["README.md", "diti_encoder.py", "encoder.json", "encoder.safetensors"]


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that holds all these words."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


def card_of(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The YAML in front, and the text below each heading, white space joined."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    parts = re.split(r"^#+ (.*)\n", body, flags=re.MULTILINE)
    return yaml.safe_load(front), dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(section: str) -> list[list[str]]:
    """Rows of the table in a section, its head left out."""
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


# --- what is written ------------------------------------------------------------------------------


def test_a_release_is_four_files_and_the_description_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = ObjectStore.write

    def fail_at_the_end(self: ObjectStore, url: str, *rest: Any, **options: Any) -> Any:
        if url.endswith("encoder.json"):
            raise AlreadyExistsError("the disk is full")
        return whole(self, url, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", fail_at_the_end)
        with pytest.raises(AlreadyExistsError):
            publish_encoder(STORE, tiny_trained(), str(out), ema=True)
    assert names_in(out) == [name for name in FILES if name != "encoder.json"]
    with pytest.raises(ReleaseError, match=r"encoder\.json does not exist"):
        load_encoder(out)

    written = publish_encoder(STORE, tiny_trained(), str(out), ema=True)
    assert names_in(out) == FILES
    weights = (out / "encoder.safetensors").read_bytes()
    assert written.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert written.size_bytes == len(weights)
    assert 0 <= written.error < 1e-5
    load_encoder(out)


@pytest.mark.parametrize("overrides", [(), RESNET10])
def test_the_weights_are_a_plain_safetensors_file(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    trained = tiny_trained(*overrides)
    publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True)
    state = load_file(tmp_path / "out" / "encoder.safetensors")
    assert digest_of_state(state) == trained.sha256
    assert state.keys() == trained.encoder.state_dict().keys()


def test_a_release_can_lie_in_a_bucket(store: ObjectStore, s3_url: str, tmp_path: Path) -> None:
    trained = tiny_trained()
    publish_encoder(store, trained, s3_url, ema=True)
    infos = store.list(s3_url)
    assert [info.url for info in infos] == [join(s3_url, name) for name in FILES]
    for info in infos:
        store.download(info.url, tmp_path / info.url.rpartition("/")[2])
    assert load_encoder(tmp_path).release["encoder_sha256"] == trained.sha256
    with pytest.raises(ValueError, match="holds another encoder"):
        publish_encoder(store, tiny_trained(seed=1), s3_url, ema=True)


# --- the card -------------------------------------------------------------------------------------


def test_the_card_tells_data_recipe_partition_and_digests(tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = tiny_trained("data.horizontal_flip=true")
    written = publish_encoder(STORE, trained, str(out), ema=False, licence="CC-BY-NC-4.0")
    front, sections = card_of(out)
    assert front == {
        "license": "cc-by-nc-4.0",
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["diti", "diffusion", "representation-learning", "safetensors"],
    }
    assert cells(sections["Partition"]) == [
        ["z000", "0-50", "0-8"],
        ["z001", "50-300", "8-16"],
        ["z002", "300-1000", "16-24"],
    ]
    assert cells(sections["Data it was trained on"]) == [
        ["shard set (WebDataset)", "s3://bucket/avatars/train"],
        ["images seen", "320 (10 steps of 32), repetitions counted"],
        ["image size", "32 px"],
        ["in training", "the middle square, mirrored half of the time"],
        ["time-steps in training", "0-400"],
    ]
    assert cells(sections["Backbone it was trained against"]) == [
        ["file", "s3://bucket/backbone.safetensors"],
        ["SHA-256", "b" * 64],
    ]
    licences = dict(cells(sections["Licences"]))
    assert licences["weights (`encoder.safetensors`)"] == "CC-BY-NC-4.0"
    assert licences["backbone it was trained against"] == "not stated"
    identity = dict(cells(sections["What exactly this is"]))
    assert identity["checkpoint"] == "step-00000010"
    assert identity["weights"] == "online, not averaged"
    assert identity["SHA-256 of encoder.safetensors"] == written.weights_sha256
    assert identity["SHA-256 of the encoder, as features name it"] == trained.sha256
    assert "Not measured." in sections["Probes"]
    assert "(B, 32, 32, 3)" in sections["Load it"]
    assert json.loads((out / "encoder.json").read_text())["ema"] is False


def test_the_recipe_on_the_card_is_a_run_file(tmp_path: Path) -> None:
    trained = tiny_trained("train.ema_decay=0.5", "optimizer.learning_rate=3e-4")
    publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True)
    _, sections = card_of(tmp_path / "out")
    recipe = "\n".join(
        line[4:] for line in sections["Recipe"].splitlines() if line.startswith("    ")
    )
    run = parse_run(recipe)
    expected = tiny_config("train.ema_decay=0.5", "optimizer.learning_rate=3e-4")
    for section in ("task", "data", "train", "optimizer", "engine", "seed", "name"):
        assert getattr(run, section) == getattr(expected, section), section


PRIVATE = (
    "output=s3://private-bucket/private-prefix",
    "store.endpoint_url=http://private-host:9000",
    "wandb.project=private-project",
    "data.cache={folder: /private-cache, limit_gib: 1}",
    "data.shards=/home/private-user/sets/avatars/train",
    "task.backbone.weights=file:///home/private-user/backbones/avatars.safetensors",
    "task.start_from=/home/private-user/runs/before",
)


def test_where_the_team_keeps_things_is_not_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish_encoder(STORE, tiny_trained(*PRIVATE), str(out), ema=True)
    for name, content in content_of(out).items():
        assert b"private" not in content, name
    _, sections = card_of(out)
    assert dict(cells(sections["Data it was trained on"]))["shard set (WebDataset)"] == (
        "avatars/train"
    )
    assert "start_from: runs/before" in sections["Recipe"]
    assert "backbones/avatars.safetensors" in sections["Backbone it was trained against"]


def test_several_sources_are_listed_with_their_weights(tmp_path: Path) -> None:
    sources = "{faces: {shards: s3://b/faces, weight: 3}, art: {shards: s3://b/a|rt<i>}}"
    trained = tiny_trained(
        "data.shards=null",
        f"data.sources={sources}",
        "data.crop=random",
        "task.timesteps={unit: log_snr, edges: [5, -5]}",
    )
    publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True)
    _, sections = card_of(tmp_path / "out")
    data = cells(sections["Data it was trained on"])
    assert [value for what, value in data if what.startswith("shard set")] == [
        "s3://b/a\\|rt&lt;i>, weight 1",
        "s3://b/faces, weight 3",
    ]
    assert ["in training", "a square at a random place, not mirrored"] in data
    assert ["time-steps in training", "those of log-SNR 5 to -5"] in data


@pytest.mark.parametrize("told", [True, False])
def test_the_backbones_own_card_is_told_if_it_is_of_that_backbone(
    tmp_path: Path, told: bool
) -> None:
    weights = str(tmp_path / "backbone.safetensors")
    sha256 = make_backbone(STORE, weights)
    card = tmp_path / "backbone.json"
    facts = {"license": "Apache-2.0", "source": "a.pt", "command": "diti /home/private-user"}
    card.write_text(json.dumps(json.loads(card.read_text()) | facts))
    trained = tiny_trained(
        f"task.backbone.weights={weights}",
        f"task.backbone.sha256='{sha256 if told else 'c' * 64}'",
    )
    publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True)
    _, sections = card_of(tmp_path / "out")
    licence = dict(cells(sections["Licences"]))["backbone it was trained against"]
    assert licence == ("Apache-2.0" if told else "not stated")
    backbone = dict(cells(sections["Backbone it was trained against"]))
    assert backbone.get("made from the file") == ("a.pt" if told else None)
    assert "private" not in (tmp_path / "out" / "README.md").read_text()


def test_the_packaged_backbone_has_a_card(tmp_path: Path) -> None:
    card = json.loads(Path("pretrain/weights/avatars32.json").read_text())
    trained = tiny_trained(
        "task.backbone.weights=builtin/avatars32.safetensors",
        f"task.backbone.sha256='{card['sha256']}'",
    )
    publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True)
    _, sections = card_of(tmp_path / "out")
    backbone = dict(cells(sections["Backbone it was trained against"]))
    assert backbone["file"] == "builtin/avatars32.safetensors"
    assert backbone["images it was trained on"] == "220,032"


def test_an_untrained_encoder_and_batch_norm_are_said(tmp_path: Path) -> None:
    untrained = replace(tiny_trained(*RESNET10), step=0, checkpoint="step-00000000")
    publish_encoder(STORE, untrained, str(tmp_path / "out"), ema=True)
    _, sections = card_of(tmp_path / "out")
    assert "weights from before training" in sections["Limits"]
    assert "BatchNorm" in sections["Limits"]
    assert "| images seen | 0 (0 steps of 32)" in sections["Data it was trained on"]


def test_an_authors_file_is_published_without_secrets_of_its_config(tmp_path: Path) -> None:
    secrets = {
        "wandb_config": {"api_key": "planted-1", "entity": {"access-key": "planted-2"}},
        "data": [
            "s3://me:planted-3@planted-6@bucket/faces",
            "https://host/faces.zip?sig=planted-7",
            "/home/planted-4/data/faces/train",
        ],
        "dataset_token": "planted-5",
    }
    file = write_run(tmp_path, config=RUN_CONFIG | secrets)
    out = tmp_path / "out"
    result = diti("publish", "--checkpoint", str(file), "--out", str(out))
    assert result.exit_code == 0, result.output
    for name, content in content_of(out).items():
        assert b"planted" not in content, name
        assert str(tmp_path).encode() not in content, name
    front, sections = card_of(out)
    assert (front["license"], front["license_name"]) == ("other", "not-stated")
    assert "not stated: ask" in sections["Licences"]
    assert '"faces/train"' in sections["Recipe"]
    assert '"s3://bucket/faces"' in sections["Recipe"]
    trained = load_published_encoder(file)
    data = dict(cells(sections["Data it was trained on"]))
    assert data["SHA-256 of that file"] == trained.config["checkpoint"]["sha256"]
    assert data["steps"] == "7,000"
    assert load_encoder(out).release["encoder_sha256"] == trained.sha256


def test_the_preprocessing_in_numbers_is_what_training_and_export_do(tmp_path: Path) -> None:
    publish_encoder(STORE, tiny_trained(), str(tmp_path / "out"), ema=True)
    says = json.loads((tmp_path / "out" / "encoder.json").read_text())["preprocessing"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    assert (says["square"], says["turn"]) == ("centre", "exif_orientation")
    resize = says["resize"]
    square = picture.crop((14, 0, 14 + 61, 61)).resize(
        tuple(resize["to_px"]),
        Image.Resampling[resize["filter"].upper()],
        reducing_gap=resize["reducing_gap"],
    )
    pixels = np.asarray(square.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels, decode_image(file.getvalue(), 32))
    scale = says["scale"]
    wanted = torch.tensor(pixels / scale["divide_by"] - scale["subtract"]).permute(2, 0, 1)
    torch.testing.assert_close(preprocess(pixels[None])[0], wanted.float())


# --- what is refused ------------------------------------------------------------------------------


def test_the_same_encoder_is_written_anew_and_another_one_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish_encoder(STORE, tiny_trained(), str(out), ema=True)
    before = content_of(out)
    publish_encoder(STORE, tiny_trained(), str(out), ema=True)
    assert content_of(out) == before
    with pytest.raises(ValueError, match=r"holds another encoder \(tiny, step-00000010"):
        publish_encoder(STORE, tiny_trained(seed=1), str(out), ema=True)
    assert content_of(out) == before
    publish_encoder(STORE, tiny_trained(), str(out), ema=True, licence="MIT")
    assert card_of(out)[0]["license"] == "mit"
    assert (out / "encoder.safetensors").read_bytes() == before["encoder.safetensors"]


@pytest.mark.parametrize("content", ["", "[]", "{", "7"])
def test_a_folder_of_unknown_content_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "encoder.json").write_text(content)
    with pytest.raises(ValueError, match=r"encoder\.json .*delete that folder|another encoder"):
        publish_encoder(STORE, tiny_trained(), str(tmp_path), ema=True)
    assert names_in(tmp_path) == ["encoder.json"]


@pytest.mark.parametrize("name", ["README.md", "encoder.safetensors"])
def test_somebody_elses_file_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} that would be written over"):
        publish_encoder(STORE, tiny_trained(), str(tmp_path), ema=True)
    assert content_of(tmp_path) == {name: b"mine"}


def test_a_publication_that_was_interrupted_is_taken_up(tmp_path: Path) -> None:
    publish_encoder(STORE, tiny_trained(), str(tmp_path), ema=True)
    whole = content_of(tmp_path)
    (tmp_path / "encoder.json").unlink()
    publish_encoder(STORE, tiny_trained(), str(tmp_path), ema=True)
    assert content_of(tmp_path) == whole


@pytest.mark.parametrize("harm", ["shift", "nan"])
def test_a_release_that_computes_something_else_is_not_written(tmp_path: Path, harm: str) -> None:
    trained = tiny_trained()
    if harm == "shift":
        trained.encoder.register_forward_hook(lambda _m, _i, z: z + 2e-4 * z.abs().max())
    else:
        assert isinstance(trained.encoder, Encoder)
        trained.encoder.encoder[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ReleaseError, match=r"another z .* nothing was written"):
        publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True)
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize("licence", ["", "Apache 2.0", "mit\nx: y", "a|b", "<b>"])
def test_a_licence_is_one_identifier(tmp_path: Path, licence: str) -> None:
    with pytest.raises(ValueError, match="one SPDX identifier"):
        publish_encoder(STORE, tiny_trained(), str(tmp_path / "out"), ema=True, licence=licence)
    assert names_in(tmp_path / "out") == []


# --- the command ----------------------------------------------------------------------------------


def test_a_run_is_published_by_its_folder(tmp_path: Path) -> None:
    run_url, out = str(tmp_path / "run"), tmp_path / "out"
    averaged = write_checkpoint(STORE, run_url, tiny_config())["ema"]
    result = diti("publish", run_url, "--out", str(out), "--licence", "MIT")
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    digest = hashlib.sha256((out / "encoder.safetensors").read_bytes()).hexdigest()
    assert line.startswith(f"encoder of step-00000010 at {out}: ")
    assert f"SHA-256 {digest[:12]}; loaded back, z agrees to" in line
    assert digest_of_state(load_file(out / "encoder.safetensors")) == digest_of_state(averaged)
    online = tmp_path / "online"
    assert diti("publish", run_url, "--no-ema", "--out", str(online)).exit_code == 0
    state = load_file(online / "encoder.safetensors")
    assert digest_of_state(state) == load_trained(STORE, run_url, ema=False).sha256
    assert digest_of_state(state) != digest_of_state(averaged)
    refused(
        diti("publish", run_url, "--no-ema", "--out", str(out)),
        "another encoder (tiny, step-00000010, averaged, ",
        "; this is tiny, step-00000010, online, ",
    )
    refused(diti("publish", run_url, "--step", "9", "--out", str(out)), "no complete checkpoint")


def test_it_is_one_run_or_one_file(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    refused(diti("publish", *out), "exactly one", "neither")
    file = str(write_run(tmp_path))
    refused(diti("publish", "r", "--checkpoint", file, *out), "exactly one", "r and", file)
    refused(diti("publish", "--checkpoint", file, "--step", "3", *out), "give no step")
    refused(diti("publish", "r", "--config", "c.yml", *out), "holds its own")
    denoiser = str(write_denoiser(tmp_path / "dpm"))
    refused(diti("publish", "--checkpoint", denoiser, *out), denoiser, "without an encoder")
    refused(diti("publish", str(tmp_path / "none"), *out), "no complete checkpoint")
    assert diti("publish", "--checkpoint", file, "--out", "").exit_code == 2
    assert names_in(tmp_path / "out") == []


def test_the_verb_has_help_with_an_example() -> None:
    result = diti("publish", "--help")
    assert result.exit_code == 0
    assert "Example: diti publish" in result.output


@pytest.mark.timeout(300)
def test_probe_results_are_of_this_encoders_features(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    train, test = urls = [str(tmp_path / "features" / split) for split in ("val", "test")]
    with ray_session(num_cpus=1):
        for split, url in zip(("val", "test"), urls, strict=True):
            shards = str(tmp_path / "sets" / split)
            make_shards(STORE, shards, split=split, shards=1, rows=80)
            export_features(
                STORE, checkpoint_url=str(file), shards_url=shards, out_url=url, num_workers=1
            )
    out = tmp_path / "out"
    command = ("publish", "--checkpoint", str(file), "--out", str(out), "--features", *urls)
    refused(diti(*command, "--no-ema"), train, "were not made by the encoder of latest.pt")
    assert names_in(out) == []
    result = diti(*command)
    assert result.exit_code == 0, result.output
    _, sections = card_of(out)
    wanted = evaluate_attributes(STORE, train_url=train, test_url=test)
    rows = cells(sections["Probes"])
    assert [row[0] for row in rows] == [result.name for result in wanted]
    assert [row[2] for row in rows] == [f"{result.mean:.3f}" for result in wanted]
    assert "| feature | dimensions | all | coarse | middle | fine |" in sections["Probes"]
    assert len(rows[0]) == 6
    assert "80 images of sets/val, scored on 80 images of sets/test" in sections["Probes"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_sha256": "c" * 64}, r"not made by the encoder of step-00000010"),
        ({"columns": [SimpleNamespace(name="z001", dims=(8, 16))]}, r"z001 to z001; export all"),
    ],
)
def test_features_of_another_encoder_or_of_a_part_are_refused_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    changes: dict[str, Any],
    words: str,
) -> None:
    trained, urls = tiny_trained(), ("train-url", "test-url")
    whole = [SimpleNamespace(name="z000", dims=(0, 24))]
    good = {"encoder_sha256": trained.sha256, "columns": whole, "checkpoint": "step-00000009"}
    manifests = {url: SimpleNamespace(**good) for url in urls}
    manifests[urls[number]] = SimpleNamespace(**(good | changes))
    monkeypatch.setattr(tools.publish, "read_manifest", lambda _store, url: manifests[url])
    with pytest.raises(ValueError, match=rf"{urls[number]} .*{words}"):
        publish_encoder(STORE, trained, str(tmp_path / "out"), ema=True, features=urls)
    assert names_in(tmp_path / "out") == []
