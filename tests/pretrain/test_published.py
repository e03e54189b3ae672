"""Published checkpoints: read exactly or refused, by name and with a remedy; never executed."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from configs.task import EncoderConfig, PublishedPartition, ScheduleConfig, UNetConfig
from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from pretrain import checkpoint
from pretrain.diti import DiTi
from pretrain.partition import published_partition
from pretrain.published import (
    AuthorsCheckpoint,
    PublishedCheckpointError,
    load_authors_checkpoint,
)
from pretrain.published_shapes import unet_fields
from pretrain.resnet10 import ResNet10
from pretrain.trained import initial_weights, load_published_diti, load_published_encoder
from pretrain.unet import UNet
from tests.published_files import (
    DENOISER_CONFIG,
    ENCODER,
    RUN_CONFIG,
    SIZE_PX,
    UNET,
    changed,
    denoiser_state,
    run_content,
    write_denoiser,
    write_run,
)

State = dict[str, Tensor]


def refused(path: Path, *words: str, **arguments: Any) -> str:
    """The message of the error; one line that names the file and holds all these words."""
    with pytest.raises(PublishedCheckpointError) as error:
        load_authors_checkpoint(path, **arguments)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def frozen_part(decoder: State) -> State:
    return {name: decoder[name] for name in denoiser_state()}


def shift_part(decoder: State) -> State:
    return {name: tensor for name, tensor in decoder.items() if name not in denoiser_state()}


# --- runs -----------------------------------------------------------------------------------------


def test_a_diti_run_is_read_with_all_its_parts(tmp_path: Path) -> None:
    content = run_content()
    found = load_authors_checkpoint(write_run(tmp_path, content))
    assert (found.kind, found.step, found.ema, found.mode) == ("diti", 7000, True, "base")
    assert found.unet == UNET
    assert found.encoder_config == ENCODER
    assert found.image_size_px == SIZE_PX
    assert found.schedule == ScheduleConfig()
    assert found.prediction == "epsilon"
    assert same(found.encoder, content["ema_encoder"])
    assert same(found.backbone, frozen_part(content["ema_decoder"]))
    assert same(found.shift, shift_part(content["ema_decoder"]))
    assert found.partition == published_partition(4, 24, stage_ends=(300, 1000), stage_dims=(9, 15))


def test_every_value_says_where_it_was_found(tmp_path: Path) -> None:
    found = load_authors_checkpoint(write_run(tmp_path))
    config = str(tmp_path / "runs" / "faces" / "diti" / "config.yml")
    denoiser = str(tmp_path / "pre-trained-dpms" / "faces" / "config.yml")
    assert found.config.source == config
    assert found.origins == {
        "U-Net": "shapes of the weights",
        "encoder": "shapes of the weights",
        "image size": "shapes of the weights",
        "attention heads": denoiser,
        "attention order": denoiser,
        "dropout": denoiser,
        "schedule": config,
        "partition": config,
        "mode": config,
    }


def test_the_online_weights_can_be_taken(tmp_path: Path) -> None:
    content = run_content()
    found = load_authors_checkpoint(write_run(tmp_path, content), ema=False)
    assert same(found.encoder, content["encoder"])
    assert same(found.shift, shift_part(content["decoder"]))
    assert not found.ema


def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    content = run_content()
    wrapped = dict(content)
    for prefix, part in (("_orig_mod.", "ema_encoder"), ("module._orig_mod.", "ema_decoder")):
        wrapped[part] = {f"{prefix}{name}": tensor for name, tensor in content[part].items()}
    found = load_authors_checkpoint(write_run(tmp_path, wrapped))
    assert same(found.encoder, content["ema_encoder"])
    assert same(found.shift, shift_part(content["ema_decoder"]))


def test_pdae_is_one_subset(tmp_path: Path) -> None:
    config = {key: value for key, value in RUN_CONFIG.items() if key != "ssl_config"}
    found = load_authors_checkpoint(write_run(tmp_path, run_content(is_diti=False), config=config))
    assert found.kind == "pdae"
    assert found.partition is not None
    assert (found.partition.timestep_ends, found.partition.dim_ends) == ((1000,), (24,))


@pytest.mark.parametrize("mode", ["stop_grad", "dual"])
def test_the_mode_and_a_balanced_cut_come_from_the_config(tmp_path: Path, mode: str) -> None:
    config = {**RUN_CONFIG, "ssl_config": {"k": 6, "pdae_mode": mode}}
    found = load_authors_checkpoint(write_run(tmp_path, config=config))
    assert found.mode == mode
    assert found.partition == published_partition(6, 24)
    assert found.partition_config == PublishedPartition(kind="published", num_subsets=6)


def test_subsets_without_a_dimension_are_kept(tmp_path: Path) -> None:
    config = changed(RUN_CONFIG, "ssl_config", k=20, dims_per_stage="4,20")
    found = load_authors_checkpoint(write_run(tmp_path, config=config))
    assert found.partition is not None
    assert found.partition.num_subsets == 20
    assert found.partition.subsets[0].dims == (0, 0)
    assert found.build_encoder().image_size_px == SIZE_PX


def test_without_a_config_a_diti_run_of_512_dimensions_has_the_papers_cut(tmp_path: Path) -> None:
    encoder = ENCODER.model_copy(update={"latent_dim": 512})
    found = load_authors_checkpoint(write_run(tmp_path, run_content(encoder=encoder), config=None))
    assert found.config.source is None
    for guessed in ("partition", "attention heads", "attention order", "dropout"):
        assert found.origins[guessed] == "default of the published recipe"
    assert (found.unet.num_heads, found.unet.attention_order, found.unet.dropout) == (
        1,
        "legacy",
        0.1,
    )
    assert found.partition == published_partition(
        64, 512, stage_ends=(50, 100, 300, 500, 1000), stage_dims=(10, 25, 327, 100, 50)
    )


def test_without_a_config_another_cut_is_not_guessed(tmp_path: Path) -> None:
    refused(write_run(tmp_path, config=None), "24 dimensions", "give the run's config.yml")


def test_the_built_model_computes_what_its_parts_compute(tmp_path: Path) -> None:
    found = load_authors_checkpoint(write_run(tmp_path))
    model = found.build_diti()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    torch.manual_seed(0)
    images, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([9, 400, 999])
    assert torch.equal(model.encoder(images), found.build_encoder()(images))
    xt = model.schedule.add_noise(images, t, noise)
    epsilon, _ = model.estimates(xt, t, model.encoder(images))
    assert torch.equal(epsilon, found.build_backbone().unet(xt, t))
    assert model(images, t, noise).shape == (3,)


def test_the_encoder_alone_and_the_model_have_shortcuts(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    found = load_authors_checkpoint(path)
    trained = load_published_encoder(path)
    assert same(trained.encoder.state_dict(), found.encoder)
    assert trained.partition == found.partition
    assert (trained.checkpoint, trained.step, trained.image_size_px) == ("latest.pt", 7000, SIZE_PX)
    assert trained.backbone_sha256 == found.backbone_sha256
    assert json.loads(json.dumps(trained.config)) == trained.config
    assert trained.config["data"]["image_size_px"] == SIZE_PX
    assert load_published_encoder(path, ema=False).sha256 != trained.sha256
    model, task = load_published_diti(path)
    assert task.partition == found.partition_config
    assert same(model.encoder.state_dict(), found.encoder)


def test_a_baseline_gives_its_encoder_but_no_model(tmp_path: Path) -> None:
    config = changed(RUN_CONFIG, "ssl_config", pdae_mode="no_pdae")
    found = load_authors_checkpoint(write_run(tmp_path, config=config))
    assert found.partition is not None
    assert found.partition.num_subsets == 1
    found.build_encoder()
    with pytest.raises(PublishedCheckpointError, match="only its encoder can be used"):
        found.build_diti()


def test_tensors_do_not_lean_on_the_file(tmp_path: Path) -> None:
    content = run_content()
    path = write_run(tmp_path, content)
    found = load_authors_checkpoint(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert same(found.encoder, content["ema_encoder"])
    assert same(found.backbone, frozen_part(content["ema_decoder"]))


# --- where config.yml is looked for ---------------------------------------------------------------


def test_a_config_beside_the_file_comes_first(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    beside = changed(RUN_CONFIG, "ssl_config", pdae_mode="dual") | DENOISER_CONFIG
    (path.parent / "config.yml").write_text(yaml.safe_dump(beside))
    assert load_authors_checkpoint(path).mode == "dual"


def test_a_config_can_be_given_as_a_file_or_as_a_mapping(tmp_path: Path) -> None:
    path = write_run(tmp_path, config=None)
    given = RUN_CONFIG | DENOISER_CONFIG
    elsewhere = tmp_path / "elsewhere.yml"
    elsewhere.write_text(yaml.safe_dump(given))
    for config in (given, elsewhere, str(elsewhere)):
        found = load_authors_checkpoint(path, config=config)
        assert found.partition == published_partition(
            4, 24, stage_ends=(300, 1000), stage_dims=(9, 15)
        )
        assert found.unet.num_heads == 4


def test_a_file_in_object_storage_is_read_with_its_config(
    tmp_path: Path, store: ObjectStore, s3_url: str
) -> None:
    path = write_run(tmp_path)
    for file in ("runs/faces/diti/checkpoints/latest.pt", "runs/faces/diti/config.yml"):
        store.upload(tmp_path / file, join(s3_url, file))
    store.upload(
        tmp_path / "pre-trained-dpms" / "faces" / "config.yml",
        join(s3_url, "pre-trained-dpms/faces/config.yml"),
    )
    url = join(s3_url, "runs/faces/diti/checkpoints/latest.pt")
    found, local = load_authors_checkpoint(url, store=store), load_authors_checkpoint(path)
    assert found.sha256 == local.sha256
    assert found.unet == local.unet
    assert same(found.encoder, local.encoder)
    assert found.origins["attention heads"].startswith(s3_url)


# --- denoisers ------------------------------------------------------------------------------------


def test_a_pretrained_denoiser_becomes_a_backbone(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "faces")
    found = load_authors_checkpoint(path, image_size_px=SIZE_PX)
    assert (found.kind, found.step, found.unet) == ("dpm", 300, UNET)
    assert (found.partition, found.mode, found.encoder) == (None, None, {})
    backbone = found.build_backbone()
    assert (backbone.image_size_px, backbone.prediction) == (SIZE_PX, "epsilon")
    reference = UNet(UNET)
    reference.load_state_dict(denoiser_state())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    assert torch.equal(backbone.unet(x, t), reference.eval()(x, t))
    for attempt in (found.build_diti, found.build_encoder, found.trained_weights):
        with pytest.raises(PublishedCheckpointError, match="without an encoder"):
            attempt()


def test_the_image_size_of_a_denoiser_may_stand_in_its_config(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path)
    assert load_authors_checkpoint(path).image_size_px is None
    with pytest.raises(PublishedCheckpointError, match="give image_size_px"):
        load_authors_checkpoint(path).build_backbone()
    (tmp_path / "config.yml").write_text(
        yaml.safe_dump(DENOISER_CONFIG | {"dataset_config": {"image_size": 16}})
    )
    assert load_authors_checkpoint(path).image_size_px == 16
    refused(path, "dataset_config.image_size is 16", "image_size_px is 8", image_size_px=8)


def write_adm(folder: Path, state: State) -> Path:
    path = folder / "uncond.pt"
    torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": True},
        {"resblock_updown": False},
        {"scale_shift_norm": False},
        {"channel_multipliers": (1, 2, 2), "attention_factors": (2, 4), "num_res_blocks": 2},
        {"channel_multipliers": (2,), "attention_factors": ()},
    ],
)
def test_an_adm_state_dict_tells_its_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    fields = {"dropout": 0.0, "num_heads": 1, "head_channels": 32, "attention_order": "new"}
    config = UNetConfig.model_validate({**UNET.model_dump(), **fields, **changes})
    state = denoiser_state(config=config)
    found = load_authors_checkpoint(
        write_adm(tmp_path, state), head_channels=32, attention_order="new", image_size_px=8
    )
    assert (found.kind, found.step, found.unet) == ("adm", None, config)
    assert found.origins["attention heads"] == found.origins["attention order"] == "argument"
    half = {name: tensor.half().float() for name, tensor in state.items()}
    assert same(found.backbone, half)
    found.build_backbone()


@pytest.mark.parametrize("plain_resampling", [True, False])
def test_the_names_of_adm_tell_its_variants(plain_resampling: bool) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in denoiser_state().items()}
    shapes["out.2.weight"] = (6, *shapes["out.2.weight"][1:])
    shapes["out.2.bias"] = (6,)
    for name in shapes:
        if ".emb_layers.1." in name:
            shapes[name] = (shapes[name][0] // 2, *shapes[name][1:])
    if plain_resampling:
        dropped = ("input_blocks.2.0.", "output_blocks.1.2.")
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(dropped)}
        for layer, width in (("input_blocks.2.0.op", 32), ("output_blocks.1.2.conv", 64)):
            shapes |= {f"{layer}.weight": (width, width, 3, 3), f"{layer}.bias": (width,)}
    fields = unet_fields(shapes)
    assert fields.pop("learn_sigma") is True
    assert fields.pop("scale_shift_norm") is False
    assert fields.pop("resblock_updown") is not plain_resampling
    assert fields == {name: getattr(UNET, name) for name in fields}


def test_an_adm_state_dict_needs_to_be_told_its_heads(tmp_path: Path) -> None:
    path = write_adm(tmp_path, denoiser_state())
    refused(path, "give num_heads or head_channels")
    assert load_authors_checkpoint(path, num_heads=2).unet.num_heads == 2
    refused(path, "num_heads (or head_channels) must divide", num_heads=5)
    refused(path, "holds one set of weights", ema=False, num_heads=2)


def test_a_class_conditional_model_is_refused(tmp_path: Path) -> None:
    state = denoiser_state() | {"label_emb.weight": torch.zeros(1000, 128)}
    refused(
        write_adm(tmp_path, state),
        "class-conditional",
        "1000 rows",
        "use the unconditional checkpoint",
        num_heads=1,
    )


# --- contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(RUN_CONFIG, "encoder_config", latent_dim=512), ("latent_dim is 512", "have 24")),
        (changed(RUN_CONFIG, "decoder_config", latent_dim=64), ("latent_dim is 64", "have 24")),
        (changed(RUN_CONFIG, "train_dataset_config", image_size=64), ("is 64", "have 8")),
        (changed(RUN_CONFIG, "ssl_config", dims_per_stage="9,16"), ("add up to 25", "24")),
        (changed(RUN_CONFIG, "ssl_config", stages="300,900"), ("1000", "900")),
        (changed(RUN_CONFIG, "ssl_config", stages="300"), ("stage_ends and stage_dims", "1 and 2")),
        (changed(RUN_CONFIG, "ssl_config", stages="a,b"), ("ssl_config.stages", "'a,b'")),
        (changed(RUN_CONFIG, "ssl_config", k="many"), ("ssl_config.k", "'many'")),
        (changed(RUN_CONFIG, "ssl_config", k_per_stage="1,3"), ("k_per_stage",)),
        (changed(RUN_CONFIG, "ssl_config", pdae_mode="both"), ("pdae_mode", "'both'", "stop_grad")),
        ({**RUN_CONFIG, "ssl_config": None}, ("does not say ssl_config.k",)),
        (changed(RUN_CONFIG, "diffusion_config", betas_type="cosine"), ("betas_type", "cosine")),
        (changed(RUN_CONFIG, "diffusion_config", linear_beta_end=2), ("beta_end", "2")),
        ({**RUN_CONFIG, "encoder_config": 3}, ("encoder_config must be a section, got 3",)),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    tmp_path: Path, config: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(write_run(tmp_path, config=config), *words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_channel": 64}, ("denoise_fn_config.base_channel is 64", "the weights have 32")),
        ({"channel_multiplier": [1, 2, 2]}, ("is [1, 2, 2]", "have [1, 2]")),
        ({"num_residual_blocks_of_a_block": 2}, ("is 2", "have 1")),
        ({"attention_resolutions": [4]}, ("attention_resolutions is [4]", "have [2]")),
        ({"learn_sigma": True}, ("learn_sigma is True", "have False")),
        ({"input_channel": 1}, ("input_channel is 1", "have 3")),
        ({"num_heads": 5}, ("num_heads (or head_channels) must divide", "got 5")),
        ({"num_heads": 2.5}, ("denoise_fn_config.num_heads", "2.5")),
        ({"channel_multiplier": [1, 2.9]}, ("channel_multiplier must be whole numbers", "2.9")),
    ],
)
def test_a_denoisers_config_that_contradicts_the_weights_is_refused(
    tmp_path: Path, values: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = write_denoiser(tmp_path)
    config = changed(DENOISER_CONFIG, "denoise_fn_config", **values)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    refused(path, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 2}, ("num_heads is 4", "argument num_heads is 2")),
        ({"head_channels": 16}, ("num_heads is 4", "argument head_channels is 16")),
        ({"attention_order": "new"}, ("is legacy", "argument attention_order is new")),
    ],
)
def test_an_argument_that_contradicts_the_config_is_refused(
    tmp_path: Path, arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(write_denoiser(tmp_path), str(tmp_path / "config.yml"), *words, **arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", ("is not YAML of plain values",)),
        ("a: !!python/object/apply:os.system ['true']", ("is not YAML of plain values",)),
        ("- a", ("must be a mapping of sections, got list",)),
    ],
)
def test_a_config_that_is_no_plain_mapping_is_refused(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    path = write_denoiser(tmp_path)
    (tmp_path / "config.yml").write_text(text)
    refused(path, str(tmp_path / "config.yml"), *words)


# --- files that are not what they should be -------------------------------------------------------


def test_a_missing_file_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError, match=r"gone\.pt"):
        load_authors_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(ObjectMissingError, match=r"gone\.yml"):
        load_authors_checkpoint(write_run(tmp_path), config=tmp_path / "gone.yml")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 2, 50, 5000, -1, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int, zipped: bool) -> None:
    path = tmp_path / "latest.pt"
    torch.save(run_content(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "not a whole PyTorch checkpoint", "fetch it again")


def test_a_byte_that_was_flipped_on_the_way_is_found(tmp_path: Path) -> None:
    state = run_content()
    path = write_run(tmp_path, state)
    content = bytearray(path.read_bytes())
    content[content.index(state["ema_encoder"]["encoder.0.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    refused(path, "/data/", "is damaged (its CRC-32 is another)")


def test_an_old_file_without_zip_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    content = run_content()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert same(load_authors_checkpoint(path).encoder, content["ema_encoder"])


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    path.write_text("<html>Sign in to download</html>")
    refused(path, "not a whole PyTorch checkpoint (32 bytes)")


class _Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_never_run(tmp_path: Path, how: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "latest.pt"
    content = {"ema_denoise_fn": _Bomb(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refused(path)
    assert "it would run code" in message or "not a whole PyTorch checkpoint" in message
    if how != "pickle":
        assert "it asks for" in message
    assert not trace.exists()
    with path.open("rb") as file:  # and the bomb is a live one
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert trace.read_text() == "executed"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), ("holds one Tensor",)),
        ([torch.zeros(3)], ("holds one list",)),
        ({"state_dict": {}, "epoch": 3}, ("layout is unknown", "epoch, state_dict")),
        ({"encoder": {}}, ("layout is unknown", "encoder")),
        ({}, ("layout is unknown",)),
        ({"denoise_fn": {}}, ("has no ema_denoise_fn, only denoise_fn", "ema=False")),
        ({"ema_denoise_fn": 3}, ("ema_denoise_fn is a int",)),
        ({"ema_denoise_fn": {"a": 3}}, ("no tensors: a",)),
        ({"ema_denoise_fn": {}}, ("no time_embed.0.weight",)),
        ({"ema_denoise_fn": {"module.a": torch.ones(1), "a": torch.ones(1)}}, ("twice",)),
    ],
)
def test_another_content_is_refused(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    path = tmp_path / "latest.pt"
    torch.save(content, path)
    refused(path, *words)


def test_online_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    refused(write_denoiser(tmp_path), "has no denoise_fn, only ema_denoise_fn, step", ema=False)


def drop(part: str, name: str) -> Callable[[dict[str, State]], object]:
    return lambda content: content[part].pop(name)


def put(part: str, name: str, tensor: Tensor) -> Callable[[dict[str, State]], object]:
    return lambda content: content[part].update({name: tensor})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("ema_encoder", "encoder.1.bias"), ("encoder", "missing: encoder.1.bias")),
        (put("ema_encoder", "extra", torch.ones(1)), ("encoder", "extra: extra")),
        (
            put("ema_encoder", "encoder.1.bias", torch.ones(7)),
            ("encoder", "wrong shape: encoder.1.bias (7,) beside encoder.1.weight (32,)"),
        ),
        (drop("ema_decoder", "out.2.bias"), ("denoiser", "missing: out.2.bias")),
        (drop("ema_decoder", "label_emb.bias"), ("shift path", "missing: label_emb.bias")),
        (
            put("ema_decoder", "label_emb.weight", torch.ones(128, 25)),
            ("shift path", "label_emb.weight (128, 25) instead of (128, 24)"),
        ),
        (put("ema_decoder", "stranger", torch.ones(1)), ("shift path", "extra: stranger")),
        (
            put("ema_decoder", "output_blocks.3.0.in_layers.2.bias", torch.ones(5)),
            ("denoiser", "wrong shape: output_blocks.3.0.in_layers.2.bias (5,) beside"),
        ),
        (
            put("ema_encoder", "encoder.8.weight", torch.ones(24, 100)),
            ("encoder.8.weight of its encoder takes 100 values",),
        ),
    ],
)
def test_one_wrong_tensor_is_enough(
    tmp_path: Path, damage: Callable[[dict[str, State]], object], words: tuple[str, ...]
) -> None:
    content = run_content()
    damage(content)
    refused(write_run(tmp_path, content), *words)


EVERY = pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
"""How many tensors further the next one is that is tried."""


@EVERY
@pytest.mark.parametrize("part", ["ema_encoder", "ema_decoder"])
def test_whichever_tensor_is_missing_it_is_named(tmp_path: Path, part: str, every: int) -> None:
    content = run_content()
    path = write_run(tmp_path, content)
    for name in list(content[part])[::every]:
        rest = {other: tensor for other, tensor in content[part].items() if other != name}
        torch.save(content | {part: rest}, path)
        refused(path, f"missing: {name}")


@EVERY
@pytest.mark.parametrize("part", ["ema_encoder", "ema_decoder"])
def test_whichever_tensor_is_too_wide_it_is_named(tmp_path: Path, part: str, every: int) -> None:
    content = run_content()
    path = write_run(tmp_path, content)
    for name, tensor in list(content[part].items())[::every]:
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        if tensor.dim() == 4:
            wide = torch.zeros(tensor.shape[0], tensor.shape[1] + 1, *tensor.shape[2:])
        torch.save(content | {part: content[part] | {name: wide}}, path)
        refused(path, name)


def test_an_encoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    content = run_content() | {"ema_encoder": {"conv1.weight": torch.ones(64, 3, 3, 3)}}
    refused(write_run(tmp_path, content), "none of the published convolutional ones", "conv1")


def test_a_long_list_of_keys_is_cut(tmp_path: Path) -> None:
    content = run_content()
    decoder = content["ema_decoder"]
    gone = [name for name in decoder if name.startswith("shift_output_blocks.")]
    content["ema_decoder"] = {name: t for name, t in decoder.items() if name not in gone}
    refused(write_run(tmp_path, content), f"and {len(gone) - 5} more")


# --- starting weights -----------------------------------------------------------------------------


def model_like(found: AuthorsCheckpoint, **changes: object) -> DiTi:
    """A model for a run with the file's settings, but for these of its task."""
    backbone = found.build_backbone()
    task = found.task().model_copy(update=changes)
    return DiTi(task, backbone, image_size_px=backbone.image_size_px)


