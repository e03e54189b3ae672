"""Backbones on disk: pinned, checked key by key, frozen; every refusal names file and remedy."""

import hashlib
import json
import pickle
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.task import BackboneConfig, ScheduleConfig, UNetConfig
from data_pipelines.object_store import ObjectMissingError, ObjectStore
from pretrain.backbone import BackboneError, load_backbone, pin_backbone, save_backbone
from pretrain.unet import UNet

STORE = ObjectStore()
SHAPE = UNetConfig(
    base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_factors=()
)
SCHEDULE = ScheduleConfig(num_timesteps=500)


def random_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(SHAPE)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def save(url: str, state: dict[str, Tensor], **arguments: Any) -> BackboneConfig:
    sha256 = save_backbone(
        STORE,
        url,
        state=state,
        unet=SHAPE,
        schedule=SCHEDULE,
        image_size_px=8,
        provenance={"images_seen": 7},
        **arguments,
    )
    return BackboneConfig(weights=url, sha256=sha256)


@pytest.fixture
def unet() -> UNet:
    return random_unet()


@pytest.fixture
def config(tmp_path: Path, unet: UNet) -> BackboneConfig:
    """A good backbone in `tmp_path`; tests then damage it."""
    return save(str(tmp_path / "face.safetensors"), unet.state_dict())


def pinned(config: BackboneConfig) -> BackboneConfig:
    """The same file, pinned as it is now."""
    return config.model_copy(update={"sha256": pin_backbone(STORE, config.weights)})


def refused(config: BackboneConfig, *words: str) -> str:
    """The message of the BackboneError; it holds all these words."""
    with pytest.raises(BackboneError) as error:
        load_backbone(STORE, config)
    message = str(error.value)
    for word in words:
        assert word in message, message
    return message


# --- a good one -----------------------------------------------------------------------------------


def test_weights_come_back_as_they_were_up_to_float16(config: BackboneConfig, unet: UNet):
    backbone = load_backbone(STORE, config)
    loaded = backbone.unet.state_dict()
    assert loaded.keys() == unet.state_dict().keys()
    for name, tensor in unet.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.half().float()), name
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    torch.testing.assert_close(backbone.unet(x, t), unet(x, t), rtol=0.01, atol=0.02)


def test_a_loaded_backbone_is_frozen_and_in_eval_mode(config: BackboneConfig):
    unet = load_backbone(STORE, config).unet
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert not any(module.training for module in unet.modules())


