"""`diti backbone`: from a denoiser run to a backbone file, and a look at what it draws."""

from configs.schema import BackboneConfig, DenoiserTask, RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.backbone import load_backbone, pin_backbone, save_backbone
from pretrain.noise_schedule import make_schedule
from pretrain.preflight import open_store, run_url
from pretrain.trained import load_denoiser_weights
from tools.figures import image_grid
from tools.pictures import backbone_samples

COLUMNS = 12


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


def sample_sheet(weights: str, count: int) -> bytes:
    """A PNG of `count` samples in rows of 12, each pixel three pixels wide."""
    store = ObjectStore()
    config = BackboneConfig(weights=weights, sha256=pin_backbone(store, weights))
    backbone = load_backbone(store, config)
    rows = -(-count // COLUMNS)
    grid = backbone_samples(
        backbone.unet,
        make_schedule(backbone.schedule),
        count=rows * COLUMNS,
        size_px=backbone.image_size_px,
        columns=COLUMNS,
    )
    return image_grid(grid, scale=3)