def test_a_run_can_start_from_an_authors_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_run(tmp_path)
    found = load_authors_checkpoint(path)
    model = model_like(found)
    weights = initial_weights(path, ObjectStore(), model)
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights["encoder.encoder.0.weight"], found.encoder["encoder.0.weight"])
    assert torch.equal(weights["decoder.label_emb.bias"], found.shift["label_emb.bias"])
    assert caplog.messages == []


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    found = load_authors_checkpoint(path)
    assert found.encoder_config is not None
    wider = found.encoder_config.model_copy(update={"channels": (64, 32)})
    with pytest.raises(PublishedCheckpointError) as error:
        initial_weights(path, ObjectStore(), model_like(found, encoder=wider))
    for word in (str(path), "wrong shape: ", "encoder.encoder.0.bias (32,) instead of (64,)"):
        assert word in str(error.value)


def test_what_shapes_do_not_tell_is_compared_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_run(tmp_path)
    found = load_authors_checkpoint(path)
    assert found.encoder_config is not None
    heads = found.encoder_config.model_copy(update={"num_heads": 2})
    with pytest.raises(PublishedCheckpointError, match=r"attention heads.*num_heads="):
        initial_weights(path, ObjectStore(), model_like(found, encoder=heads))

    model = model_like(found)
    with torch.no_grad():
        model.decoder.backbone.get_parameter("out.2.bias").add_(0.1)
    with pytest.raises(
        PublishedCheckpointError, match=r"another backbone.*1 tensors.*out\.2\.bias"
    ):
        initial_weights(path, ObjectStore(), model)

    assert caplog.messages == []
    initial_weights(path, ObjectStore(), model_like(found, mode="dual"))
    assert f"{path} was trained with another mode than this run" in caplog.messages


