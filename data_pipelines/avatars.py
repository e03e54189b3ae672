"""The built-in data set ``avatars``: drawn faces whose labels are exact, not annotated.

This module owns one thing: what row ``n`` of an avatar data set is. ``draw_avatar(spec, row)`` is a
pure function - no clock, no global random state, no files besides the installed art - so any worker
can draw any row, and a shard can be written again byte for byte.

The art is DiceBear's "Voxel Art" by DiceBear, CC0 1.0; ``avatar_style`` holds its features, weights
and labels. Every feature of a face is drawn with a key of its own, so changing one never disturbs
another. That is what makes the two special kinds of data set exact:

- *correlated*: the plain faces, except that one attribute follows another in a given share of them;
- *pairs*: rows 2i and 2i+1 are one face, and one option of its drawing differs.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Final, Literal, get_args

import dicebear

from data_pipelines.avatar_style import (
    ATTRIBUTES,
    STYLE,
    WEIGHTS,
    Attribute,
    Face,
    Granularity,
    background_hue_and_value,
    caption_of,
    face_of,
    labels_of,
    options_of,
)
from data_pipelines.drawing import jpeg_of_svg, pick, uniform

Split = Literal["train", "val", "test"]

STYLES: Final = (STYLE,)
SIZES_PX: Final = (32, 64, 128)
_BY_NAME: Final = {attribute.name: attribute for attribute in ATTRIBUTES}


@dataclass(frozen=True, slots=True)
class Correlation:
    """Attribute ``second`` equals attribute ``first`` in this share of the images (0 to 1).

    Raises ValueError for an unknown attribute, for two that cannot be set independently of each
    other, and for a share outside 0 to 1.
    """

    first: str
    second: str
    probability: float

    def __post_init__(self) -> None:
        for name in (self.first, self.second):
            _check_attribute(name)
        if not 0 <= self.probability <= 1:
            raise ValueError(
                f"The probability of a correlation must lie in 0..1; got {self.probability} for "
                f"{self.first}:{self.second}. Write, for example, {self.first}:{self.second}:0.9."
            )
        _check_independent(_BY_NAME[self.first], _BY_NAME[self.second])


@dataclass(frozen=True, slots=True)
class AvatarSpec:
    """Which avatars: everything that decides a row's pixels besides its number.

    ``size_px`` is width and height. ``pairs`` names the attribute in which rows 2i and 2i+1 differ.
    ``correlate`` and ``pairs`` exclude each other. Raises ValueError for a style, size, split or
    attribute that does not exist; the message lists those that do.
    """

    style: str = STYLE
    size_px: int = 32
    seed: int = 0
    split: Split = "train"
    correlate: Correlation | None = None
    pairs: str | None = None

    def __post_init__(self) -> None:
        _check_choice("style", self.style, STYLES)
        _check_choice("size_px", self.size_px, SIZES_PX)
        _check_choice("split", self.split, get_args(Split))
        if self.pairs is not None:
            _check_attribute(self.pairs)
        if self.pairs is not None and self.correlate is not None:
            raise ValueError(
                f"An avatar data set has either pairs (here {self.pairs}) or a correlation (here "
                f"{self.correlate.first}:{self.correlate.second}), not both. Make two data sets."
            )


@dataclass(frozen=True, slots=True)
class AvatarSample:
    """One drawn face.

    ``jpeg`` is RGB, ``size_px`` square, quality 95, 4:4:4 (fine detail is one pixel wide).
    ``metadata`` is plain JSON: ``attributes`` {name: 0 or 1}, ``numeric`` (``scale`` a factor,
    ``x`` and ``y`` in percent of the image, ``hue`` of the background in degrees), ``classes``
    {feature: its value}, ``style``, ``seed`` (DiceBear's), ``caption``, ``width``, ``height`` and,
    with pairs, ``pair``: {``attribute``, ``index`` of the pair, ``other_row``}.
    """

    key: str
    jpeg: bytes
    metadata: dict[str, Any]


def parse_correlation(text: str) -> Correlation:
    """``"hat:smiling:0.9"`` as a Correlation. Raises ValueError for anything that is not one."""
    first, _, rest = text.partition(":")
    second, _, share = rest.partition(":")
    try:
        probability = float(share)
    except ValueError:
        raise ValueError(
            f"A correlation is written FIRST:SECOND:SHARE, like hat:smiling:0.9; got {text!r}."
        ) from None
    return Correlation(first, second, probability)


def attribute_granularity() -> dict[str, Granularity]:
    """Attribute name -> how large a part of the image it concerns, in the order of ATTRIBUTES."""
    return {attribute.name: attribute.granularity for attribute in ATTRIBUTES}


def draw_avatar(spec: AvatarSpec, row: int) -> AvatarSample:
    """The sample at ``row``, a pure function of its two arguments.

    With ``spec.correlate``, it is the plain spec's face of this row, except for the features behind
    the second attribute where that attribute had to change. Raises ValueError for a negative row.
    """
    svg, metadata = avatar_svg(spec, row)
    return AvatarSample(key=str(row), jpeg=jpeg_of_svg(svg, spec.size_px), metadata=metadata)


def avatar_svg(spec: AvatarSpec, row: int) -> tuple[str, dict[str, Any]]:
    """The same sample before it is made of pixels: its SVG of 128 x 128 units, and its metadata.

    Raises ValueError for a negative row.
    """
    if row < 0:
        raise ValueError(f"Avatar rows are numbered from 0; got row {row}.")
    seed = _seed_string(spec, row)
    face = _face(spec, row, seed)
    options = options_of(face, seed, lambda name: uniform(seed, name))
    svg, used = _render(spec.style, options)
    metadata = _metadata(spec, seed, used)
    if spec.pairs is not None:
        metadata["pair"] = {"attribute": spec.pairs, "index": row // 2, "other_row": row ^ 1}
    return svg, metadata


def _check_choice(field: str, value: object, valid: Collection[object]) -> None:
    if value not in valid:
        listed = ", ".join(str(choice) for choice in valid)
        raise ValueError(f"Avatars have no {field} {value!r}. Valid: {listed}.")


def _check_attribute(name: str) -> None:
    if name not in _BY_NAME:
        alike = {known: difflib.SequenceMatcher(None, name, known).ratio() for known in _BY_NAME}
        nearest_first = ", ".join(sorted(_BY_NAME, key=lambda known: -alike[known]))
        raise ValueError(
            f"Avatars have no attribute {name!r}. Valid, nearest first: {nearest_first}."
        )


def _check_independent(first: Attribute, second: Attribute) -> None:
    if first is second:
        raise ValueError(f"Attribute {first.name} cannot be correlated with itself: name two.")
    anyone, features = _plain_face(""), _features(second, first)
    for one, two in itertools.product((0, 1), repeat=2):
        if not _fitting_faces(anyone, {first.name: one, second.name: two}, features):
            raise ValueError(
                f"Attribute {second.name} cannot be set independently of {first.name}: no face has "
                f"{first.name}={one} and {second.name}={two}. Choose attributes of different parts."
            )


def _seed_string(spec: AvatarSpec, row: int) -> str:
    """The DiceBear seed. It holds the split, so no two splits can share a face's seed."""
    return f"{spec.seed}/{spec.split}/{row if spec.pairs is None else row // 2}"


def _face(spec: AvatarSpec, row: int, seed: str) -> Face:
    face = _plain_face(seed)
    if spec.correlate is not None:
        return _correlated(face, spec.correlate, seed)
    if spec.pairs is not None:
        return _one_of_pair(face, _BY_NAME[spec.pairs], row % 2 == 1, seed)
    return face


def _plain_face(seed: str) -> Face:
    return {feature: pick(weights, uniform(seed, feature)) for feature, weights in WEIGHTS.items()}


def _correlated(face: Face, correlation: Correlation, seed: str) -> Face:
    first, second = _BY_NAME[correlation.first], _BY_NAME[correlation.second]
    leader = first.holds(face)
    follower = leader == (uniform(seed, "correlate") < correlation.probability)
    if second.holds(face) == follower:
        return face
    features = _features(second)
    if not set(features).isdisjoint(_features(first)):
        features = _features(second, first)  # keeping the first may take one of its own features
    return _nearest_face(face, {first.name: leader, second.name: follower}, features, seed)


def _one_of_pair(face: Face, attribute: Attribute, turned_over: bool, seed: str) -> Face:
    """The face of the pair's even row, or that face with one feature changed for the odd row."""
    own, *conditions = attribute.rule
    for feature, values in conditions:
        if face[feature] not in values:
            weights = {v: weight for v, weight in WEIGHTS[feature].items() if v in values}
            face = face | {feature: pick(weights, uniform(seed, f"{feature}.visible"))}
    if not turned_over:
        return face
    return _nearest_face(face, {attribute.name: not attribute.holds(face)}, (own[0],), seed)


def _features(*attributes: Attribute) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for attribute in attributes for name, _ in attribute.rule))


