"""The model card of a published encoder: README.md, as people and the Hugging Face Hub read it.

Where the publishing team keeps things is not for the card: of a run's configuration, the sections
about storage, tracking and caching are left out, and local folders are named by their end.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import jinja2

from configs.loading import dump_run
from configs.schema import RunConfig, StoreConfig, WandbConfig
from configs.task import DitiTask
from data_pipelines.avatars import attribute_granularity
from data_pipelines.feature_store import FeatureManifest
from pretrain.published import KIND_NAMES
from pretrain.resnet10 import ResNet10
from pretrain.trained import TrainedEncoder
from tools.attribute_probe import ProbeResult

GROUPS = ("coarse", "middle", "fine")
NOT_STATED = "not stated"
_SECRET = re.compile(r"secret|passw|token|credential|(api|access|private)[-_]?key", re.IGNORECASE)
_BACKBONE_FACTS = {
    "source": "made from the file",
    "source_sha256": "of SHA-256",
    "source_kind": "of kind",
    "source_step": "at step",
    "images_seen": "images it was trained on",
    "code_version": "DiTi Pretrain that trained it",
}
"""What is told of a backbone's card, where it says so: keys, and the words for them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Probes of features that were exported with the encoder."""

    results: Sequence[ProbeResult]
    """The whole feature first, then each subset, then baselines."""
    train: FeatureManifest
    test: FeatureManifest