def test_a_start_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = model_like(load_authors_checkpoint(write_run(tmp_path)))
    with pytest.raises(ObjectMissingError, match=r"gone\.pt"):
        initial_weights(tmp_path / "gone.pt", ObjectStore(), model)
    with pytest.raises(checkpoint.CheckpointError, match="no complete checkpoint"):
        initial_weights(tmp_path / "gone", ObjectStore(), model)
    with pytest.raises(PublishedCheckpointError, match="without an encoder"):
        initial_weights(write_denoiser(tmp_path / "faces"), ObjectStore(), model)


def test_an_encoder_without_attention_is_read(tmp_path: Path) -> None:
    encoder = EncoderConfig(latent_dim=24, channels=(32, 32, 64), attention_after=None)
    found = load_authors_checkpoint(write_run(tmp_path, run_content(encoder=encoder)))
    assert found.encoder_config == encoder
    assert found.image_size_px == SIZE_PX


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_resnet10_is_refused_because_its_layers_names_are_not_known(
    tmp_path: Path, prefix: str
) -> None:
    content = run_content()
    content["ema_encoder"] = {f"{prefix}{n}": t for n, t in ResNet10().state_dict().items()}
    path = write_run(tmp_path, content)
    refused(path, "BatchNorm", "bn1.running_mean", "ResNet10", "Only the convolutional")