def _fitting_faces(face: Face, wanted: Mapping[str, int], features: tuple[str, ...]) -> list[Face]:
    """Every face that has the wanted labels and differs from ``face`` in ``features`` at most."""
    combinations = itertools.product(*(WEIGHTS[feature] for feature in features))
    faces = [face | dict(zip(features, values, strict=True)) for values in combinations]
    return [f for f in faces if all(_BY_NAME[name].holds(f) == wanted[name] for name in wanted)]


def _nearest_face(
    face: Face, wanted: Mapping[str, int], features: tuple[str, ...], seed: str
) -> Face:
    """A fitting face that moves the fewest features and, among those, the fewest other labels."""
    labels = labels_of(face)

    def distance(other: Face) -> tuple[int, int]:
        others = labels_of(other)
        moved = sum(face[feature] != other[feature] for feature in features)
        return moved, sum(labels[name] != others[name] for name in labels)

    faces = [(distance(other), other) for other in _fitting_faces(face, wanted, features)]
    least = min(far for far, _ in faces)
    nearest = [other for far, other in faces if far == least]
    weights = {
        str(index): math.prod(WEIGHTS[feature][other[feature]] for feature in features)
        for index, other in enumerate(nearest)
    }
    return nearest[int(pick(weights, uniform(seed, "nearest")))]


@lru_cache(maxsize=len(STYLES))
def _style(name: str) -> dicebear.Style:
    text = resources.files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")
    return dicebear.Style(json.loads(text))


def _render(style: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The SVG, and every option as DiceBear resolved it."""
    avatar = dicebear.Avatar(_style(style), options).to_json()
    return avatar["svg"], avatar["options"]


def _metadata(spec: AvatarSpec, seed: str, used: Mapping[str, Any]) -> dict[str, Any]:
    face = face_of(used)
    return {
        "attributes": labels_of(face),
        "numeric": {
            "scale": used["scale"],
            "x": used["translateX"],
            "y": used["translateY"],
            "hue": round(background_hue_and_value(used)[0], 2),
        },
        "classes": face,
        "style": spec.style,
        "seed": seed,
        "caption": caption_of(face),
        "width": spec.size_px,
        "height": spec.size_px,
    }
