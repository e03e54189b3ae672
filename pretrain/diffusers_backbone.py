"""A frozen model as diffusers saves it: found, checked, loaded by diffusers' own classes.

`folder` holds a pipeline: `model_index.json`, `unet` or `transformer`, `scheduler`, and where there
are any `vae`, text encoders and tokenizers. Only JSON, vocabularies and safetensors are read;
nothing from the folder is run.

Letters: B batch, C channels, H height, W width.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from configs.task import BUILTIN_PREFIX, DiffusersConfig
from data_pipelines.object_store import ObjectStore
from pretrain.backbone import BackboneError, first_few
from pretrain.copied_tail import Anatomy, Condition, CopiedTail
from pretrain.noise_schedule import NoiseSchedule, Prediction, flow_schedule, schedule_of

MODEL_INDEX = "model_index.json"
_DENOISERS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
)
_DENOISER_PARTS = ("unet", "transformer")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
_TEXT_PARTS = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
_READ = (".json", ".safetensors", ".txt", ".model")
"""Endings of files that are taken from a folder."""
_FLOW_STEPS = 1000
_PREDICTIONS: Mapping[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
}


@dataclass(frozen=True, slots=True)
class Latents:
    """How images become what the denoiser works on."""

    vae: Any
    scaling_factor: float
    shift_factor: float
    channels: int
    factor: int
    """Image pixels per latent pixel, a side."""

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents of images in [-1, 1]: the mean that the VAE gives, shifted and scaled; BCHW."""
        weights = next(self.vae.parameters())
        mean = self.vae.encode(images_BCHW.to(weights.dtype)).latent_dist.mode()
        return (mean.float() - self.shift_factor) * self.scaling_factor


@dataclass(frozen=True, slots=True)
class DiffusersBackbone:
    """A frozen denoiser (float32, eval mode, no gradients) and what its folder says of it."""

    model: nn.Module
    anatomy: Anatomy
    noise_schedule: NoiseSchedule
    prediction: Prediction
    condition: Condition
    """Of one image, the same for every image."""
    latents: Latents | None
    """None where the denoiser works on pixels."""
    image_size_px: int
    sha256: str
    card_sha256: None = None
    """The digest of the folder is over its configurations too."""

    @property
    def takes_pooled(self) -> bool:
        """Whether it is told pooled embeddings of a caption beside those of its tokens."""
        return not self.condition.keys().isdisjoint({"pooled_projections", "added_cond_kwargs"})

    def make_decoder(self, latent_dim: int) -> CopiedTail:
        """The trainable decoder beside it."""
        return CopiedTail(
            self.model,
            self.anatomy,
            self.noise_schedule,
            self.prediction,
            self.condition,
            latent_dim=latent_dim,
        )


class Source(NamedTuple):
    """Where models come from: a folder's weights, or its configurations alone."""

    model: Callable[[Path, str, tuple[str, ...]], Any]
    """Of a folder, a part of it, and the classes that it may have: one that is frozen."""
    null_prompt: Callable[[Path, Any], tuple[Tensor, Tensor | None]]
    """Of a folder and its denoiser: embeddings of no prompt, of one image, and pooled."""


def digest_of_folder(store: ObjectStore, url: str) -> str:
    """SHA-256 over names and bytes of all that `load_diffusers` may read below `url`.

    Raises:
        BackboneError: there is no pipeline, or one with weights in another format only.
    """
    with store.local_folder(url, _READ) as folder:
        return _digest(_files(folder, url), folder)


def unpinned_diffusers(store: ObjectStore, url: str) -> DiffusersBackbone:
    """The model as it is now, for images of the size that it was made for.

    Raises:
        BackboneError: as `load_diffusers`, but for the digest.
    """
    with store.local_folder(url, _READ) as folder:
        digest = _digest(_files(folder, url), folder)
        return read_pipeline(folder, url, digest, WEIGHTS, tail_blocks=1, image_size_px=None)


def load_diffusers(
    store: ObjectStore, config: DiffusersConfig, *, image_size_px: int
) -> DiffusersBackbone:
    """Read, verify and freeze the model that `config` pins.

    Args:
        image_size_px: of the images that it will see.

    Raises:
        BackboneError: another digest, a part that is missing or does not fit, another format.
    """
    with pinned_folder(store, config) as folder:
        return read_pipeline(
            folder,
            config.folder,
            config.sha256,
            WEIGHTS,
            tail_blocks=config.tail_blocks,
            image_size_px=image_size_px,
        )


