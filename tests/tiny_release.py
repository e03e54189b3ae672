"""Trained encoders in memory, and checkpoints of a run, without a run: nothing in them is zero."""

import hashlib

import torch
from torch import Tensor

from configs.loading import parse_run
from configs.schema import RunConfig
from configs.task import DitiTask
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint
from pretrain.encoder import Encoder, make_encoder
from pretrain.partition import make_partition
from pretrain.pieces import pack
from pretrain.resnet10 import ResNet10
from pretrain.trained import TrainedEncoder, digest_of
from tests.tiny_run import RUN

RESNET10 = ("task.encoder={kind: resnet10}", "task.partition.stage_dims=[8, 8, 496]")


def tiny_config(*overrides: str, backbone_sha256: str = "b" * 64) -> RunConfig:
    """The tiny run; nothing that it names is there."""
    text = RUN.format(
        output="s3://bucket/runs",
        weights="s3://bucket/backbone.safetensors",
        sha256=backbone_sha256,
        shards="s3://bucket/avatars/train",
    )
    return parse_run(text, overrides)


def tiny_trained(*overrides: str, seed: int = 0) -> TrainedEncoder:
    """The tiny run's encoder at step 10; its BatchNorm, if it has any, has seen images."""
    config = tiny_config(*overrides)
    assert isinstance(config.task, DitiTask)
    encoder = _random_encoder(config.task, config.data.image_size_px, seed)
    return TrainedEncoder(
        encoder=encoder.requires_grad_(False).eval(),
        partition=make_partition(config.task.partition, config.task.encoder.latent_dim),
        image_size_px=config.data.image_size_px,
        checkpoint="step-00000010",
        step=10,
        backbone_sha256=config.task.backbone.sha256,
        config=config.model_dump(mode="json"),
        sha256=digest_of(encoder),
    )


def _random_encoder(task: DitiTask, size_px: int, seed: int) -> Encoder | ResNet10:
    torch.manual_seed(seed)
    encoder = make_encoder(task.encoder, image_size_px=size_px)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(3):
            encoder.train()(3 * torch.rand(8, 3, size_px, size_px) - 1)
    return encoder


def write_checkpoint(
    store: ObjectStore, run_url: str, config: RunConfig, step: int = 10
) -> dict[str, dict[str, Tensor]]:
    """A checkpoint of a run, with averaged ("ema") and online ("weights") ones that differ; both
    are returned, by the encoder's names."""
    assert isinstance(config.task, DitiTask)
    states = {}
    for seed, kind in enumerate(("ema", "weights")):
        encoder = _random_encoder(config.task, config.data.image_size_px, seed)
        states[kind] = encoder.state_dict()
    files = {
        checkpoint.piece_file(kind, 0): bytes(
            pack(
                [f"encoder.{name}@0" for name in state],
                [value.flatten() for value in state.values()],
            ).bytes
        )
        for kind, state in states.items()
    }
    manifest = checkpoint.Manifest(
        step=step,
        images=step * config.train.global_batch,
        parent=None,
        parts="parts",
        config=config.model_dump(mode="json"),
        index_digest="",
        backbone_sha256=config.task.backbone.sha256,
        world_size=1,
        code_version="",
        shapes={f"encoder.{name}": list(t.shape) for name, t in states["ema"].items()},
        counters={},
        files={n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()},
    )
    folder = join(checkpoint.checkpoints_url(run_url), manifest.name)
    for name, data in files.items():
        store.write(join(folder, "parts", name), data)
    store.write(join(folder, checkpoint.MANIFEST_NAME), checkpoint.to_json(manifest))
    return states