class _Shell:
    """The classic: unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("exit 0",)


def test_a_file_that_would_run_a_command_is_called_that(tmp_path: Path) -> None:
    torch.save({"ema_denoise_fn": _Shell()}, tmp_path / "latest.pt")
    assert "it would run code" in refused(tmp_path / "latest.pt", "system), so it is not")


def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    state = dict(denoiser_state())
    state["out.2.bias"] = torch.full_like(state["out.2.bias"], torch.nan)
    refused(write_denoiser(tmp_path, state), "NaN, infinite or too large", "out.2.bias")


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (torch.full((3,), 1e300, dtype=torch.float64), "too large for float32: out.2.bias"),
        (torch.ones(3, dtype=torch.int8), "no floating-point numbers: out.2.bias"),
        (torch.zeros(1).expand(10**4, 10**10), "repeated, without content"),
    ],
    ids=["too large", "integers", "repeated"],
)
def test_tensors_that_are_no_weights_are_refused_by_name(
    tmp_path: Path, bias: torch.Tensor, words: str
) -> None:
    refused(write_denoiser(tmp_path, dict(denoiser_state()) | {"out.2.bias": bias}), words)


def test_a_file_that_was_compressed_afterwards_is_refused_as_that(tmp_path: Path) -> None:
    source = write_denoiser(tmp_path, denoiser_state())
    packed = source.with_name("packed.pt")
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(packed, "w") as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry), zipfile.ZIP_DEFLATED)
    refused(packed, "it was compressed after")


# ---------------------------------------------------------------------- other runs than the usual


def test_a_run_of_another_length_is_built_and_trained_on_all_its_timesteps(tmp_path: Path) -> None:
    config = changed(RUN_CONFIG, "diffusion_config", timesteps=500)
    config = changed(config, "ssl_config", stages="200,500")
    model, task = load_published_diti(write_run(tmp_path, config=config))
    assert model.schedule.num_timesteps == model.partition.num_timesteps == 500
    assert task.timesteps.edges == (0, 500)
    assert model.timesteps.trained_range == (0, 500)


def test_the_cut_may_stand_at_the_top_level_of_a_config(tmp_path: Path) -> None:
    content = {name: value for name, value in run_content().items() if name != "ssl_model"}
    inside = RUN_CONFIG["ssl_config"]
    config = {k: v for k, v in RUN_CONFIG.items() if k != "ssl_config"} | inside
    found = load_authors_checkpoint(write_run(tmp_path, content), config=config)
    assert found.kind == "diti"
    assert found.partition is not None
    assert found.partition.num_subsets == inside["k"]


def test_weights_without_a_cut_are_pdaes_which_is_called_a_default(tmp_path: Path) -> None:
    content = {name: value for name, value in run_content().items() if name != "ssl_model"}
    config = {k: v for k, v in RUN_CONFIG.items() if k != "ssl_config"}
    found = load_authors_checkpoint(write_run(tmp_path, content), config=config)
    assert found.kind == "pdae"


def test_attention_at_a_depth_that_the_network_lacks_changes_nothing(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path)
    plain = load_authors_checkpoint(path)
    deeper = changed(DENOISER_CONFIG, "denoise_fn_config", attention_resolutions="2,4,8")
    deeper = changed(deeper, "denoise_fn_config", channel_multiplier="1,2")
    assert load_authors_checkpoint(path, config=deeper).unet == plain.unet
