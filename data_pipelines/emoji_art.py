"""Emoji: what there is to draw, what each is called, and which may not be in different splits."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from data_pipelines.emoji_packages import EMOJIBASE, VENDORS, read_json

Split = Literal["train", "val", "test"]

_TURNS: Final[tuple[Split, ...]] = ("test", "train", "val", "train", "train")
_NOT_PICTURES: Final = "component"
"""Emojibase's group of bare skin tones and hair styles."""
_PRESENTATION: Final = "FE0F"
_TONES: Final = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
_GENDER_SIGN: Final = re.compile("-200D-264[02]")
_ANY_GENDER: Final = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_MARGIN: Final = {"openmoji": 5}
"""Of a drawing's own units, left free at every edge; the other vendors' fill their square."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """The inside of an SVG; what counts is the `width` x `height` units around its middle."""

    body: str
    middle: tuple[float, float]
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Version:
    """An emoji as such, or in a skin tone: 1 (light) to 5 (dark), two of them for a couple."""

    code: str
    name: str
    tones: tuple[int, ...]
    drawings: dict[str, Drawing]
    """By vendor; not every vendor draws everything."""


@dataclass(frozen=True, slots=True)
class Emoji:
    """One line of Unicode's list, with all its skin tones."""

    name: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    family: str
    """Shared by emoji that differ in gender only, or that a vendor draws alike."""
    split: Split
    """The family's: all of it is in one, whatever the vendors and the seed."""
    versions: tuple[Version, ...]


@dataclass(frozen=True, eq=False)
class Art:
    """Everything that can be drawn. Compared by identity: it is large."""

    emoji: tuple[Emoji, ...]


@lru_cache(maxsize=1)
def load_art(folder: Path) -> Art:
    """All the vendors' art from the packages in `folder`; a second and about 60 MB.

    Raises:
        PackageError: a package is missing or damaged.
    """
    groups = read_json(folder, EMOJIBASE, "meta/groups.json")
    sets = {
        vendor: (read_json(folder, package, "icons.json"), read_json(folder, package, "chars.json"))
        for vendor, package in VENDORS.items()
    }
    return build_art(read_json(folder, EMOJIBASE, "en/data.json"), groups, sets)


def build_art(
    entries: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Any],
    sets: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]],
) -> Art:
    """Join Emojibase's entries with each vendor's drawings.

    Args:
        entries: of Emojibase's `data.json`.
        groups: Emojibase's `meta/groups.json`.
        sets: by vendor, Iconify's `icons.json` and `chars.json` (code -> name of an icon).
    """
    drawings = {
        vendor: _drawings_of(*found, _MARGIN.get(vendor, 0)) for vendor, found in sets.items()
    }
    lines: list[Mapping[str, Any]] = []
    versions: list[tuple[Version, ...]] = []
    kinds: list[tuple[str, str]] = []
    for line in entries:
        category = groups["groups"].get(str(line.get("group")), _NOT_PICTURES)
        if category == _NOT_PICTURES:
            continue
        toned = [_version(one, drawings) for one in (line, *line.get("skins", ()))]
        if drawn := tuple(version for version in toned if version.drawings):
            lines.append(line)
            versions.append(drawn)
            kinds.append((category, groups["subgroups"][str(line["subgroup"])]))
    families = _families(versions)
    splits = _splits(families, kinds)
    return Art(
        tuple(
            Emoji(line["label"], tuple(line.get("tags", ())), *kind, family, splits[family], drawn)
            for line, kind, family, drawn in zip(lines, kinds, families, versions, strict=True)
        )
    )


def _plain(code: str) -> str:
    """Vendors differ in whether they write the sign that asks for a coloured picture."""
    return "-".join(part for part in code.upper().split("-") if part != _PRESENTATION)


def _drawings_of(
    icons: Mapping[str, Any], chars: Mapping[str, str], margin: float
) -> dict[str, Drawing]:
    """By plain code."""
    drawings = {}
    for code, name in chars.items():
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        drawings[_plain(code)] = Drawing(
            icon["body"], (width / 2, height / 2), width - 2 * margin, height - 2 * margin
        )
    return drawings


def _version(line: Mapping[str, Any], drawings: Mapping[str, Mapping[str, Drawing]]) -> Version:
    code = _plain(line["hexcode"])
    tone = line.get("tone", ())
    return Version(
        code,
        line["label"],
        tuple(tone) if isinstance(tone, list | tuple) else (tone,),
        {vendor: by_code[code] for vendor, by_code in drawings.items() if code in by_code},
    )


def _families(emoji: list[tuple[Version, ...]]) -> list[str]:
    """The family of each emoji: the first code of all that are linked, directly or in a chain.

    What links: the same code but for tone and gender, or the same drawing by any vendor (Norway's
    flag is Svalbard's; one hand's astronaut has no gender).
    """
    parent = list(range(len(emoji)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, versions in enumerate(emoji):
        for link in {link for version in versions for link in _links(version)}:
            one, other = sorted((root(first_with.setdefault(link, index)), root(index)))
            parent[other] = one
    return [emoji[root(index)][0].code for index in range(len(emoji))]


def _links(version: Version) -> Iterable[str]:
    parts = _GENDER_SIGN.sub("", version.code).split("-")
    yield "-".join(_ANY_GENDER.get(part, part) for part in parts if part not in _TONES)
    for drawing in version.drawings.values():
        yield drawing.body


def _splits(families: Sequence[str], kinds: Sequence[tuple[str, str]]) -> dict[str, Split]:
    """Three of five families are in train, one in val, one in test, and so of every kind.

    Within a kind the order is that of a hash, so neighbours in Unicode's list are no pattern.
    """
    kind_of = dict(reversed(list(zip(families, kinds, strict=True))))  # of the family's first
    in_order = sorted(kind_of, key=lambda family: (kind_of[family], _mixed(family)))
    return {family: _TURNS[turn % len(_TURNS)] for turn, family in enumerate(in_order)}


def _mixed(family: str) -> bytes:
    return hashlib.blake2b(family.encode(), digest_size=8).digest()
