"""A small, real model of Stable Diffusion's format, trained for a few minutes on one CPU.

What is written for Stable Diffusion (loading, latents, captions, the copied tail) is tried out on
it where the real one is too large. It is no run: one process, plain torch, no checkpoints, nothing
to resume. Read it from top to bottom:

    images + captions -> autoencoder -> latents -> U-Net and text encoder -> StableDiffusionPipeline

All that is random is a function of seed and position; the positions of the U-Net's images follow
those of the autoencoder's. The images are kept in memory.

Letters: N images of the set, B of a batch, C channels, H height, W width, L tokens of a caption.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipelines.object_store import AlreadyExistsError, ObjectStore, join
from data_pipelines.sample_images import IMAGE_EXTENSIONS, decode_sample
from data_pipelines.sample_labels import LABELS_EXTENSION, caption_in
from data_pipelines.sample_order import mix64, permute
from data_pipelines.sample_reader import iter_shard
from data_pipelines.shard_index import ShardIndex
from pretrain.caption_tokenizer import clip_tokenizer, learn_merges
from pretrain.diffusers_backbone import MODEL_INDEX, digest_of_folder, quiet_diffusers
from pretrain.ema import Ema
from pretrain.position_noise import Draw, draw

BATCH = 16
MOST_IMAGES = 8_192
"""Kept in memory; of a larger set, the first ones."""
SIZE_STEP_PX, SMALLEST_PX, LARGEST_PX = 8, 16, 128
"""The autoencoder halves a side twice, the U-Net once more."""
LATENT_CHANNELS, LATENT_FACTOR = 4, 4
KL_WEIGHT = 1e-4
AUTOENCODER_RATE, DENOISER_RATE = 4e-3, 2e-3
WARM_UP_STEPS = 20
CLIP_NORM = 1.0
EMA_DECAY = 0.99
DROPPED_CAPTIONS = 0.15
"""Share of images that the U-Net sees with the null prompt, as classifier-free guidance needs."""
MERGES, CAPTION_TOKENS, TEXT_DIM = 512, 48, 64
NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Stable Diffusion's."""
PROVENANCE = "provenance.json"
_DROP = 0xD809  # tells its random numbers from those of the order, which have the same seed
OnImages = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SmallModel:
    """What is made. Raises ValueError for an image size or a length that cannot be."""

    image_size_px: int = 32
    images: int = 18_000
    """Seen in all: a third by the autoencoder, then the rest by U-Net and text encoder."""
    seed: int = 0

    def __post_init__(self) -> None:
        size = self.image_size_px
        if size % SIZE_STEP_PX or not SMALLEST_PX <= size <= LARGEST_PX:
            raise ValueError(
                f"image size {size} does not fit: it must be a multiple of {SIZE_STEP_PX} px, from "
                f"{SMALLEST_PX} to {LARGEST_PX}"
            )
        if self.images < 3 * BATCH:
            raise ValueError(f"images must be at least {3 * BATCH}, got {self.images}")

    @property
    def autoencoder_images(self) -> int:
        """In whole batches."""
        return self.images // 3 // BATCH * BATCH

    @property
    def denoiser_images(self) -> int:
        """In whole batches."""
        return self.images // BATCH * BATCH - self.autoencoder_images


@dataclass(frozen=True, slots=True)
class Captioned:
    """Images of a shard set and what their json says of them."""

    images: Tensor
    """(N, H, W, 3) uint8."""
    captions: list[str]


def check_vacant(store: ObjectStore, out: str) -> None:
    """Raises AlreadyExistsError where something is at or below `out`."""
    if found := store.list(out):
        raise AlreadyExistsError(
            f"{out} holds {found[0].url.rpartition('/')[2]} already; delete that folder, or choose "
            f"another one"
        )
    store.check_access(out, write=True)


def read_captioned(
    store: ObjectStore, index: ShardIndex, model: SmallModel, on_images: OnImages
) -> Captioned:
    """The first MOST_IMAGES of a shard set.

    Raises:
        LabelError: an image has no caption.
        DecodeError: an image cannot be decoded.
    """
    wanted = (*IMAGE_EXTENSIONS, LABELS_EXTENSION)
    samples = (sample for shard in index.shards for sample in iter_shard(store, shard, wanted))
    images, captions = [], []
    for sample in islice(samples, MOST_IMAGES):
        captions.append(caption_in(sample))
        images.append(decode_sample(sample, model.image_size_px))
        on_images(1)
    return Captioned(torch.from_numpy(np.stack(images)), captions)