@contextmanager
def pinned_folder(store: ObjectStore, config: DiffusersConfig) -> Iterator[Path]:
    """The folder that `config` pins, on this machine as long as the block.

    Raises:
        BackboneError: another digest, no model of diffusers, or one without weights.
    """
    if config.folder.startswith(BUILTIN_PREFIX):
        raise BackboneError(
            f"backbone {config.folder} is a shape to plan by and has no weights; fetch the model "
            f"and give task.backbone.folder=... task.backbone.sha256=... (which `diti backbone "
            f"inspect` prints)"
        )
    with store.local_folder(config.folder, _READ) as folder:
        digest = _digest(_files(folder, config.folder), folder)
        if digest != config.sha256:
            raise BackboneError(
                f"backbone {config.folder} has SHA-256 {digest} over its files, but "
                f"task.backbone.sha256 pins {config.sha256}; use the pinned folder, or pin this "
                f"one if the change is meant"
            )
        yield folder


def read_pipeline(
    folder: Path,
    url: str,
    digest: str,
    source: Source,
    *,
    tail_blocks: int,
    image_size_px: int | None,
) -> DiffusersBackbone:
    """What a local folder with a model_index.json holds, its models from `source`.

    Raises:
        BackboneError: a part is missing, is of another class, or does not fit.
    """
    model = source.model(folder, _part(folder, url, _DENOISER_PARTS), _DENOISERS)
    schedule, prediction = _schedule(folder, url)
    latents = latents_of(folder, source)
    size = _checked_size(model, latents, image_size_px)
    return DiffusersBackbone(
        model=model,
        anatomy=anatomy_of(model, tail_blocks),
        noise_schedule=schedule,
        prediction=prediction,
        condition=_condition(folder, model, size, source),
        latents=latents,
        image_size_px=size,
        sha256=digest,
    )


def _checked_size(model: Any, latents: Latents | None, image_size_px: int | None) -> int:
    """The images' size, which the model can take; a U-Net takes many, a transformer few."""
    factor = latents.factor if latents else 1
    if not isinstance(model.config.sample_size, int):
        raise BackboneError(
            f"the denoiser's config.json has sample_size {model.config.sample_size!r}: one whole "
            f"number is needed, of a square; fetch it again"
        )
    made_for = model.config.sample_size * factor
    size = image_size_px or made_for
    if hasattr(model, "up_blocks"):
        step, most = factor * 2 ** (len(model.up_blocks) - 1), size
    elif hasattr(model, "time_text_embed"):
        step = factor * model.config.patch_size
        most = step * model.config.pos_embed_max_size
    else:
        step, most = made_for, made_for
    if size % step or size > most:
        limit = f", at most {most}" if most != size else ""
        raise BackboneError(
            f"data.image_size_px is {size}, but this backbone takes multiples of {step} px{limit}; "
            f"it was made for {made_for} px"
        )
    return size


def anatomy_of(model: Any, tail_blocks: int) -> Anatomy:
    """Where the tail of a denoiser begins: at a U-Net's middle, or `tail_blocks` from the end.

    Raises:
        BackboneError: a transformer has not so many blocks.
    """
    if hasattr(model, "up_blocks"):
        return _anatomy_of_unet(model)
    blocks = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    if tail_blocks > len(blocks):
        raise BackboneError(
            f"task.backbone.tail_blocks is {tail_blocks}, but the transformer has {len(blocks)} "
            f"blocks"
        )
    front, tail = blocks[:-tail_blocks], blocks[-tail_blocks:]
    if hasattr(model, "time_text_embed"):  # SD3's blocks share one embedding
        shared = ("time_text_embed",)
        front = ("pos_embed", "context_embedder", *shared, *front)
        return Anatomy(front, shared, "proj_out", model.inner_dim)
    own = tuple(f"{block}.norm1.emb" for block in tail)
    end = () if blocks[0] in tail else (f"{blocks[0]}.norm1.emb",)  # the output's norm asks it too
    return Anatomy(("pos_embed", *front, *end, *own), own, "proj_out_2", model.inner_dim)


def _anatomy_of_unet(model: Any) -> Anatomy:
    from diffusers.models.resnet import ResnetBlock2D

    embeddings = ("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj")
    front = [name for name in embeddings if getattr(model, name, None) is not None]
    down = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]
    steered = [
        f"{name}.norm2"
        for name, module in model.named_modules()
        if isinstance(module, ResnetBlock2D) and name.startswith(("mid_block", "up_blocks"))
    ]
    width = model.time_embedding.linear_2.out_features
    return Anatomy((*front, "conv_in", *down), tuple(steered), "conv_out", width)


def check_is_pipeline(folder: Path, url: str) -> None:
    """Raise BackboneError if it is none."""
    if not (folder / MODEL_INDEX).is_file():
        raise BackboneError(
            f"backbone {url} is no pipeline of diffusers: it has no {MODEL_INDEX}; give the "
            f"folder that save_pretrained wrote, or one that was downloaded whole"
        )


