"""`diti publish`: an encoder as a folder for others, who need torch and nothing of ours.

    DIR/encoder.safetensors   the weights
    DIR/diti_encoder.py       `pretrain.released_encoder`: builds the encoder and loads them
    DIR/README.md             the model card
    DIR/encoder.json          architecture, partition, preprocessing, digests; written last

Without encoder.json there is no release.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from data_pipelines.feature_store import read_manifest
from data_pipelines.object_store import (
    BucketMissingError,
    ObjectMissingError,
    ObjectStore,
    join,
)
from pretrain import released_encoder
from pretrain.backbone import card_of
from pretrain.encoder import AnyEncoder
from pretrain.released_encoder import FORMAT_VERSION, RELEASE_NAME, WEIGHTS_NAME, ReleaseError
from pretrain.resnet10 import ResNet10
from pretrain.shard_features import columns_of
from pretrain.trained import TrainedEncoder
from pretrain.unet import AttentionBlock
from pretrain.vit import VitEncoder
from tools.evaluate_attributes import evaluate_attributes
from tools.model_card import Measured, make_card

MODULE_NAME = "diti_encoder.py"
CARD_NAME = "README.md"
PROOF_IMAGES = 4
MAX_ERROR = 1e-4
"""Of z, relative to its largest value; a release that is farther off is not written."""


@dataclass(frozen=True, slots=True)
class Published:
    """What was written."""

    weights_sha256: str
    size_bytes: int
    """Of the weights."""
    error: float
    """Largest difference of the release's z from the trained encoder's, relative to the largest
    value, on random images."""


def publish_encoder(
    store: ObjectStore,
    trained: TrainedEncoder,
    out_url: str,
    *,
    ema: bool,
    licence: str | None = None,
    features: tuple[str, str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Published:
    """Write a release of the encoder to `out_url`, after it was loaded back and compared.

    Args:
        ema: whether these are the averaged weights, for the card.
        licence: SPDX identifier for the weights; None is "not stated".
        features: URLs of two feature sets exported with this encoder; a probe learns on the first
            and is scored on the second, and the card tells the scores.
        say: told what comes next, if it takes long.

    Raises:
        ValueError: no such licence, an encoder of another kind of run, features of another encoder,
            or an `out_url` that holds something else.
        ReleaseError: what was loaded back does not compute the same.
        StoreError: `out_url` cannot be written.
    """
    _check_licence(licence)
    if trained.backbone_sha256 is None:
        raise ValueError(
            f"{trained.config['name']} was not trained against a backbone; only the encoder of a "
            f"DiTi run, or of an authors' file, is published"
        )
    _check_place(store, out_url, trained, ema=ema)
    measured = None if features is None else _measure(store, trained, features, say)
    # By name: one encoder gives one file.
    state = dict(sorted(trained.encoder.state_dict().items()))
    weights = save_safetensors({k: v.contiguous() for k, v in state.items()}, {"format": "pt"})
    release = _describe(trained, ema=ema, licence=licence) | {
        "weights_sha256": hashlib.sha256(weights).hexdigest()
    }
    text = (json.dumps(release, indent=1) + "\n").encode()
    error = _prove(trained, {WEIGHTS_NAME: weights, RELEASE_NAME: text})
    card = make_card(
        trained,
        release,
        backbone_card=_backbone_card(store, trained),
        measured=measured,
        weights_bytes=len(weights),
        error=error,
    )
    store.write(join(out_url, MODULE_NAME), Path(released_encoder.__file__).read_bytes())
    store.write(join(out_url, WEIGHTS_NAME), weights)
    store.write(join(out_url, CARD_NAME), card.encode())
    store.write(join(out_url, RELEASE_NAME), text)
    return Published(release["weights_sha256"], len(weights), error)


def _check_licence(licence: str | None) -> None:
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise ValueError(
            f"a licence must be one SPDX identifier, such as Apache-2.0 or CC-BY-NC-4.0, "
            f"got {licence!r}"
        )


def _check_place(store: ObjectStore, out_url: str, trained: TrainedEncoder, *, ema: bool) -> None:
    """Raises ValueError where `out_url` holds another encoder, or a README that is no card."""
    where = join(out_url, RELEASE_NAME)
    try:
        data = store.read(where)
    except BucketMissingError:
        raise
    except ObjectMissingError as error:
        _refuse_foreign_files(store, out_url, error)
        return
    try:
        found = dict(json.loads(data))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is damaged ({error}), so nobody knows whose encoder {out_url} holds; "
            f"delete that folder, or publish into another one"
        ) from error
    if found.get("encoder_sha256") != trained.sha256:
        this = {
            "name": trained.config["name"],
            "checkpoint": trained.checkpoint,
            "ema": ema,
            "encoder_sha256": trained.sha256,
        }
        raise ValueError(
            f"{out_url} holds another encoder ({_called(found)}; this is {_called(this)}); publish "
            f"into another folder, or delete that one"
        )


def _refuse_foreign_files(store: ObjectStore, out_url: str, cause: Exception) -> None:
    """Of files without encoder.json: a publication that was interrupted has left its module."""
    there = [n for n in (WEIGHTS_NAME, CARD_NAME) if store.exists(join(out_url, n))]
    module = join(out_url, MODULE_NAME)
    ours = Path(released_encoder.__file__).read_bytes()
    if there and not (store.exists(module) and store.read(module) == ours):
        raise ValueError(
            f"{out_url} holds a {there[0]} that would be written over; give a new folder"
        ) from cause


def _called(release: dict[str, Any]) -> str:
    averaged = "averaged" if release.get("ema") else "online"
    sha256 = str(release.get("encoder_sha256"))[:12]
    return f"{release.get('name')}, {release.get('checkpoint')}, {averaged}, {sha256}"


def _measure(
    store: ObjectStore,
    trained: TrainedEncoder,
    features: tuple[str, str],
    say: Callable[[str], None],
) -> Measured:
    """Probes of the features, once it is sure that they are this encoder's."""
    train, test = manifests = [read_manifest(store, url) for url in features]
    for url, manifest in zip(features, manifests, strict=True):
        if manifest.encoder_sha256 != trained.sha256:
            raise ValueError(
                f"the features at {url} were not made by the encoder of {trained.checkpoint} that "
                f"is published but by another one ({manifest.checkpoint}, SHA-256 "
                f"{manifest.encoder_sha256[:12]} instead of {trained.sha256[:12]}); export them "
                f"with this one"
            )
        first, last = manifest.columns[0], manifest.columns[-1]
        if (first.dims[0], last.dims[1]) != (0, trained.partition.latent_dim):
            raise ValueError(
                f"the features at {url} are of some subsets only, {first.name} to {last.name}; "
                f"export all of them"
            )
    say("probing attributes")
    results = evaluate_attributes(store, train_url=features[0], test_url=features[1])
    return Measured(results, train, test)