def test_the_card_says_what_the_weights_are(config: BackboneConfig, tmp_path: Path):
    backbone = load_backbone(STORE, config)
    assert backbone.unet.config == SHAPE
    assert backbone.schedule == SCHEDULE
    assert backbone.image_size_px == 8
    assert backbone.sha256 == config.sha256
    card = json.loads((tmp_path / "face.json").read_text())
    assert card["images_seen"] == 7
    assert (
        card["sha256"] == hashlib.sha256((tmp_path / "face.safetensors").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_card_says_what_the_output_stands_for(
    tmp_path: Path, unet: UNet, prediction: str
) -> None:
    config = save(str(tmp_path / "face.safetensors"), unet.state_dict(), prediction=prediction)
    assert load_backbone(STORE, config).prediction == prediction


def test_an_old_card_means_noise(config: BackboneConfig, tmp_path: Path) -> None:
    path = tmp_path / "face.json"
    card = json.loads(path.read_text())
    del card["prediction"], card["unet"]["learn_sigma"]
    path.write_text(json.dumps(card))
    assert load_backbone(STORE, config).prediction == "epsilon"


def test_weights_can_be_kept_in_float32(tmp_path: Path, unet: UNet) -> None:
    config = save(str(tmp_path / "face.safetensors"), unet.state_dict(), dtype=torch.float32)
    loaded = load_backbone(STORE, config).unet.state_dict()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_what_the_card_always_holds_is_not_replaced(tmp_path: Path, unet: UNet) -> None:
    sha256 = save_backbone(
        STORE,
        str(tmp_path / "face.safetensors"),
        state=unet.state_dict(),
        unet=SHAPE,
        schedule=SCHEDULE,
        image_size_px=8,
        provenance={"sha256": "another", "seed": 3},
    )
    card = json.loads((tmp_path / "face.json").read_text())
    assert (card["sha256"], card["seed"]) == (sha256, 3)


def test_the_packaged_backbone_loads() -> None:
    url = "builtin/avatars32.safetensors"
    backbone = load_backbone(STORE, BackboneConfig(weights=url, sha256=pin_backbone(STORE, url)))
    assert (backbone.image_size_px, backbone.prediction) == (32, "v")


def test_the_pin_is_the_files_sha256(config: BackboneConfig):
    assert pin_backbone(STORE, config.weights) == config.sha256


# --- another file than the pinned one -------------------------------------------------------------


def test_another_sha256_is_refused_with_both(config: BackboneConfig):
    other = config.model_copy(update={"sha256": "1" * 64})
    refused(other, config.weights, config.sha256, "1" * 64, "use the pinned file, or pin this one")


def test_one_flipped_bit_is_another_file(config: BackboneConfig):
    path = Path(config.weights)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(config, config.weights, "task.backbone.sha256 pins")


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_file_is_refused_even_if_it_is_pinned(config: BackboneConfig, keep: int):
    path = Path(config.weights)
    path.write_bytes(path.read_bytes()[:keep])
    refused(pinned(config), config.weights, "not a whole safetensors file", "fetch it again")


class _Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_under_the_name_of_safetensors_is_refused_and_never_run(
    config: BackboneConfig, tmp_path: Path, how: str
):
    trace = tmp_path / "trace"
    path = Path(config.weights)
    if how == "pickle":
        path.write_bytes(pickle.dumps(_Bomb(trace)))
    else:
        torch.save({"ema_denoise_fn": _Bomb(trace)}, path)
    refused(pinned(config), config.weights, "not a whole safetensors file")
    assert not trace.exists()
    with path.open("rb") as file:  # and the bomb is a live one
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert trace.read_text() == "executed"


# --- weights that do not fit their card -----------------------------------------------------------


def test_missing_extra_and_misshapen_keys_are_all_named(tmp_path: Path, unet: UNet):
    state = unet.state_dict()
    del state["time_embed.0.bias"], state["out.2.weight"]
    state["model.stranger"] = torch.zeros(1)
    state["out.0.bias"] = torch.zeros(7)
    config = save(str(tmp_path / "face.safetensors"), state)
    refused(
        config,
        config.weights,
        "missing: out.2.weight, time_embed.0.bias",
        "extra: model.stranger",
        "wrong shape: out.0.bias (7,) instead of (32,)",
        "Use the card that was written with these weights.",
    )


@pytest.mark.parametrize(
    ("key", "tensor", "problem"),
    [
        ("out.2.bias", None, "missing: out.2.bias"),
        ("shift_out.2.bias", torch.zeros(3), "extra: shift_out.2.bias"),
        ("out.2.bias", torch.zeros(6), "wrong shape: out.2.bias (6,) instead of (3,)"),
    ],
)
def test_one_wrong_key_is_enough(
    tmp_path: Path, unet: UNet, key: str, tensor: Tensor | None, problem: str
):
    state = unet.state_dict()
    state.pop(key, None)
    if tensor is not None:
        state[key] = tensor
    message = refused(save(str(tmp_path / "face.safetensors"), state), problem)
    assert message.count(": ") == 1, "only this problem is reported"


def test_a_long_list_of_keys_is_cut(tmp_path: Path, unet: UNet):
    state = {f"module.{name}": tensor for name, tensor in unet.state_dict().items()}
    refused(save(str(tmp_path / "face.safetensors"), state), f"and {len(state) - 5} more")


# --- broken cards ---------------------------------------------------------------------------------


def without(field: str) -> Callable[[dict], object]:
    return lambda card: {key: value for key, value in card.items() if key != field}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("unet"), "unet"),
        (without("schedule"), "schedule"),
        (without("image_size_px"), "image_size_px"),
        (lambda card: card | {"unet": card["unet"] | {"depth": 3}}, "depth"),
        (lambda card: card | {"unet": card["unet"] | {"base_channels": 33}}, "base_channels"),
        (lambda card: card | {"image_size_px": "small"}, "small"),
        (lambda card: card | {"prediction": "noise"}, "epsilon"),
        (lambda card: [card], "TypeError"),
    ],
)
def test_a_card_with_something_wrong_is_refused_by_name(
    config: BackboneConfig, tmp_path: Path, change: Callable[[dict], object], named: str
):
    path = tmp_path / "face.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused(config, str(path), named, "write it again with `diti backbone train`")


@pytest.mark.parametrize("content", [b"", b'{"unet": {"base_ch', b"\xff\xfe\x00"])
def test_a_card_that_is_no_json_is_refused(config: BackboneConfig, tmp_path: Path, content: bytes):
    path = tmp_path / "face.json"
    path.write_bytes(content)
    refused(config, str(path), "is unreadable", "write it again with `diti backbone train`")


# --- files that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["face.safetensors", "face.json"])
def test_a_missing_file_is_named(config: BackboneConfig, tmp_path: Path, name: str):
    (tmp_path / name).unlink()
    error = ObjectMissingError if name.endswith(".safetensors") else BackboneError
    with pytest.raises(error, match=f"{tmp_path / name} does not exist"):
        load_backbone(STORE, config)


def test_an_unknown_packaged_backbone_lists_those_there_are():
    config = BackboneConfig(weights="builtin/cats.safetensors", sha256="0" * 64)
    message = refused(config, "there is no packaged backbone builtin/cats.safetensors; there are")
    folder = resources.files("pretrain") / "weights"
    if folder.is_dir():
        names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".safetensors")]
        assert names, "the package ships no backbone"
        for name in names:
            assert f"builtin/{name}" in message


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, unet: UNet, broken: float):
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    name = sorted(state)[3]
    state[name].view(-1)[0] = broken
    refused(save(str(tmp_path / "face.safetensors"), state), f"floating-point numbers: {name}")


def test_whole_numbers_are_no_weights(tmp_path: Path, unet: UNet):
    url = str(tmp_path / "face.safetensors")
    refused(save(url, unet.state_dict(), dtype=torch.int8), "no finite floating-point numbers")


def test_a_card_of_other_weights_is_refused(config: BackboneConfig):
    card = Path(config.weights).with_suffix(".json")
    card.write_text(card.read_text().replace(config.sha256, "0" * 64))
    refused(config, "face.json", "belongs to weights with SHA-256 0000", config.sha256)


def test_the_cards_digest_follows_what_it_says_and_nothing_else(tmp_path: Path, unet: UNet):
    def digest(**arguments: Any) -> str:
        config = save(str(tmp_path / "face.safetensors"), unet.state_dict(), **arguments)
        return load_backbone(STORE, config).card_sha256

    assert digest() == digest(dtype=torch.float32)
    assert digest() != digest(prediction="v")
