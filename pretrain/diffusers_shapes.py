"""A model of diffusers in its shapes alone, to plan by: its folder's JSON is read, no weights.

`architectures` holds such folders of public models, named `builtin/NAME`: of each part's
configuration the published hyper-parameters that its class does not have by default.

Letters: B batch (1), L tokens, E dimensions of an embedding.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.task import BUILTIN_PREFIX, DiffusersConfig
from data_pipelines.object_store import ObjectStore
from pretrain.backbone import BackboneError
from pretrain.diffusers_backbone import (
    DiffusersBackbone,
    Source,
    check_is_pipeline,
    class_of,
    pipeline_of,
    read_pipeline,
)

_T5_TOKENS = 256
"""That Stable Diffusion 3's pipeline puts behind CLIP's, also where there is no T5."""


def untrained_diffusers(
    store: ObjectStore, config: DiffusersConfig, *, image_size_px: int
) -> DiffusersBackbone:
    """The model that `config` names, on the meta device; its condition is zeros.

    The digest is not looked at: it is over weights, which need not be there.

    Args:
        image_size_px: of the images that it will see.

    Raises:
        BackboneError: there is no pipeline, or a part is missing or does not fit.
    """
    with _open(store, config.folder) as folder:
        check_is_pipeline(folder, config.folder)
        return read_pipeline(
            folder,
            config.folder,
            "",
            SHAPES,
            tail_blocks=config.tail_blocks,
            image_size_px=image_size_px,
        )


def packaged_architectures() -> list[str]:
    """Names of the public models whose shapes are here, as `task.backbone.folder` takes them."""
    return sorted(BUILTIN_PREFIX + folder.name for folder in _packaged().iterdir())


@contextmanager
def _open(store: ObjectStore, url: str) -> Iterator[Path]:
    if not url.startswith(BUILTIN_PREFIX):
        with store.local_folder(url, (".json",)) as folder:
            yield folder
    elif url in packaged_architectures():
        yield _packaged() / url.removeprefix(BUILTIN_PREFIX)
    else:
        raise BackboneError(
            f"there is no packaged shape {url}; there are {packaged_architectures()}"
        )


def _packaged() -> Path:
    return Path(str(resources.files("pretrain"))) / "architectures"


def _on_meta(folder: Path, part: str, allowed: tuple[str, ...]) -> Any:
    kind, told = class_of(folder, part, allowed), _config(folder, part)
    try:
        with torch.device("meta"):
            model = kind.from_config(told)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackboneError(
            f"{part}/config.json does not make a {told['_class_name']}: "
            f"{' '.join(str(error).split())[:300]}; fetch it again"
        ) from error
    return model.requires_grad_(False).eval()


def _zero_prompt(folder: Path, model: Any) -> tuple[Tensor, Tensor | None]:
    """Zeros in the shapes of a null prompt's embeddings, (B, L, E) and pooled (B, E)."""
    told = [_config(folder, part) for part in ("text_encoder", "text_encoder_2")]
    clips = [config for config in told if config]
    if not clips:
        raise BackboneError("there is no text_encoder/config.json to tell a prompt's length")
    tokens = clips[0]["max_position_embeddings"]
    width = sum(config["hidden_size"] for config in clips)
    match pipeline_of(folder):
        case "StableDiffusionPipeline":
            return torch.zeros(1, tokens, width), None
        case "StableDiffusionXLPipeline":
            return torch.zeros(1, tokens, width), torch.zeros(1, clips[-1]["projection_dim"])
        case _:  # CLIP's embeddings are padded to T5's width
            prompt = torch.zeros(1, tokens + _T5_TOKENS, model.config.joint_attention_dim)
            return prompt, torch.zeros(1, sum(config["projection_dim"] for config in clips))


def _config(folder: Path, part: str) -> dict[str, Any]:
    """What a part's config.json says; nothing where there is none."""
    file = folder / part / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


SHAPES = Source(_on_meta, _zero_prompt)
"""Models that take no memory, and prompts that say nothing."""