def train_autoencoder(data: Captioned, model: SmallModel, on_images: OnImages) -> Any:
    """An AutoencoderKL, by squared error and a small KL divergence."""
    torch.manual_seed(model.seed)
    vae: Any = quiet_diffusers().AutoencoderKL(
        sample_size=model.image_size_px,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
    )
    step = _Training(list(vae.parameters()), AUTOENCODER_RATE, model.autoencoder_images)
    for positions in _batches(0, model.autoencoder_images):
        x_BCHW = _pixels(data.images[_rows(positions, model, data)])
        posterior = vae.encode(x_BCHW).latent_dist
        latent_BCHW = posterior.mean + posterior.std * _draw(positions, model).noise_BCHW
        error = F.mse_loss(vae.decode(latent_BCHW).sample, x_BCHW)
        step(error + KL_WEIGHT * posterior.kl().mean() / latent_BCHW[0].numel())
        on_images(len(positions))
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def take_latents(vae: Any, data: Captioned, on_images: OnImages) -> Tensor:
    """Means of all images' latents, NCHW, of variance 1: `vae` is told the factor for it."""
    means = []
    for part_BHWC in data.images.split(BATCH):
        means.append(vae.encode(_pixels(part_BHWC)).latent_dist.mode())
        on_images(len(part_BHWC))
    latents_NCHW = torch.cat(means)
    vae.register_to_config(scaling_factor=1 / latents_NCHW.std().item())
    return latents_NCHW * vae.config.scaling_factor


def train_denoiser(
    vae: Any, latents_NCHW: Tensor, data: Captioned, model: SmallModel, on_images: OnImages
) -> Any:
    """The StableDiffusionPipeline of `vae`, and a U-Net and a text encoder trained together."""
    torch.manual_seed(model.seed)
    diffusers = quiet_diffusers()
    tokenizer = clip_tokenizer(learn_merges(data.captions, MERGES), length=CAPTION_TOKENS)
    unet, text_encoder = _make_unet(model), _make_text_encoder(tokenizer)
    scheduler = diffusers.DDIMScheduler(**NOISE)
    tokens_NL, null_L = _tokens(tokenizer, data.captions), _tokens(tokenizer, [""])[0]

    weights = [*unet.parameters(), *text_encoder.parameters()]
    step, average = (
        _Training(weights, DENOISER_RATE, model.denoiser_images),
        Ema(weights, EMA_DECAY),
    )
    for positions in _batches(model.autoencoder_images, model.denoiser_images):
        rows, drawn = _rows(positions, model, data), _draw(positions, model)
        t_B = torch.from_numpy((drawn.place_B * NOISE["num_train_timesteps"]).astype(np.int64))
        xt_BCHW = scheduler.add_noise(latents_NCHW[rows], drawn.noise_BCHW, t_B)
        dropped_B1 = torch.from_numpy(_drops_caption(positions, model.seed))[:, None]
        text = text_encoder(torch.where(dropped_B1, null_L, tokens_NL[rows]))[0]
        predicted = unet(xt_BCHW, t_B, encoder_hidden_states=text).sample
        step(F.mse_loss(predicted, drawn.noise_BCHW))
        average.update()
        on_images(len(positions))
    with torch.no_grad():
        for weight, averaged in zip(weights, average.tensors, strict=True):
            weight.copy_(averaged)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_small(store: ObjectStore, pipeline: Any, out: str, provenance: dict[str, Any]) -> str:
    """Write it below `out`, last the file without which there is no pipeline; returns its digest.

    Args:
        provenance: goes into a file that diffusers does not read.
    """
    with TemporaryDirectory(prefix="diti-") as name:
        folder = Path(name)
        pipeline.save_pretrained(folder, safe_serialization=True)
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.name == MODEL_INDEX, path)):
            store.upload(path, join(out, path.relative_to(folder).as_posix()))
    return digest_of_folder(store, out)


class _Training:
    """AdamW with a short warm-up and then a rate that falls to 0; called with each loss."""

    def __init__(self, weights: Sequence[nn.Parameter], rate: float, images: int) -> None:
        steps = images // BATCH
        self._weights = weights
        self._optimizer = torch.optim.AdamW(weights, rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda done: min((done + 1) / WARM_UP_STEPS, 1 - done / steps)
        )

    def __call__(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, CLIP_NORM)
        self._optimizer.step()
        self._schedule.step()


def _make_unet(model: SmallModel) -> Any:
    return quiet_diffusers().UNet2DConditionModel(
        sample_size=model.image_size_px // LATENT_FACTOR,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,  # of Stable Diffusion 1, this is the number of heads
        norm_num_groups=8,
    )


def _make_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=4 * TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """(N, L), cut and padded as the pipeline does it."""
    padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids


def _pixels(images_BHWC: Tensor) -> Tensor:
    """BCHW in [-1, 1]."""
    return images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(first: int, images: int) -> Iterator[NDArray[np.int64]]:
    """Positions, a batch at a time."""
    return (np.arange(at, at + BATCH) for at in range(first, first + images, BATCH))


def _rows(positions: NDArray[np.int64], model: SmallModel, data: Captioned) -> Tensor:
    """Which images: each once in an epoch, in an order that every epoch permutes anew."""
    images = len(data.captions)
    key = mix64(model.seed, positions // images)
    return torch.from_numpy(permute(positions % images, images, key))


def _draw(positions: NDArray[np.int64], model: SmallModel) -> Draw:
    side = model.image_size_px // LATENT_FACTOR
    shape = (LATENT_CHANNELS, side, side)
    return draw(positions, seed=model.seed, global_batch=BATCH, noise_shape=shape)


def _drops_caption(positions: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    return mix64(seed, positions, _DROP) / 2.0**64 <= DROPPED_CAPTIONS