def make_card(
    trained: TrainedEncoder,
    release: dict[str, Any],
    *,
    backbone_card: dict[str, Any],
    measured: Measured | None,
    weights_bytes: int,
    error: float,
) -> str:
    """The card as Markdown behind YAML.

    Args:
        release: what encoder.json says.
        backbone_card: the JSON beside the backbone; empty where there is none to be read.
        measured: None for a card that says "not measured".
        error: largest difference of z as it was found when the release was loaded back.
    """
    subsets, last = release["subsets"], release["subsets"][-1]
    half = max(1, last["timesteps"][1] // 2)
    run = _run_of(trained)
    content = {
        "licence": release["license"],
        "name": release["name"],
        "size_px": trained.image_size_px,
        "latent_dim": release["latent_dim"],
        "subsets": subsets,
        "half": half,
        "half_dims": max(s["dims"][1] for s in subsets if s["timesteps"][0] < half),
        "parameters": f"{sum(p.numel() for p in trained.encoder.parameters()):,}",
        "weights_size": f"{weights_bytes / 2**20:.1f} MiB",
        "architecture": _in_words(release["architecture"]),
        "preprocessing": _preprocessing_lines(trained.image_size_px),
        "data": _authors_data(trained) if run is None else _run_data(trained, run),
        "backbone": _backbone(trained, run, backbone_card),
        "probes": None if measured is None else _probes(measured),
        "licences": _licences(release["license"], backbone_card),
        "identity": _identity(trained, release, error),
        "limits": _limits(trained),
        "recipe_is": (
            "The config.yml that lay with the authors' file, as JSON."
            if run is None
            else f"A run file of DiTi Pretrain {release['code_version']}, defaults written out. "
            "Local folders are named by their end only; where its team stores and tracks runs is "
            "left out."
        ),
        "recipe": _authors_recipe(trained) if run is None else dump_run(_shareable(run)),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tools"),
        autoescape=False,  # noqa: S701 (Markdown; `cell` escapes what could break it)
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("card.md").render(content).rstrip() + "\n"


def _cell(value: object) -> str:
    """A value in one cell of a Markdown table, in which it stands as it is."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _run_of(trained: TrainedEncoder) -> RunConfig | None:
    """The run of this project that trained it; None for an authors' file."""
    if "checkpoint" in trained.config:
        return None
    return RunConfig.model_validate_json(json.dumps(trained.config))


def _in_words(architecture: dict[str, Any]) -> str:
    if architecture["kind"] == "resnet10":
        return "a ResNet of four basic blocks with BatchNorm"
    channels, after = architecture["channels"], architecture["attention_after"]
    attention = "" if after is None else f", self-attention after convolution {after}"
    return f"{len(channels)} stride-2 convolutions of {channels} channels{attention}"


def _preprocessing_lines(size_px: int) -> list[str]:
    return [
        "Decode to 8-bit RGB. Transparency is dropped, of 16-bit grey the high byte is kept. A "
        "JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of its scale (libjpeg's own) "
        f"that leaves its shorter side {size_px} px or more.",
        "Cut out the largest square in the middle (the left or upper one of two middles).",
        f"Resize it to {size_px} x {size_px} px: bilinear with antialiasing (Pillow's `resize` "
        "with `BILINEAR` and `reducing_gap=2.0`). A square of that size stays as it is.",
        "Turn it upright as its EXIF orientation says.",
        "From uint8 (B, H, W, 3) to float32 (B, 3, H, W): value / 127.5 - 1, so within [-1, 1].",
    ]


# --- where it comes from --------------------------------------------------------------------------


def _run_data(trained: TrainedEncoder, run: RunConfig) -> list[tuple[str, object]]:
    data, batch, step = run.data, run.train.global_batch, trained.step or 0
    weights = data.weights or (1.0,)
    sets = [
        (
            "shard set (WebDataset)",
            _shown(url) + (f", weight {weight:g}" if len(weights) > 1 else ""),
        )
        for url, weight in zip(data.folders, weights, strict=True)
    ]
    crop = {"centre": "the middle square", "random": "a square at a random place"}[data.crop]
    flip = "mirrored half of the time" if data.horizontal_flip else "not mirrored"
    return [
        *sets,
        ("images seen", f"{step * batch:,} ({step:,} steps of {batch:,}), repetitions counted"),
        ("image size", f"{data.image_size_px} px"),
        ("in training", f"{crop}, {flip}"),
        ("time-steps in training", _timesteps(run)),
    ]


def _timesteps(run: RunConfig) -> str:
    assert isinstance(run.task, DitiTask)
    timesteps = run.task.timesteps
    first, last = timesteps.edges[0], timesteps.edges[-1]
    if timesteps.unit == "timestep":
        return f"{first:g}-{last:g}"
    return f"those of log-SNR {first:g} to {last:g}"


def _authors_data(trained: TrainedEncoder) -> list[tuple[str, object]]:
    found = trained.config["checkpoint"]
    return [
        ("what was published", f"{KIND_NAMES[found['kind']]}, file {trained.checkpoint}"),
        ("SHA-256 of that file", found["sha256"]),
        ("training set", f"{NOT_STATED} in that file; what its config.yml says is under Recipe"),
        ("steps", NOT_STATED if trained.step is None else f"{trained.step:,}"),
        ("image size", f"{trained.image_size_px} px"),
    ]


def _backbone(
    trained: TrainedEncoder, run: RunConfig | None, card: dict[str, Any]
) -> list[tuple[str, object]]:
    if run is None:
        file = f"the frozen part of {trained.checkpoint}"
    else:
        assert isinstance(run.task, DitiTask)
        file = _shown(run.task.backbone.place)
    told = [
        (words, f"{value:,}" if isinstance(value := card[key], int) else value)
        for key, words in _BACKBONE_FACTS.items()
        if card.get(key)
    ]
    return [("file", file), ("SHA-256", trained.backbone_sha256), *told]


def _licences(licence: str | None, backbone_card: dict[str, Any]) -> list[tuple[str, object]]:
    backbone = backbone_card.get("license") or backbone_card.get("licence")
    ask = f"{NOT_STATED}: ask whoever published this folder before you use or pass on the weights"
    return [
        ("weights (`encoder.safetensors`)", licence or ask),
        ("`diti_encoder.py`", "Apache-2.0"),
        ("backbone it was trained against", backbone or NOT_STATED),
        ("training images", f"{NOT_STATED} here: see where the data set comes from"),
    ]


def _identity(
    trained: TrainedEncoder, release: dict[str, Any], error: float
) -> list[tuple[str, object]]:
    return [
        ("checkpoint", trained.checkpoint),
        ("step", NOT_STATED if trained.step is None else trained.step),
        ("weights", "exponential moving average" if release["ema"] else "online, not averaged"),
        ("SHA-256 of encoder.safetensors", release["weights_sha256"]),
        ("SHA-256 of the encoder, as features name it", release["encoder_sha256"]),
        ("published with", f"DiTi Pretrain {release['code_version']}"),
        (
            "z of this folder against z of the training code",
            f"differs by at most {error:.1e} of the largest value, on random images",
        ),
    ]


def _limits(trained: TrainedEncoder) -> list[str]:
    size = trained.image_size_px
    return [
        *(["These are weights from before training: for comparison."] if trained.step == 0 else []),
        f"It takes images of {size} px only; what z is worth for images unlike those it was "
        "trained on was not measured.",
        "Subsets are ordered by time-step. That the first ones hold fine attributes and the last "
        "ones coarse ones is what the method aims at; only the probes can tell how far it came.",
        "The dimensions of z have no common scale: standardise them before distances or probes.",
        *(
            ["BatchNorm uses the averages of training, not those of your batch."]
            if isinstance(trained.encoder, ResNet10)
            else []
        ),
        "Bias, privacy and robustness were not examined.",
    ]


# --- probes ---------------------------------------------------------------------------------------


def _probes(measured: Measured) -> dict[str, Any]:
    names, granularity = measured.results[0].attributes, attribute_granularity()
    groups = {group: [name for name in names if granularity.get(name) == group] for group in GROUPS}
    groups = {group: members for group, members in groups.items() if members}
    return {
        "attributes": len(names),
        "train": _half(measured.train),
        "test": _half(measured.test),
        "groups": list(groups),
        "rows": [
            {
                "name": result.name,
                "dims": result.dims,
                "cells": [
                    f"{mean:.3f}" for mean in (result.mean, *map(result.mean_over, groups.values()))
                ],
            }
            for result in measured.results
        ],
    }


def _half(manifest: FeatureManifest) -> str:
    return f"{manifest.rows:,} images of {_cell(_shown(manifest.source_url))}"


# --- what may be told -----------------------------------------------------------------------------


def _shareable(run: RunConfig) -> RunConfig:
    """The run without where its team keeps, caches and tracks things; it can be read back."""
    task = run.task
    assert isinstance(task, DitiTask)
    start = None if task.start_from is None else _shown(task.start_from)
    task = task.model_copy(update={"backbone": task.backbone.moved(_shown), "start_from": start})
    data = run.data.moved(_shown).model_copy(update={"cache": None})
    return run.model_copy(
        update={
            "output": "runs",
            "task": task,
            "data": data,
            "store": StoreConfig(),
            "wandb": WandbConfig(),
        }
    )


def _authors_recipe(trained: TrainedEncoder) -> str:
    return json.dumps(_told(trained.config["checkpoint"]["config"]), indent=2, default=str)


def _told(value: Any) -> Any:
    """Foreign plain values without secrets; text that is a URL or a path as `_shown` has it."""
    if isinstance(value, dict):
        return {
            key: "left out" if _SECRET.search(str(key)) else _told(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_told(inner) for inner in value]
    return _shown(value) if isinstance(value, str) else value


def _shown(url: str) -> str:
    """A URL without credentials; of an absolute local path the last two names."""
    url = re.sub(r"://[^/\s]*@", "://", url)
    url = re.sub(r"(https?://[^?\s]*)\?\S*", r"\1", url)  # signed links hold them in the query
    path = url.removeprefix("file://")
    if not path.startswith("/"):
        return url
    return "/".join(PurePosixPath(path).parts[1:][-2:])
