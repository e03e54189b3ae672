"""Emoji to test with: a few self-made drawings in the packages' form, and the real packages."""

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.emoji_art import Art, build_art
from data_pipelines.emoji_packages import PackageError, default_cache, fetch_packages

GROUPS = {
    "groups": {"1": "people-body", "2": "component", "3": "animals-nature", "8": "symbols"},
    "subgroups": {"23": "person", "32": "skin-tone", "34": "animal-mammal", "90": "arrow"},
}


def entry(code: str, label: str, group: int, subgroup: int, **more: Any) -> dict[str, Any]:
    return {"hexcode": code, "label": label, "group": group, "subgroup": subgroup, **more}


SKINS = [
    entry("1F44B-1F3FB", "cook: light", 1, 23, tone=1),
    entry("1F44B-1F3FF", "", 1, 23, tone=5),
]
ENTRIES = [
    entry("1F44B", "cook", 1, 23, tags=["food"], skins=SKINS),
    entry("1F44B-200D-2640-FE0F", "woman cook", 1, 23),
    entry("1F436", "dog", 3, 34),
    entry("1F43A", "wolf", 3, 34),
    entry("27A1-FE0F", "right arrow", 8, 90),
    entry("2B05-FE0F", "left arrow", 8, 90),
    entry("1F9FF", "drawn by nobody", 3, 34),
    entry("1F3FB", "light skin tone", 2, 32),
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]


def icons(side: int, **colours: str) -> dict[str, Any]:
    """Squares that fill their box; of `right` and `left` one half is empty."""
    shapes = {
        "right": f"M{side // 2} 0h{side // 2}v{side}H{side // 2}z",
        "left": f"M0 0h{side // 2}v{side}H0z",
    }
    whole = f"M0 0h{side}v{side}H0z"
    bodies = {
        name: f'<path d="{shapes.get(name, whole)}" fill="{colour}"/>'
        for name, colour in colours.items()
    }
    icons = {name: {"body": body} for name, body in bodies.items()}
    return {"icons": icons, "width": side, "height": side}


SETS = {
    "noto": (
        icons(
            10,
            cook="#ffaa00",
            light="#ffeecc",
            dark="#332211",
            woman="#ff00aa",
            dog="#0000ff",
            right="#00ff00",
            left="#00ff00",
        ),
        {
            "1f44b": "cook",
            "1f44b-1f3fb": "light",
            "1f44b-1f3ff": "dark",
            "1f44b-200d-2640": "woman",
            "1f436": "dog",
            "27a1": "right",
            "2b05-fe0f": "left",
            "1f3fb": "light",
        },
    ),
    "openmoji": (icons(72, animal="#ff0000"), {"1f436": "animal", "1f43a": "animal"}),
}


def small_art() -> Art:
    return build_art(ENTRIES, GROUPS, SETS)


def real_packages() -> Path:
    """The folder of the real packages, fetched if need be; the test is skipped without them."""
    folder = default_cache()
    try:
        fetch_packages(folder)
    except (PackageError, FileNotFoundError) as error:
        pytest.skip(f"no emoji art here: {error}")
    return folder
