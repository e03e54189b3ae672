"""`diti backbone`: from a run or a published checkpoint to a backbone file, and what is in one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.task import BackboneConfig, DenoiserTask
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import read_index
from pretrain import checkpoint
from pretrain.backbone import load_backbone, pin_backbone, save_backbone
from pretrain.diffusers_backbone import MODEL_INDEX, unpinned_diffusers
from pretrain.preflight import open_store, run_url
from pretrain.published import (
    KIND_NAMES,
    AuthorsCheckpoint,
    PublishedCheckpointError,
    load_authors_checkpoint,
)
from pretrain.small_stable_diffusion import (
    MOST_IMAGES,
    SmallModel,
    check_vacant,
    read_captioned,
    save_small,
    take_latents,
    train_autoencoder,
    train_denoiser,
)
from pretrain.trained import load_denoiser_weights
from tools.figures import image_grid
from tools.pictures import backbone_samples
from tools.progress import image_bar

COLUMNS = 12


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How a published checkpoint is read; None leaves it to the file and its config.yml."""

    config: str | None = None
    ema: bool = True
    image_size_px: int | None = None
    num_heads: int | None = None
    head_channels: int | None = None
    attention_order: Literal["legacy", "new"] | None = None

    def load(self, store: ObjectStore, url: str) -> AuthorsCheckpoint:
        return load_authors_checkpoint(
            url,
            config=self.config,
            ema=self.ema,
            store=store,
            image_size_px=self.image_size_px,
            num_heads=self.num_heads,
            head_channels=self.head_channels,
            attention_order=self.attention_order,
        )

    def as_arguments(self) -> list[str]:
        """What was chosen, as it is typed."""
        typed = {
            "--config": self.config,
            "--image-size": self.image_size_px,
            "--num-heads": self.num_heads,
            "--head-channels": self.head_channels,
            "--attention-order": self.attention_order,
        }
        chosen = [f"{name} {value}" for name, value in typed.items() if value is not None]
        return chosen if self.ema else [*chosen, "--no-ema"]


def check_backbone_run(config: RunConfig) -> DenoiserTask:
    """The task of a run that trains a backbone.

    Raises:
        ValueError: the run trains something else.
    """
    if not isinstance(config.task, DenoiserTask):
        raise ValueError(
            f"run {config.name!r} is of kind {config.task.kind!r}; a backbone is trained by one "
            f"of kind 'denoiser'"
        )
    return config.task


def write_backbone(
    config: RunConfig, manifest: checkpoint.Manifest, out_url: str, *, command: str
) -> str:
    """Write a finished denoiser run's averaged weights as a backbone; returns its SHA-256."""
    task = check_backbone_run(config)
    store = open_store(config)
    metrics = checkpoint.read_metrics(store, run_url(config), manifest)
    return save_backbone(
        store,
        out_url,
        state=load_denoiser_weights(store, run_url(config), manifest),
        unet=task.unet,
        prediction=task.prediction,
        schedule=task.schedule,
        image_size_px=config.data.image_size_px,
        provenance={
            "command": command,
            "seed": config.seed,
            "images_seen": manifest.images,
            "final_loss": metrics[-1]["loss"],
            "index_digest": manifest.index_digest,
            "code_version": manifest.code_version,
        },
    )


def import_backbone(
    store: ObjectStore, url: str, out_url: str, options: ImportOptions
) -> tuple[str, str]:
    """Write the denoiser of a published checkpoint as a backbone, in float32.

    Returns:
        Its SHA-256, and one line about what it is.

    Raises:
        PublishedCheckpointError: the checkpoint cannot be used, or its image size is not known.
    """
    authors = options.load(store, url)
    if authors.image_size_px is None:
        raise PublishedCheckpointError(
            f"{url} does not tell the size of its images, nor does {authors.config.name}; "
            f"give it with --image-size"
        )
    command = ["diti", "backbone", "import", url, "--out", out_url, *options.as_arguments()]
    digest = save_backbone(
        store,
        out_url,
        state=authors.backbone,
        unet=authors.unet,
        prediction=authors.prediction,
        schedule=authors.schedule,
        image_size_px=authors.image_size_px,
        dtype=torch.float32,
        provenance={
            "command": " ".join(command),
            "source": url.rpartition("/")[2],
            "source_sha256": authors.sha256,
            "source_kind": authors.kind,
            "source_step": authors.step,
            "source_ema": authors.ema,
            "origins": authors.origins,
        },
    )
    steps = "" if authors.step is None else f" of step {authors.step}"
    return digest, (
        f"{KIND_NAMES[authors.kind]}{steps}: {_count(authors.backbone)['parameters']:,} parameters,"
        f" {authors.image_size_px} px, attention heads from {authors.origins['attention heads']}"
    )