# --- encoder.json ---------------------------------------------------------------------------------


def _describe(trained: TrainedEncoder, *, ema: bool, licence: str | None) -> dict[str, Any]:
    """What encoder.json says, but for the digest of the weights' file."""
    return {
        "format": "diti-encoder",
        "format_version": FORMAT_VERSION,
        "name": trained.config["name"],
        "license": licence,
        "image_size_px": trained.image_size_px,
        "latent_dim": trained.partition.latent_dim,
        "architecture": _architecture(trained.encoder),
        "subsets": [
            {"name": column.name, "timesteps": column.timesteps, "dims": column.dims}
            for column in columns_of(trained.partition)
        ],
        "preprocessing": _preprocessing(trained.image_size_px),
        "checkpoint": trained.checkpoint,
        "step": trained.step,
        "ema": ema,
        "encoder_sha256": trained.sha256,
        "backbone_sha256": trained.backbone_sha256,
        "code_version": version("diti-pretrain"),
    }


def _architecture(encoder: AnyEncoder) -> dict[str, Any]:
    """The layers as they are; an authors' file comes without a configuration of ours.

    Raises:
        ValueError: the release's own file cannot compute this encoder.
    """
    if isinstance(encoder, VitEncoder):
        raise ValueError(
            "an encoder of kind vit cannot be published yet: diti_encoder.py computes conv and "
            "resnet10; export its features instead"
        )
    if isinstance(encoder, ResNet10):
        return {"kind": "resnet10"}
    channels: list[int] = []
    attention: dict[str, int | None] = {"attention_after": None, "num_heads": None}
    for layer in encoder.encoder:
        if isinstance(layer, nn.Conv2d):
            channels.append(layer.out_channels)
        elif isinstance(layer, AttentionBlock):
            assert layer.order == "legacy"
            attention = {"attention_after": len(channels), "num_heads": layer.num_heads}
    return {"kind": "conv", "channels": channels, **attention}


def _preprocessing(size_px: int) -> dict[str, Any]:
    """What `data_pipelines.decoding` and `released_encoder.preprocess` do, in their order."""
    return {
        "decode": {"colour": "RGB", "bits": 8, "jpeg_scales": [1, 0.5, 0.25, 0.125]},
        "square": "centre",
        "resize": {
            "to_px": [size_px, size_px],
            "filter": "bilinear",
            "antialias": True,
            "reducing_gap": 2.0,
        },
        "turn": "exif_orientation",
        "scale": {"divide_by": 127.5, "subtract": 1.0, "range": [-1.0, 1.0]},
        "layout": "BCHW",
        "dtype": "float32",
    }


def _backbone_card(store: ObjectStore, trained: TrainedEncoder) -> dict[str, Any]:
    """The JSON beside the backbone of a run; empty where it is gone or now describes another one.

    A backbone may be moved once the training is over; that is no reason not to publish.
    """
    task = trained.config.get("task")
    if task is None or "weights" not in task["backbone"]:  # an authors' file, or diffusers'
        return {}
    try:
        card = card_of(store, task["backbone"]["weights"])
    except (OSError, TypeError, ValueError):
        return {}
    return card if card.get("sha256") == trained.backbone_sha256 else {}


# --- proof ----------------------------------------------------------------------------------------


def _prove(trained: TrainedEncoder, files: dict[str, bytes]) -> float:
    """Load the release as others will; how far its z is from the trained encoder's.

    Raises:
        ReleaseError: farther than MAX_ERROR, or no number.
    """
    size = trained.image_size_px
    generator = torch.Generator().manual_seed(0)
    shape = (PROOF_IMAGES, size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory(prefix="diti-") as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        released = released_encoder.load_encoder(folder)
    with torch.inference_mode():
        wanted = trained.encoder(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        found = released(released_encoder.preprocess(pixels))
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= MAX_ERROR:  # NaN is no agreement either
        raise ReleaseError(
            f"the release of {trained.checkpoint} computes another z than the encoder that was "
            f"trained (largest difference {error:.2g} of the largest value, limit {MAX_ERROR:g}); "
            f"nothing was written. Take another checkpoint if its weights are not finite"
        )
    return error
