"""What a run has made, ready for use: the averaged weights of a complete checkpoint."""

import hashlib
from dataclasses import dataclass

from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from configs.schema import DitiTask, RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.backbone import load_backbone
from pretrain.diti import DiTi
from pretrain.encoder import Encoder
from pretrain.partition import Partition, make_partition


@dataclass(frozen=True, slots=True)
class TrainedEncoder:
    """An encoder in eval mode, without the backbone it was trained against."""

    encoder: Encoder
    partition: Partition
    config: RunConfig
    manifest: checkpoint.Manifest
    sha256: str
    """Over the encoder's averaged weights."""


def load_encoder(store: ObjectStore, run_url: str, *, step: int | None = None) -> TrainedEncoder:
    """The encoder of a run at `step`, or at its newest complete checkpoint.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another kind of run.
    """
    manifest = checkpoint.find(store, run_url, step)
    config, task = _diti_run(manifest, run_url)
    encoder = Encoder(task.encoder, image_size_px=config.data.image_size_px)
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in _averaged(store, run_url, manifest).items()
        if name.startswith("encoder.")
    }
    _load_exactly(encoder, state, set(encoder.state_dict()), run_url)
    return TrainedEncoder(
        encoder.requires_grad_(False).eval(),
        make_partition(task.partition),
        config,
        manifest,
        digest_of(encoder),
    )


def load_diti(
    store: ObjectStore, run_url: str, *, step: int | None = None
) -> tuple[DiTi, RunConfig, checkpoint.Manifest]:
    """The whole model of a run, backbone included, in eval mode without gradients.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another kind of run.
        BackboneError: the backbone is not the pinned one.
    """
    manifest = checkpoint.find(store, run_url, step)
    config, task = _diti_run(manifest, run_url)
    backbone = load_backbone(store, task.backbone)
    model = DiTi(task, backbone, image_size_px=config.data.image_size_px)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _load_exactly(model, _averaged(store, run_url, manifest), trained, run_url)
    return model.requires_grad_(False).eval(), config, manifest


def load_denoiser_weights(
    store: ObjectStore, run_url: str, manifest: checkpoint.Manifest
) -> dict[str, Tensor]:
    """The averaged U-Net weights of a denoiser run's checkpoint, by the U-Net's own names."""
    weights = _averaged(store, run_url, manifest)
    return {name.removeprefix("unet."): tensor for name, tensor in weights.items()}


def digest_of(module: nn.Module) -> str:
    """SHA-256 over names and bytes of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _diti_run(manifest: checkpoint.Manifest, run_url: str) -> tuple[RunConfig, DitiTask]:
    config = checkpoint.run_of(manifest)
    if not isinstance(config.task, DitiTask):
        raise checkpoint.CheckpointError(
            f"{run_url} is a run of kind {config.task.kind!r}; a DiTi run is needed here"
        )
    return config, config.task


def _averaged(store: ObjectStore, run_url: str, manifest: checkpoint.Manifest) -> dict[str, Tensor]:
    return load_safetensors(checkpoint.read_file(store, run_url, manifest, checkpoint.EMA_NAME))


def _load_exactly(
    module: nn.Module, state: dict[str, Tensor], expected: set[str], run_url: str
) -> None:
    if state.keys() != expected:
        raise checkpoint.CheckpointError(
            f"checkpoint of {run_url} holds other parameters than its configuration builds: "
            f"{sorted(state.keys() ^ expected)[:5]}; read it with the version that wrote it"
        )
    module.load_state_dict(state, strict=False)
