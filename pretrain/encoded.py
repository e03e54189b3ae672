"""Latents and captions that were made beforehand: made of a shard, and found fit for a run.

Letters: B images of a batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.task import DiffusersConfig, DitiTask
from data_pipelines.decoding import DecodeError
from data_pipelines.encoded_set import (
    MEMBER,
    MISSING,
    EncodedMismatchError,
    Encoding,
    Shapes,
    beside,
    check_encoding,
    pack,
    read_encoding,
)
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_images import IMAGE_EXTENSIONS, decode_sample
from data_pipelines.sample_labels import LABELS_EXTENSION, LabelError, caption_in
from data_pipelines.sample_reader import Sample, iter_shard
from data_pipelines.shard_index import Shard, ShardIndex
from data_pipelines.shard_writer import write_members
from pretrain.diffusers_backbone import (
    WEIGHTS,
    DiffusersBackbone,
    Latents,
    caption_encoder,
    latents_of,
    pinned_folder,
)
from pretrain.frozen import Frozen

BATCH = 16
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Encoders:
    """The frozen parts that make what a run takes of its images."""

    latents: Latents
    captions: Callable[[list[str]], Tensors] | None
    """From texts to their embeddings, (B, ...) each; None where the run does not take them."""
    image_size_px: int
    mirrored: bool

    @property
    def device(self) -> torch.device:
        return next(self.latents.vae.parameters()).device

    @torch.no_grad()
    def __call__(self, images_BHWC: np.ndarray, captions: list[str]) -> dict[str, Tensor]:
        """Of uint8 images: `latent`, and where asked for `mirrored`, `prompt` and `pooled`."""
        pixels = torch.from_numpy(images_BHWC).to(self.device).permute(0, 3, 1, 2)
        images = pixels.float() / 127.5 - 1
        made = {"latent": self.latents.encode(images)}
        if self.mirrored:
            made["mirrored"] = self.latents.encode(images.flip(3))
        if self.captions is not None:
            made |= self.captions(captions)
        return made

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of what is made of one image."""
        blank = np.zeros((1, self.image_size_px, self.image_size_px, 3), np.uint8)
        return {name: list(tensor.shape[1:]) for name, tensor in self(blank, [""]).items()}


def load_encoders(store: ObjectStore, config: RunConfig, device: torch.device) -> Encoders:
    """The parts of the run's backbone that make what the run takes.

    Raises:
        BackboneError: it is not what is pinned, or does not fit.
        EncodedMismatchError: it works on pixels.
    """
    told = backbone_of(config)
    with pinned_folder(store, told) as folder:
        latents = latents_of(folder, WEIGHTS)
        if latents is None:
            raise _works_on_pixels(config)
        latents.vae.to(device)
        captions = caption_encoder(folder, device) if told.condition == "caption" else None
    return Encoders(latents, captions, config.data.image_size_px, config.data.horizontal_flip)


def backbone_of(config: RunConfig) -> DiffusersConfig:
    """The backbone that `data.encoded` is made for.

    Raises:
        EncodedMismatchError: the run has none of diffusers.
    """
    told = config.task.backbone if isinstance(config.task, DitiTask) else None
    if not isinstance(told, DiffusersConfig):
        raise EncodedMismatchError(
            f"run {config.name!r} has no backbone of kind diffusers: there is nothing to encode for"
        )
    return told


def _works_on_pixels(config: RunConfig) -> EncodedMismatchError:
    return EncodedMismatchError(
        f"backbone {backbone_of(config).folder} works on pixels: there is nothing to encode; leave "
        f"data.encoded out"
    )


def encoding_of(
    config: RunConfig, index: ShardIndex, latents: Latents, shapes: dict[str, list[int]]
) -> Encoding:
    """What a run makes of these shards, or would make of them itself."""
    return Encoding(
        images=index.digest,
        backbone=backbone_of(config).sha256,
        image_size_px=config.data.image_size_px,
        scaling_factor=latents.scaling_factor,
        shift_factor=latents.shift_factor,
        shapes=shapes,
    )


def open_encoded(
    store: ObjectStore, config: RunConfig, index: ShardIndex, backbone: Frozen | None
) -> tuple[ShardIndex, Shapes]:
    """The run's shards with what is encoded of them beside, and what the run takes of it.

    Raises:
        EncodedMismatchError: it was made from other images, by another model, or otherwise.
        ShardMismatchError, ObjectMissingError: it is not whole, or not there.
    """
    url = config.data.encoded
    if url is None:
        return index, {}
    told = backbone_of(config)
    if not isinstance(backbone, DiffusersBackbone) or backbone.latents is None:
        raise _works_on_pixels(config)
    side = config.data.image_size_px // backbone.latents.factor
    latent = [backbone.latents.channels, side, side]
    asked = {"latent": latent} | ({"mirrored": latent} if config.data.horizontal_flip else {})
    if told.condition == "caption":
        asked |= {"prompt": []} | ({"pooled": []} if backbone.takes_pooled else {})
    wanted = encoding_of(config, index, backbone.latents, asked)
    shapes = check_encoding(read_encoding(store, url), wanted, url)
    return beside(store, index, url), shapes


def encode_shard(store: ObjectStore, encoders: Encoders, shard: Shard, out_url: str) -> Shard:
    """Write what is encoded of one shard below `out_url`; its line of the index there.

    A sample that cannot be used has its reason in the place of tensors.

    Raises:
        ShardMismatchError: the tar is not the one that was indexed.
    """
    samples = iter_shard(store, shard, (*IMAGE_EXTENSIONS, LABELS_EXTENSION))
    members = (
        (key, {MISSING: made.encode()} if isinstance(made, str) else {MEMBER: pack(made)})
        for key, made in _encoded(encoders, samples)
    )
    return write_members(store, out_url, shard.name, members)


def _encoded(
    encoders: Encoders, samples: Iterator[Sample]
) -> Iterator[tuple[str, dict[str, np.ndarray] | str]]:
    """Key of each sample with its tensors, or with why it has none."""
    while group := list(islice(samples, BATCH)):
        usable: dict[str, tuple[np.ndarray, str]] = {}
        why: dict[str, str] = {}
        for sample in group:
            try:
                image = decode_sample(sample, encoders.image_size_px)
                usable[sample["__key__"]] = image, caption_in(sample) if encoders.captions else ""
            except (DecodeError, LabelError) as error:
                why[sample["__key__"]] = str(error)
        made: list[dict[str, Any]] = []
        if usable:
            images, captions = zip(*usable.values(), strict=True)
            tensors = encoders(np.stack(images), list(captions))
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            made = [{name: a[row] for name, a in arrays.items()} for row in range(len(usable))]
        found = dict(zip(usable, made, strict=True))
        for sample in group:
            key = sample["__key__"]
            yield key, found[key] if key in found else why[key]
