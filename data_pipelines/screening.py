"""Raw samples -> those that stay, cut out and resized, and for every one a verdict.

Rules that need no pixels come first, so that most of what goes is never decoded.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from configs.preprocess import FiltersConfig, PreprocessConfig
from data_pipelines.decoding import (
    DecodeError,
    TooManyPixelsError,
    decode_image,
    image_size,
)
from data_pipelines.perceptual_hash import perceptual_hash
from data_pipelines.sample_images import IMAGE_EXTENSIONS
from data_pipelines.sample_reader import Sample
from data_pipelines.set_stats import MOST_OF_A_SCORE, QUANTITIES

Outcome = Literal["kept", "filtered", "failed"]
SCORES: dict[str, tuple[tuple[str, ...], Callable[[float, float], bool]]] = {
    "min_similarity": (QUANTITIES["similarity"].keys, float.__ge__),
    "min_aesthetic": (QUANTITIES["aesthetic"].keys, float.__ge__),
    "max_punsafe": (("punsafe",), float.__le__),
    "max_pwatermark": (("pwatermark",), float.__le__),
}
"""Rules about scores: their names in a sample's json, and how they compare to the limit."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a sample that stays becomes, and what its image is recognised by."""

    members: dict[str, bytes]
    """jpg, json and, where there is a caption, txt."""
    sha256: bytes
    """Of the image file as it came."""
    look: int
    """Perceptual hash, 64 bits."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a sample goes: a rule of the filters, or a fault."""

    outcome: Outcome
    why: str


def screen(sample: Sample, config: PreprocessConfig) -> Kept | Dropped:
    """The verdict on one raw sample."""
    image = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
    if image is None:
        return Dropped("failed", f"no image ({', '.join(IMAGE_EXTENSIONS)})")
    try:
        metadata = _metadata(sample)
        caption = _caption(sample, metadata)
        width, height = image_size(image)
        if rule := _broken_rule(config.filters, metadata, caption, width, height):
            return Dropped("filtered", rule)
        pixels = decode_image(image, config.image_size_px)
    except (DecodeError, _UnreadableError) as error:
        return Dropped("failed", _kind_of(error))
    described = {
        **{name: value for name, value in metadata.items() if name not in ("key", "caption")},
        **({} if caption is None else {"caption": caption}),
        "raw": {"tar": sample["__url__"], "key": sample["__key__"]},
        "original_width": width,
        "original_height": height,
        "width": config.image_size_px,
        "height": config.image_size_px,
    }
    members = {
        "jpg": _jpeg(image, pixels, width, height, config.jpeg_quality),
        "json": json.dumps(described, sort_keys=True).encode(),
    }
    if caption is not None:
        members["txt"] = caption.encode()
    return Kept(members, hashlib.sha256(image).digest(), perceptual_hash(pixels))


class _UnreadableError(ValueError):
    """What describes the image cannot be read."""


def _kind_of(error: ValueError) -> str:
    """To count by; numbers of one image are left out."""
    if isinstance(error, _UnreadableError):
        return str(error)
    return "too many pixels" if isinstance(error, TooManyPixelsError) else "undecodable image"


def _metadata(sample: Sample) -> dict[str, Any]:
    if "json" not in sample:
        return {}
    try:
        found = json.loads(sample["json"], parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError("unreadable json") from error
    if not isinstance(found, dict):
        raise _UnreadableError("unreadable json")
    return found


def _finite(text: str) -> float | None:
    """JSON has no infinity; so large a number becomes null, as NaN does."""
    number = float(text)
    return number if math.isfinite(number) else None


def _caption(sample: Sample, metadata: dict[str, Any]) -> str | None:
    """The text beside the image; without one, the `caption` in its json."""
    try:
        if "txt" in sample:
            return sample["txt"].decode()
        caption = metadata.get("caption")
        if isinstance(caption, str):
            caption.encode()
            return caption
    except UnicodeError as error:
        raise _UnreadableError("unreadable caption") from error
    return None


def _broken_rule(
    filters: FiltersConfig,
    metadata: dict[str, Any],
    caption: str | None,
    width: int,
    height: int,
) -> str | None:
    """The first rule, in the order of the schema, that the sample does not keep."""
    for rule, (names, keeps) in SCORES.items():
        limit = getattr(filters, rule)
        if limit is not None and not keeps(_score(metadata, names), float(limit)):
            return rule
    characters = len((caption or "").strip())
    if filters.min_caption_characters and characters < filters.min_caption_characters:
        return "min_caption_characters"
    if filters.min_side_px and min(width, height) < filters.min_side_px:
        return "min_side_px"
    if filters.max_aspect and max(width, height) > filters.max_aspect * min(width, height):
        return "max_aspect"
    return None


def _score(metadata: dict[str, Any], names: tuple[str, ...]) -> float:
    """Not a number, which keeps no rule, where there is none."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) <= MOST_OF_A_SCORE else math.nan
    return math.nan


def _jpeg(image: bytes, pixels: NDArray[np.uint8], width: int, height: int, quality: int) -> bytes:
    """As it came, if it is a JPEG of that size already: each encoding loses something."""
    if image[:2] == b"\xff\xd8" and width == height == len(pixels):
        return image
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
