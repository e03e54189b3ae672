"""Pictures of moved features: between two images, and along the direction of a classifier.

METHOD section 7, interpolation and manipulation. The noise of the first image is kept, so that only
the feature differs; one row moves the noise too, as the paper's interpolation does.

Letters: C channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.sampling import mix_subsets, move_along, slerp
from tools.attribute_directions import Direction
from tools.denoising import encode
from tools.evaluate_counterfactual import (
    WHOLE,
    Part,
    decode,
    infer_noise,
    parts_of,
)
from tools.pictures import Grid, to_pixels

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One way of changing an image, the more the further to the right."""

    name: str
    tiles: Grid
    """(1, columns, H, W, 3)"""


@torch.inference_mode()
def interpolation_rows(model: DiTi, pair: Tensor, *, steps: int) -> list[Row]:
    """From the first image of a pair (2, C, H, W) towards the second, by ranges of subsets."""
    a, b = pair.split(1)
    z_a, z_b = encode(model, a), encode(model, b)
    noise = infer_noise(model, a, z_a, steps=steps).expand(len(SHARES), -1, -1, -1)
    rows = []
    for part in _shown(model):
        z = torch.cat([mix_subsets(z_a, z_b, part.subsets, share) for share in SHARES])
        rows.append(Row(part.name, to_pixels(decode(model, noise, z, steps=steps))[None]))
    last = model.schedule.num_timesteps - 1
    z = torch.cat([mix_subsets(z_a, z_b, model.partition.subsets, share) for share in SHARES])
    noise_a = infer_noise(model, a, z_a, steps=steps, end=last)
    noise_b = infer_noise(model, b, z_b, steps=steps, end=last)
    noise = torch.cat([slerp(noise_a, noise_b, share) for share in SHARES])
    images = decode(model, noise, z, steps=steps, start=last)
    return [*rows, Row(f"{WHOLE}, and the noise", to_pixels(images)[None])]


@torch.inference_mode()
def manipulation_rows(
    model: DiTi, image: Tensor, direction: Direction, part: Part | None, *, steps: int
) -> list[Row]:
    """One image (1, C, H, W) moved along a classifier's direction: whole, in a part of the feature
    if it has parts, and in the dimensions that ProbMask keeps."""
    z = encode(model, image)
    noise = infer_noise(model, image, z, steps=steps).expand(len(SCALES), -1, -1, -1)
    ways = {
        WHOLE: (direction.weight_D, None),
        **({part.name: (direction.weight_D, part.subsets)} if part else {}),
        f"ProbMask's {sum(direction.kept.values())} dimensions": (direction.masked_D, None),
    }
    rows = []
    for name, (weight, subsets) in ways.items():
        moved = [
            move_along(
                z, weight, scale, mean_D=direction.mean_D, std_D=direction.std_D, subsets=subsets
            )
            for scale in SCALES
        ]
        images = decode(model, noise, torch.cat(moved), steps=steps)
        rows.append(Row(name, to_pixels(images)[None]))
    return rows


def _shown(model: DiTi) -> tuple[Part, ...]:
    """The named ranges and the whole: of many subsets one by one, a page would have no end."""
    ranges = model.partition.named_ranges(0, model.partition.num_timesteps).values()
    parts = {part.subsets: part for part in parts_of(model.partition)}
    shown = [parts[subsets] for subsets in ranges if subsets in parts]
    return tuple(dict.fromkeys((*shown, parts[model.partition.subsets])))
