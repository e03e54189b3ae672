"""Counterfactuals on a page of their own, or in a report: scores beside pictures of what they mean.

Letters: C channels, H height, W width.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pretrain.diti import DiTi
from tools.attribute_directions import Direction
from tools.counterfactual_pictures import (
    SCALES,
    SHARES,
    Row,
    interpolation_rows,
    manipulation_rows,
)
from tools.counterfactual_table import COLUMNS, EXPLAINED, cells, chosen_rows
from tools.evaluate_counterfactual import WHOLE, Counterfactuals, Swaps, parts_of, swap_numbers
from tools.figures import image_grid
from tools.page import render_page
from tools.pictures import Grid, to_pixels

SHOWN_PAIRS = 3


def make_page(
    model: DiTi,
    title: str,
    found: Counterfactuals,
    *,
    steps: int,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """The page, self-contained; arguments as of `counterfactual_sections`."""
    sections = counterfactual_sections(model, found, steps=steps, say=say)
    return render_page(
        "counterfactual.html", {"title": f"Counterfactuals of {title}", "cf": sections}
    )


def counterfactual_sections(
    model: DiTi,
    found: Counterfactuals,
    *,
    steps: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Values of `counterfactual_sections.html`.

    Args:
        steps: of DDIM, in either direction.
        say: told what comes next.
    """
    swaps, directions = found.swaps, found.directions
    say("drawing interpolations")
    faces = swaps[0].pairs.a[:2]
    interpolations = [
        _strips(interpolation_rows(model, pair, steps=steps), [f"{s:.0%}" for s in SHARES])
        | {"first": _url(to_pixels(pair[:1])[None]), "second": _url(to_pixels(pair[1:])[None])}
        for pair in (faces, faces.flip(0))
    ]
    say("moving images along classifiers' directions")
    manipulations = [
        _manipulation(model, each, direction, steps=steps)
        for each, direction in zip(swaps, directions, strict=False)  # of the same sets, or none
    ]
    return {
        "has_parts": model.partition.num_subsets > 1,
        "pairs": swaps[0].scores.pairs,
        "tiles": _tiles(swaps),
        "columns": COLUMNS,
        "explained": EXPLAINED,
        "attributes": [_attribute(each) for each in swaps],
        "interpolations": interpolations,
        "manipulations": manipulations,
        "precision_columns": list(directions[0].precision) if directions else [],
    }


def _tiles(swaps: Sequence[Swaps]) -> list[dict[str, str]]:
    found = swap_numbers([each.scores for each in swaps])
    tiles = []
    parts = {"best": "best part", "whole": "whole feature"}
    for name, label in parts.items() if len(swaps[0].scores.parts) > 1 else [("whole", "feature")]:
        tiles.append(
            {
                "value": f"{found[f'{name}_reached']:.1%}",
                "label": f"of the way to the other drawing: {label}",
            }
        )
        tiles.append({"value": f"{found[f'{name}_leak']:.1%}", "label": f"leak: {label}"})
    return tiles


def _attribute(swaps: Swaps) -> dict[str, Any]:
    scores = swaps.scores
    names = [scores.best, WHOLE] if scores.best != WHOLE else [WHOLE]
    shown = {
        "A": swaps.pairs.a,
        "A from its own feature": swaps.own,
        **{f"swapped: {name}": swaps.swapped[name] for name in names},
        "B: the truth": swaps.pairs.b,
    }
    tiles = np.stack([to_pixels(images[:SHOWN_PAIRS]) for images in shown.values()], axis=1)
    return {
        "name": _plain(scores.attribute),
        "best": scores.best,
        "chosen": [
            {"name": name, "dims": dims, "cells": row, "strong": name == scores.best}
            for name, dims, row in chosen_rows(scores)
        ],
        "titles": [title.replace(": time-steps ", " ") for title in shown],
        "strips": [_url(row[None]) for row in tiles],
        "parts": [
            {"name": "nothing", "dims": "", "cells": cells(scores.nothing), "strong": False},
            *(
                {
                    "name": name,
                    "dims": scores.dims[name],
                    "cells": cells(score),
                    "strong": name == scores.best,
                }
                for name, score in scores.parts.items()
            ),
        ],
    }


def _manipulation(model: DiTi, swaps: Swaps, direction: Direction, *, steps: int) -> dict[str, Any]:
    """Of the first face; restricted to the part of the feature that is best to swap."""
    scores = swaps.scores.parts
    parts = [part for part in parts_of(model.partition) if part.name != WHOLE]
    part = max(parts, key=lambda part: scores[part.name].reached, default=None)
    rows = manipulation_rows(model, swaps.pairs.a[:1], direction, part, steps=steps)
    return _strips(rows, [f"{scale:+g}" if scale else "0" for scale in SCALES]) | {
        "name": _plain(direction.attribute),
        "precision": [f"{value:.3f}" for value in direction.precision.values()],
        "kept": [(name, count) for name, count in direction.kept.items() if count],
    }


def _strips(rows: Sequence[Row], titles: list[str]) -> dict[str, Any]:
    return {"titles": titles, "rows": [(row.name, _url(row.tiles)) for row in rows]}


def _url(tiles: Grid) -> str:
    """A row of images as a data URL, a white line to the right of each."""
    gaps = np.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
    return "data:image/png;base64," + base64.b64encode(image_grid(gaps, 1)).decode()


def _plain(name: str) -> str:
    return name.replace("_", " ")
