"""The data set `emoji`: several hands' drawings of everything, named by Unicode.

This module owns what row `n` is: `draw_emoji(spec, art, row)` is a pure function, as `draw_avatar`
is. A row takes one emoji at random, one of its skin tones and one vendor's drawing of it, and sets
it on a plain background; there can be any number of rows. The background is coloured because the
art is transparent: tone and temperature of the colour, size and place are drawn by chance and are
attributes, coarse ones that no name gives away. As with the avatars, light or dark, left or right
leave a gap between them, so that each can be told at 32 px.

A split holds whole families: all tones, genders and vendors of what is in `test` are unseen in
training, whatever the seed and the vendors.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar, get_args

from data_pipelines.drawing import jpeg_of_svg, pick, uniform
from data_pipelines.emoji_art import Art, Drawing, Emoji, Split, Version
from data_pipelines.emoji_labels import attributes_of, may_be_mirrored
from data_pipelines.emoji_packages import VENDORS

T = TypeVar("T")

SIZES_PX: Final = (32, 64, 128)
_LOOKS: Final[dict[str, dict[str, int]]] = {
    "tone": {"light": 60, "dark": 40},
    "temperature": {"warm": 50, "cool": 50},
    "size": {"small": 50, "large": 50},
    "side": {"left": 50, "right": 50},
    "height": {"high": 50, "low": 50},
}
"""Feature -> value -> weight."""
_HUE_DEGREES: Final = {"warm": (0.0, 70.0), "cool": (160.0, 270.0)}
_SATURATION_VALUE: Final = {"light": (0.30, 0.97), "dark": (0.50, 0.50)}
_SCALE: Final = {"small": (0.60, 0.68), "large": (0.80, 0.88)}
_X_PERCENT: Final = {"left": (-6.0, -2.0), "right": (2.0, 6.0)}
_Y_PERCENT: Final = {"high": (-6.0, -2.0), "low": (2.0, 6.0)}


@dataclass(frozen=True, slots=True)
class EmojiSpec:
    """Which emoji images: everything that decides a row's pixels besides the art and its number.

    Raises ValueError for a size, split or vendor that does not exist, and for no vendor.
    """

    size_px: int = 32
    seed: int = 0
    split: Split = "train"
    vendors: tuple[str, ...] = tuple(VENDORS)

    def __post_init__(self) -> None:
        _check("size_px", (self.size_px,), SIZES_PX)
        _check("split", (self.split,), get_args(Split))
        _check("vendor", self.vendors, tuple(VENDORS))


@dataclass(frozen=True, slots=True)
class EmojiSample:
    """One drawn emoji.

    `jpeg` is RGB, `size_px` square, quality 95, 4:4:4. `metadata` is plain JSON: `caption` (the
    name), `attributes` {name: 0 or 1}, `numeric` (`scale`, the art's share of the side; `x` and
    `y`, of its middle from the image's in percent of the side; `hue` of the background in degrees),
    `classes` {`category`, `subcategory`, `vendor`}, `tags` (words that people look
    for it with), `code` (Unicode's), `family`, `mirrored`, `width`, `height`.
    """

    jpeg: bytes
    metadata: dict[str, Any]


def draw_emoji(spec: EmojiSpec, art: Art, row: int) -> EmojiSample:
    """The sample at `row`, a pure function of its arguments.

    Raises:
        ValueError: a negative row, or no emoji of this split by these vendors.
    """
    if row < 0:
        raise ValueError(f"rows are numbered from 0, got {row}")
    seed = f"{spec.seed}/{spec.split}/{row}"
    emoji = _one_of(_choices(art, spec), seed, "emoji")
    version = _one_of([v for v in emoji.versions if _vendors_of(v, spec)], seed, "version")
    vendor = _one_of(_vendors_of(version, spec), seed, "vendor")
    look = {name: pick(weights, uniform(seed, name)) for name, weights in _LOOKS.items()}
    numeric = _numbers(look, seed)
    mirrored = may_be_mirrored(emoji) and uniform(seed, "mirrored") < 0.5
    svg = _svg(version.drawings[vendor], look["tone"], numeric, mirrored=mirrored)
    metadata = {
        "caption": version.name,
        "attributes": _look_attributes(look) | attributes_of(emoji, version),
        "numeric": numeric,
        "classes": {
            "category": emoji.category,
            "subcategory": emoji.subcategory,
            "vendor": vendor,
        },
        "tags": list(emoji.tags),
        "code": version.code,
        "family": emoji.family,
        "mirrored": mirrored,
        "width": spec.size_px,
        "height": spec.size_px,
    }
    return EmojiSample(jpeg_of_svg(svg, spec.size_px), metadata)


@lru_cache(maxsize=8)
def _choices(art: Art, spec: EmojiSpec) -> tuple[Emoji, ...]:
    found = tuple(
        emoji
        for emoji in art.emoji
        if emoji.split == spec.split
        and any(_vendors_of(version, spec) for version in emoji.versions)
    )
    if not found:
        raise ValueError(f"there is no emoji of split {spec.split} by {', '.join(spec.vendors)}")
    return found


def _vendors_of(version: Version, spec: EmojiSpec) -> list[str]:
    return [name for name in VENDORS if name in version.drawings and name in spec.vendors]


def _one_of(choices: Sequence[T], seed: str, name: str) -> T:
    return choices[int(uniform(seed, name) * len(choices))]


def _numbers(look: Mapping[str, str], seed: str) -> dict[str, float]:
    """Exact values inside the ranges that the look allows."""

    def between(name: str, bounds: tuple[float, float]) -> float:
        return round(bounds[0] + (bounds[1] - bounds[0]) * uniform(seed, f"{name}.exact"), 4)

    return {
        "scale": between("scale", _SCALE[look["size"]]),
        "x": between("x", _X_PERCENT[look["side"]]),
        "y": between("y", _Y_PERCENT[look["height"]]),
        "hue": between("hue", _HUE_DEGREES[look["temperature"]]),
    }


def _look_attributes(look: Mapping[str, str]) -> dict[str, int]:
    return {
        "dark_background": int(look["tone"] == "dark"),
        "warm_background": int(look["temperature"] == "warm"),
        "large": int(look["size"] == "large"),
        "on_left": int(look["side"] == "left"),
        "low": int(look["height"] == "low"),
    }


def _svg(drawing: Drawing, tone: str, numeric: Mapping[str, float], *, mirrored: bool) -> str:
    """The drawing on its background, in an image of 100 x 100 units."""
    rgb = colorsys.hsv_to_rgb(numeric["hue"] / 360, *_SATURATION_VALUE[tone])
    background = "#" + "".join(f"{round(channel * 255):02x}" for channel in rgb)
    scale = 100 * numeric["scale"] / max(drawing.width, drawing.height)
    across = -scale if mirrored else scale
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 100 100"><rect width="100" height="100" fill="{background}"/>'
        f'<g transform="translate({50 + numeric["x"]:.4f} {50 + numeric["y"]:.4f}) '
        f"scale({across:.6f} {scale:.6f}) "
        f'translate({-drawing.middle[0]} {-drawing.middle[1]})">{drawing.body}</g></svg>'
    )


def _check(what: str, values: Sequence[object], valid: Sequence[object]) -> None:
    listed = ", ".join(str(choice) for choice in valid)
    if not values:
        raise ValueError(f"emoji need at least one {what}; there are {listed}")
    for value in values:
        if value not in valid:
            raise ValueError(f"emoji have no {what} {value!r}; there are {listed}")
