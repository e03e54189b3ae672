"""Latents and captions made beforehand are those that a run would make itself, or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.loading import ConfigError, parse_run
from configs.schema import RunConfig
from data_pipelines.encoded_set import EncodedMismatchError, pack, unpack, write_encoding
from data_pipelines.object_store import ObjectMissingError, ObjectStore
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_labels import caption_in
from data_pipelines.sample_reader import iter_shard
from data_pipelines.shard_index import ShardIndex, read_index, write_index
from data_pipelines.tar_members import ShardMismatchError
from pretrain import checkpoint
from pretrain.diffusers_backbone import digest_of_folder, load_diffusers
from pretrain.encoded import encode_shard, encoding_of, load_encoders, open_encoded
from pretrain.preflight import preflight, run_url
from pretrain.train import run
from tests.pretrain.test_train_diffusers import RUN
from tests.tiny_diffusers import save_pipeline
from tests.tiny_run import make_shards
from tools.plan import look_ahead

STORE = ObjectStore()
pytestmark = pytest.mark.usefixtures("world")
FLOAT16 = 2e-3
"""Latents of size 1 lose at most this by being kept in float16."""
CAPTION = "task.backbone.condition=caption"


def config_of(folder: Path, *overrides: str) -> RunConfig:
    sha256 = digest_of_folder(STORE, str(folder / "model"))
    encoded = f"data.encoded={folder / 'encoded'}"
    return parse_run(RUN.format(folder=folder, sha256=sha256), (encoded, *overrides))


def encode(config: RunConfig) -> ShardIndex:
    """What `diti data encode` does, in this process."""
    index, url = read_index(STORE, str(config.data.shards)), str(config.data.encoded)
    encoders = load_encoders(STORE, config, torch.device("cpu"))
    write_encoding(STORE, url, encoding_of(config, index, encoders.latents, encoders.shapes))
    return write_index(
        STORE, url, [encode_shard(STORE, encoders, shard, url) for shard in index.shards]
    )


def make(kind: str, folder: Path, *overrides: str) -> RunConfig:
    save_pipeline(kind, folder / "model")
    make_shards(STORE, str(folder / "train"))
    config = config_of(folder, *overrides)
    encode(config)
    return config


def losses(config: RunConfig, folder: Path) -> list[float]:
    run(config, local_dir=folder)
    manifest = checkpoint.find(STORE, run_url(config), None)
    return [line["loss"] for line in checkpoint.read_metrics(STORE, run_url(config), manifest)]


def without(config: RunConfig) -> RunConfig:
    """The same run, which makes its latents as it needs them."""
    data = config.data.model_copy(update={"encoded": None})
    return config.model_copy(update={"name": "online", "data": data})


@pytest.mark.parametrize("kind", ["stable-diffusion", "sd3"])
def test_latents_are_those_of_the_image_and_of_its_mirror_image(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, "data.horizontal_flip=true")
    backbone = load_diffusers(STORE, config.task.backbone, image_size_px=16)
    index, shapes = open_encoded(STORE, config, read_index(STORE, config.data.shards), backbone)
    assert shapes == {"latent": (4, 8, 8), "mirrored": (4, 8, 8)}
    shard = index.shards[0]
    assert shard.sibling is not None
    pairs = zip(iter_shard(STORE, shard), iter_shard(STORE, shard.sibling), strict=True)
    for image, made in pairs:
        assert image["__key__"] == made["__key__"]
        pixels = torch.from_numpy(decode_sample(image, 16)).permute(2, 0, 1)[None] / 127.5 - 1
        for name, seen in (("latent", pixels), ("mirrored", pixels.flip(3))):
            found = torch.from_numpy(unpack(made, shapes)[name]).float()
            torch.testing.assert_close(
                found, backbone.latents.encode(seen)[0], atol=FLOAT16, rtol=FLOAT16
            )


@pytest.mark.parametrize("flip", ["false", "true"])
def test_a_run_on_latents_made_beforehand_takes_the_steps_of_one_that_makes_them(
    tmp_path: Path, flip: str
) -> None:
    flipped = f"data.horizontal_flip={flip}"
    config = make("stable-diffusion", tmp_path, flipped, "train.log_every_steps=1")
    preflight(config, world_size=1)
    assert look_ahead(config, 1).not_counted == ""
    beforehand, online = losses(config, tmp_path), losses(without(config), tmp_path)
    assert len(beforehand) == 4
    assert beforehand == pytest.approx(online, rel=1e-3)
    assert beforehand != online, "they were not used: float16 leaves a trace"


@pytest.mark.parametrize("kind", ["stable-diffusion", "sdxl", "sd3"])
def test_a_caption_is_told_of_its_own_image(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, CAPTION, "train.log_every_steps=1")
    backbone = load_diffusers(STORE, config.task.backbone, image_size_px=16)
    names = {"prompt"} if kind == "stable-diffusion" else {"prompt", "pooled"}
    index, shapes = open_encoded(STORE, config, read_index(STORE, config.data.shards), backbone)
    assert set(shapes) == {"latent"} | names
    encoders = load_encoders(STORE, config, torch.device("cpu"))
    assert encoders.captions is not None
    shard = index.shards[1]
    assert shard.sibling is not None
    pairs = zip(iter_shard(STORE, shard), iter_shard(STORE, shard.sibling), strict=True)
    for image, made in pairs:
        for name, embedding in encoders.captions([caption_in(image)]).items():
            found = torch.from_numpy(unpack(made, shapes)[name]).float()
            torch.testing.assert_close(found, embedding[0], atol=FLOAT16, rtol=FLOAT16)
    told = losses(config, tmp_path)
    nothing = config.model_copy(update={"name": "nothing", "task": config.task.model_copy(
        update={"backbone": config.task.backbone.model_copy(update={"condition": "none"})}
    )})  # fmt: skip
    assert told != losses(nothing, tmp_path)


def test_the_null_caption_is_what_no_caption_is(tmp_path: Path) -> None:
    """Stable Diffusion is told the empty prompt of images without one."""
    save_pipeline("stable-diffusion", tmp_path / "model")
    make_shards(STORE, str(tmp_path / "train"))
    config = config_of(tmp_path, CAPTION)
    encoders = load_encoders(STORE, config, torch.device("cpu"))
    assert encoders.captions is not None
    backbone = load_diffusers(STORE, config.task.backbone, image_size_px=16)
    prompts = encoders.captions(["", "a cat"])["prompt"]
    torch.testing.assert_close(prompts[:1], backbone.condition["encoder_hidden_states"])
    assert not torch.equal(prompts[0], prompts[1])


def test_a_sample_that_cannot_be_encoded_is_replaced_within_the_budget(tmp_path: Path) -> None:
    config = make("stable-diffusion", tmp_path, CAPTION, "data.error_budget=0.5")
    encoders = load_encoders(STORE, config, torch.device("cpu"))
    index, url = read_index(STORE, str(config.data.shards)), str(config.data.encoded)
    shards = list(read_index(STORE, url).shards)

    def speechless(texts: list[str]) -> Any:
        raise AssertionError("nothing of this shard is encoded")

    mute = type(encoders)(encoders.latents, speechless, 16, mirrored=False)
    bare = make_bare(tmp_path / "bare", index.shards[0].num_samples)
    shards[0] = encode_shard(STORE, mute, bare, url)
    write_index(STORE, url, shards)
    run(config, local_dir=tmp_path)
    manifest = checkpoint.find(STORE, run_url(config), None)
    assert manifest.bad_samples.keys() == {"no latent"}
    assert 0 < sum(manifest.bad_samples.values()) < 32


def make_bare(folder: Path, rows: int) -> Any:
    """A shard of the same keys whose samples have no caption."""
    from data_pipelines.shard_writer import write_shard

    image = next(iter_shard(STORE, make_shards(STORE, str(folder / "one")).shards[0]))["jpg"]
    return write_shard(STORE, str(folder), 0, [(image, {})] * rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "0" * 64}, r"backbone is 0+, and the run's is"),
        ({"images": "1" * 64}, r"images is 1+, and the run's is"),
        ({"image_size_px": 32}, r"image_size_px is 32, and the run's is 16"),
        ({"scaling_factor": 0.18215}, r"scaling_factor is 0\.18215, and the run's is 0\.5"),
        ({"shift_factor": 0.1}, r"shift_factor is 0\.1, and the run's is 0\.0"),
        ({"shapes": {"latent": [4, 4, 4]}}, r"latent has shape \[4, 4, 4\], and the run's has"),
        ({"shapes": {}}, r"it holds no 'latent', which the run needs"),
    ],
)
def test_what_was_encoded_otherwise_is_refused_before_anything_starts(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = make("stable-diffusion", tmp_path)
    encoders = load_encoders(STORE, config, torch.device("cpu"))
    index = read_index(STORE, str(config.data.shards))
    right = encoding_of(config, index, encoders.latents, encoders.shapes)
    other = type(right)(**{name: getattr(right, name) for name in right.__slots__} | change)
    write_encoding(STORE, str(config.data.encoded), other)
    for refuses in (lambda: preflight(config, 1), lambda: look_ahead(config, 1)):
        with pytest.raises(EncodedMismatchError, match=message):
            refuses()


def test_what_a_run_asks_for_beyond_what_was_encoded_is_named(tmp_path: Path) -> None:
    make("stable-diffusion", tmp_path)
    for asked, message in (
        ("data.horizontal_flip=true", r"no 'mirrored', which the run needs \(data.horizontal_flip"),
        (CAPTION, r"no 'prompt', which the run needs \(task.backbone.condition"),
    ):
        with pytest.raises(EncodedMismatchError, match=message):
            preflight(config_of(tmp_path, asked), 1)


def test_a_set_that_is_not_there_damaged_or_of_other_shards_is_refused(tmp_path: Path) -> None:
    config = make("stable-diffusion", tmp_path)
    (tmp_path / "encoded" / "encoded.json").write_text("{}")
    with pytest.raises(EncodedMismatchError, match="cannot be read"):
        preflight(config, 1)
    encode(config)
    shards = list(read_index(STORE, str(config.data.encoded)).shards)
    write_index(STORE, str(config.data.encoded), shards[:-1])
    with pytest.raises(ShardMismatchError, match="does not have the shards of"):
        preflight(config, 1)
    with pytest.raises(ObjectMissingError):
        preflight(config_of(tmp_path, f"data.encoded={tmp_path / 'none'}"), 1)


def test_a_backbone_on_pixels_has_nothing_to_encode(tmp_path: Path) -> None:
    save_pipeline("ddpm", tmp_path / "model")
    make_shards(STORE, str(tmp_path / "train"))
    with pytest.raises(EncodedMismatchError, match="works on pixels"):
        load_encoders(STORE, config_of(tmp_path), torch.device("cpu"))
    with pytest.raises(EncodedMismatchError, match="works on pixels"):
        preflight(config_of(tmp_path), 1)


def test_settings_that_do_not_go_together_are_refused_when_they_are_read(tmp_path: Path) -> None:
    text = RUN.format(folder=tmp_path, sha256="a" * 64)
    for overrides, message in (
        ((CAPTION,), "caption needs data.encoded"),
        (("data.encoded=e", "data.crop=random"), "use crop centre"),
        (("data.encoded=e", "task.backbone={weights: w, sha256: " + "a" * 64 + "}"), "needs task"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_run(text, overrides)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e6])
def test_what_is_no_finite_number_in_float16_is_not_kept(number: float) -> None:
    with pytest.raises(ValueError, match="latent is no finite number in float16"):
        pack({"latent": np.array([0.0, number])})


def test_tensors_are_kept_in_float16(tmp_path: Path) -> None:
    config = make("stable-diffusion", tmp_path)
    sample = next(iter_shard(STORE, read_index(STORE, str(config.data.encoded)).shards[0]))
    assert unpack(sample, {"latent": (4, 8, 8)})["latent"].dtype == np.float16