def _files(folder: Path, url: str) -> list[str]:
    """Names of all that may be read."""
    check_is_pipeline(folder, url)
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith(_READ)]
    return sorted(names)


def _digest(names: list[str], folder: Path) -> str:
    total = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _part(folder: Path, url: str, names: tuple[str, ...]) -> str:
    for name in names:
        if (folder / name / "config.json").is_file():
            return name
    raise BackboneError(f"backbone {url} has no {' or '.join(names)} with a config.json")


def quiet_diffusers() -> Any:
    """The library, imported only where it is needed, without what it prints beside errors."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # where attention runs is said elsewhere
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers


def class_of(folder: Path, part: str, allowed: tuple[str, ...]) -> Any:
    """The class of diffusers that a part's config.json names.

    Raises:
        BackboneError: it is none of those that are allowed.
    """
    name = json_of(folder / part / "config.json").get("_class_name")
    if name not in allowed:
        raise BackboneError(
            f"{part}/config.json names the class {name!r}; supported are {', '.join(allowed)}"
        )
    return getattr(quiet_diffusers(), name)


def _load(folder: Path, part: str, allowed: tuple[str, ...]) -> Any:
    """One model of the folder, with every weight found and none left over."""
    model, found = _loaded(class_of(folder, part, allowed), folder, part, low_cpu_mem_usage=False)
    problems = {what: found[what] for what in ("missing_keys", "unexpected_keys") if found[what]}
    if problems:
        listed = "; ".join(
            f"{what.split('_')[0]}: {first_few(sorted(keys))}" for what, keys in problems.items()
        )
        raise BackboneError(f"the weights in {part} do not fit its config.json; {listed}")
    return model


def _loaded(kind: Any, folder: Path, part: str, **more: bool) -> tuple[Any, dict[str, Any]]:
    """A frozen part by its class's own loader, and what that says of its keys."""
    if not list((folder / part).glob("*.safetensors")):
        raise BackboneError(
            f"{part} holds no weights in safetensors, the only format that is read; save the model "
            f"again with save_pretrained(safe_serialization=True)"
        )
    try:
        model, found = kind.from_pretrained(
            folder / part,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **more,
        )
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise BackboneError(
            f"{part} cannot be loaded: {' '.join(str(error).split())[:300]}; fetch it again, or "
            f"use weights and config.json of the same model"
        ) from error
    return model.requires_grad_(False).eval(), found


def _schedule(folder: Path, url: str) -> tuple[NoiseSchedule, Prediction]:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise BackboneError(f"backbone {url} has no scheduler/scheduler_config.json")
    config = json_of(file)
    if str(config.get("_class_name")).startswith("FlowMatch"):
        return flow_schedule(_FLOW_STEPS, config.get("shift", 1.0)), "flow"
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise BackboneError(
            f"backbone {url}: prediction_type {kind!r} in scheduler_config.json is none of "
            f"{', '.join(_PREDICTIONS)}"
        )
    try:
        scheduler: Any = DDPMScheduler.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise BackboneError(
            f"backbone {url}: scheduler_config.json cannot be used: {error}"
        ) from error
    return schedule_of(scheduler.alphas_cumprod), _PREDICTIONS[kind]


def latents_of(folder: Path, source: Source) -> Latents | None:
    if not (folder / "vae" / "config.json").is_file():
        return None
    vae = source.model(folder, "vae", ("AutoencoderKL",))
    config = vae.config
    factors = (config.scaling_factor, config.shift_factor or 0.0)
    if not all(isinstance(f, int | float) and math.isfinite(f) for f in factors):
        raise BackboneError(
            f"vae/config.json has scaling_factor {config.scaling_factor!r} and shift_factor "
            f"{config.shift_factor!r}: numbers are needed; fetch it again"
        )
    return Latents(
        vae=vae,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        channels=config.latent_channels,
        factor=2 ** (len(config.block_out_channels) - 1),
    )


def _condition(folder: Path, model: Any, image_size_px: int, source: Source) -> dict[str, Any]:
    """What the model is told of every image: nothing, in its pipeline's own words for it."""
    classes = getattr(model.config, "num_embeds_ada_norm", None)
    if classes is not None:  # one more than the classes is the null class
        return {"class_labels": torch.tensor([classes])}
    if type(model).__name__ == "UNet2DModel":
        return {}
    prompt, pooled = source.null_prompt(folder, model)
    wanted = getattr(model.config, "cross_attention_dim", None) or model.config.joint_attention_dim
    if prompt.shape[-1] != wanted:
        raise BackboneError(
            f"the text encoders make embeddings of {prompt.shape[-1]} dimensions, but the denoiser "
            f"takes {wanted}; use the text encoders that it was trained with"
        )
    if pooled is None:
        return {"encoder_hidden_states": prompt}
    if hasattr(model, "time_text_embed"):
        return {"encoder_hidden_states": prompt, "pooled_projections": pooled}
    size = [image_size_px, image_size_px]
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0, 0, *size]]).float()}
    return {"encoder_hidden_states": prompt, "added_cond_kwargs": told}