def make_small(store: ObjectStore, shards: str, out: str, model: SmallModel) -> str:
    """A small pipeline of Stable Diffusion's format at `out`, trained here; returns its SHA-256.

    Raises:
        AlreadyExistsError: something is at `out`.
        LabelError, DecodeError: an image has no caption, or is none.
    """
    check_vacant(store, out)
    index = read_index(store, shards)
    with image_bar("images", min(index.num_samples, MOST_IMAGES)) as advance:
        data = read_captioned(store, index, model, advance)
    with image_bar("autoencoder", model.autoencoder_images) as advance:
        vae = train_autoencoder(data, model, advance)
    with image_bar("latents", len(data.captions)) as advance:
        latents = take_latents(vae, data, advance)
    with image_bar("denoiser", model.denoiser_images) as advance:
        pipeline = train_denoiser(vae, latents, data, model, advance)
    command = (
        f"diti backbone make-small {shards} --image-size {model.image_size_px} "
        f"--images {model.images} --seed {model.seed}"
    )
    provenance = {
        "command": command,
        "seed": model.seed,
        "images_seen": {
            "autoencoder": model.autoencoder_images,
            "denoiser": model.denoiser_images,
        },
        "index_digest": index.digest,
        "code_version": version("diti-pretrain"),
    }
    return save_small(store, pipeline, out, provenance)


def inspect_file(store: ObjectStore, url: str, options: ImportOptions) -> dict[str, Any]:
    """What a published checkpoint or a backbone holds, as plain values.

    Raises:
        PublishedCheckpointError, BackboneError: the file cannot be used.
    """
    if url.endswith(".safetensors"):
        return _inspect_backbone(store, url)
    if store.exists(join(url, MODEL_INDEX)):
        return _inspect_pipeline(store, url)
    authors = options.load(store, url)
    parts = {"encoder": authors.encoder, "shift path": authors.shift, "backbone": authors.backbone}
    partition = authors.partition
    return {
        "file": url,
        "sha256": authors.sha256,
        "kind": authors.kind,
        "step": authors.step,
        "ema": authors.ema,
        "image_size_px": authors.image_size_px,
        "prediction": authors.prediction,
        "parts": {name: _count(state) for name, state in parts.items() if state},
        "unet": authors.unet.model_dump(mode="json"),
        "schedule": authors.schedule.model_dump(mode="json"),
        "encoder": authors.encoder_config and authors.encoder_config.model_dump(mode="json"),
        "partition": partition and partition.to_json(),
        "mode": authors.mode,
        "backbone_sha256": authors.backbone_sha256,
        "config": authors.config.source,
        "origins": authors.origins,
    }


def _inspect_backbone(store: ObjectStore, url: str) -> dict[str, Any]:
    digest = pin_backbone(store, url)
    backbone = load_backbone(store, BackboneConfig(weights=url, sha256=digest))
    return {
        "file": url,
        "sha256": digest,
        "kind": "backbone",
        "image_size_px": backbone.image_size_px,
        "prediction": backbone.prediction,
        "parts": {"backbone": _count(backbone.unet.state_dict())},
        "unet": backbone.unet.config.model_dump(mode="json"),
        "schedule": backbone.schedule.model_dump(mode="json"),
        "config": url.removesuffix(".safetensors") + ".json",
        "origins": dict.fromkeys(("U-Net", "schedule", "image size"), "card"),
    }


def _inspect_pipeline(store: ObjectStore, url: str) -> dict[str, Any]:
    """A folder of diffusers, whose digest a run file pins."""
    backbone = unpinned_diffusers(store, url)
    latents = backbone.latents
    parts = {"backbone": backbone.model} | ({"vae": latents.vae} if latents else {})
    log_snr = backbone.noise_schedule.log_snr_T
    return {
        "file": url,
        "sha256": backbone.sha256,
        "kind": "backbone",
        "image_size_px": backbone.image_size_px,
        "prediction": backbone.prediction,
        "parts": {name: _count(model.state_dict()) for name, model in parts.items()},
        "schedule": {
            "num_timesteps": len(log_snr),
            "log_snr": [round(log_snr[0].item(), 2), round(log_snr[-1].item(), 2)],
        },
        "config": join(url, MODEL_INDEX),
        "origins": dict.fromkeys(("model", "schedule", "latents"), "its own configurations"),
    }


def _count(state: Mapping[str, Tensor]) -> dict[str, int]:
    numbers = sum(tensor.numel() for tensor in state.values())
    return {"tensors": len(state), "parameters": numbers}


def sample_sheet(weights: str, count: int, on_step: Callable[[int], None]) -> bytes:
    """A PNG of `count` samples in rows of 12, each pixel three pixels wide.

    Args:
        on_step: called before each of SAMPLE_STEPS steps with the number of those done.
    """
    store = ObjectStore()
    config = BackboneConfig(weights=weights, sha256=pin_backbone(store, weights))
    backbone = load_backbone(store, config)
    rows = -(-count // COLUMNS)
    grid = backbone_samples(
        backbone.unet,
        backbone.noise_schedule,
        backbone.prediction,
        count=rows * COLUMNS,
        size_px=backbone.image_size_px,
        columns=COLUMNS,
        on_step=on_step,
    )
    return image_grid(grid, scale=3)