def pipeline_of(folder: Path) -> str:
    """Name of the class that makes a pipeline's prompts.

    Raises:
        BackboneError: it is none that is supported.
    """
    name = json_of(folder / MODEL_INDEX).get("_class_name")
    if name not in _PIPELINES:
        raise BackboneError(
            f"{MODEL_INDEX} names the pipeline {name!r}; supported are {', '.join(_PIPELINES)}"
        )
    return name


def _null_prompt(folder: Path, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Embeddings that the pipeline puts in the place of no prompt, of one image, and pooled."""
    pipeline = _text_pipeline(folder, model)
    found = _embeddings(pipeline, [""], torch.device("cpu"), guided=True)
    return found[1], found[3] if len(found) == 4 else None


def caption_encoder(folder: Path, device: torch.device) -> Callable[[list[str]], dict[str, Tensor]]:
    """From texts to `prompt` (B, L, E) and, for models that take them, `pooled` (B, E)."""
    part = _part(folder, str(folder), _DENOISER_PARTS)
    kind = class_of(folder, part, _DENOISERS)
    with torch.device("meta"):  # the pipeline asks for its shape only
        model = kind.from_config(kind.load_config(folder / part))
    pipeline = _text_pipeline(folder, model)
    for name in _TEXT_PARTS:
        if isinstance(encoder := getattr(pipeline, name, None), nn.Module):
            encoder.to(device)

    def encode(texts: list[str]) -> dict[str, Tensor]:
        found = _embeddings(pipeline, texts, device, guided=False)
        return {"prompt": found[0]} | ({"pooled": found[2]} if len(found) == 4 else {})

    return encode


def _text_pipeline(folder: Path, model: nn.Module) -> Any:
    """The pipeline with its text encoders and tokenizers, which makes embeddings of prompts."""
    kind = getattr(quiet_diffusers(), pipeline_of(folder))
    wanted, _ = kind._get_signature_keys(kind)
    denoiser = "transformer" if "transformer" in wanted else "unet"
    read = [part for part in _TEXT_PARTS if (folder / part).is_dir()]
    texts, tokens = ([p for p in read if p.startswith(start)] for start in ("text_", "tokenizer"))
    if not texts or [p.replace("text_encoder", "tokenizer") for p in texts] != tokens:
        raise BackboneError(
            f"of text encoders and tokenizers the pipeline has {', '.join(read) or 'none'}: each "
            f"needs the other; fetch it whole"
        )
    encoders = {part: _text_encoder(folder, part) for part in texts}
    try:
        return kind.from_pretrained(
            folder,
            local_files_only=True,
            **dict.fromkeys(set(wanted) - {"scheduler", denoiser, *read}),
            **encoders,
            **{denoiser: model},
        )
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"tokenizers and text encoders cannot be used: {' '.join(str(error).split())[:300]}; "
            f"fetch the pipeline whole"
        ) from error


def _text_encoder(folder: Path, part: str) -> nn.Module:
    """One of the pipeline's, with every weight found."""
    import transformers

    name = str((json_of(folder / part / "config.json").get("architectures") or [None])[0])
    if name not in _TEXT_ENCODERS:
        raise BackboneError(
            f"{part}/config.json names the architecture {name!r}; supported are "
            f"{', '.join(_TEXT_ENCODERS)}"
        )
    model, found = _loaded(getattr(transformers, name), folder, part)
    if found["missing_keys"]:  # they would be drawn at random
        raise BackboneError(
            f"the weights in {part} do not fit its config.json; missing: "
            f"{first_few(sorted(found['missing_keys']))}"
        )
    return model


def json_of(file: Path) -> dict[str, Any]:
    """A file of the folder. Raises BackboneError for one that is not there or holds no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{file} cannot be read ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise BackboneError(f"{file} holds no JSON object; fetch it again")
    return found


@torch.no_grad()
def _embeddings(
    pipeline: Any, texts: list[str], device: torch.device, *, guided: bool
) -> tuple[Tensor, ...]:
    """Of prompts and, where `guided`, of none; then the pooled ones, where there are any."""
    encode = pipeline.encode_prompt
    prompts = {
        name: texts for name in signature(encode).parameters if re.fullmatch(r"prompt(_\d)?", name)
    }
    return encode(
        **prompts,
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
    )


WEIGHTS = Source(_load, _null_prompt)
"""Models as they are trained beside and sampled from."""
