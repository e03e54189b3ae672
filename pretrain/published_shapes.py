"""What the shapes of published weights tell about the networks they belong to.

Only names and shapes are looked at. The result is then built, and its own names and shapes are
compared with the file's one by one, so that what is guessed here cannot be wrong unnoticed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.task import EncoderConfig
from pretrain.backbone import first_few
from pretrain.published_config import LayoutError, validated

Shapes = Mapping[str, Sequence[int]]

_ENCODER_HEADS = 4  # of every published encoder; its weights do not tell


def check_layers(part: str, shapes: Shapes) -> None:
    """Refuse layers that are not whole: each has a weight and a bias of as many outputs.

    What is read off shapes then has not been read off what is left of a layer.

    Raises:
        LayoutError: naming the weights and biases that are missing or do not belong together.
    """
    other = {
        name: f"{layer}.{'bias' if kind == 'weight' else 'weight'}"
        for name in shapes
        for layer, _, kind in [name.rpartition(".")]
        if kind in ("weight", "bias")
    }
    missing = sorted(half for half in other.values() if half not in shapes)
    misshapen = [
        f"{name} {tuple(shapes[name])} beside {half} {tuple(shapes[half])}"
        for name, half in sorted(other.items())
        if name.endswith("bias") and half in shapes and shapes[name][:1] != shapes[half][:1]
    ]
    problems = [("missing", missing), ("wrong shape", misshapen)]
    if said := "; ".join(f"{what}: {first_few(names)}" for what, names in problems if names):
        raise LayoutError(
            f"its {part} has layers that are not whole; {said}. The file is incomplete, or of an "
            f"architecture that is not supported."
        )


def unet_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields of `UNetConfig` that follow from the shapes of an ADM-type U-Net.

    Raises:
        LayoutError: the shapes are not those of such a U-Net.
    """
    if "label_emb.weight" in shapes:
        raise LayoutError(
            f"it is a class-conditional model (label_emb.weight has {shapes['label_emb.weight'][0]}"
            f" rows); a backbone is unconditional, so use the unconditional checkpoint"
        )
    check_layers("denoiser", shapes)
    base = _shape(shapes, "time_embed.0.weight", 2)[1]
    image_channels = _shape(shapes, "input_blocks.0.0.weight", 4)[1]
    outputs = _shape(shapes, "out.2.weight", 4)[0]
    if outputs not in (image_channels, 2 * image_channels):
        raise LayoutError(
            f"input_blocks.0.0.weight takes {image_channels} channels, but out.2.weight gives "
            f"{outputs}; as many are needed, or twice as many with a learned sigma"
        )
    levels, blocks_per_level = _levels(shapes)
    multipliers, factors = [], []
    for level in range(levels):
        block = f"input_blocks.{1 + level * blocks_per_level}"
        channels = _shape(shapes, f"{block}.0.in_layers.2.weight", 4)[0]
        if channels % base:
            raise LayoutError(
                f"{block}.0.in_layers.2.weight gives {channels} channels, which is no whole "
                f"multiple of the base {base} (of time_embed.0.weight); such U-Nets cannot be used"
            )
        multipliers.append(channels // base)
        if f"{block}.1.qkv.weight" in shapes:
            factors.append(2**level)
    first = multipliers[0] * base
    return {
        "in_channels": image_channels,
        "base_channels": base,
        "channel_multipliers": tuple(multipliers),
        "num_res_blocks": blocks_per_level - 1,
        "attention_factors": tuple(factors),
        "learn_sigma": outputs == 2 * image_channels,
        "resblock_updown": not any(name.endswith(".0.op.weight") for name in shapes),
        "scale_shift_norm": _shape(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0] != first,
    }


def encoder_shape(shapes: Shapes) -> tuple[EncoderConfig, int]:
    """An encoder's configuration and the side of its images, in pixels.

    Raises:
        LayoutError: it is not a row of convolutions with one linear layer at the end.
    """
    layers = sorted((int(m[1]), m[0]) for name in shapes if (m := _ENCODER_LAYER.fullmatch(name)))
    channels: list[int] = []
    attention_after = latent_dim = flat = last = None
    for _, name in layers:
        shape = shapes[name]
        if name.endswith(".qkv.weight"):
            attention_after = len(channels)
        elif len(shape) == 4:
            channels.append(shape[0])
        elif len(shape) == 2:
            last, (latent_dim, flat) = name, shape
    if averages := sorted(name for name in shapes if name.endswith("running_mean")):
        raise LayoutError(
            f"its encoder has BatchNorm ({first_few(averages)}), so it is a ResNet10; how the "
            f"published code names and strides that one's layers is not known here, and a guess "
            f"would compute other features. Only the convolutional encoders can be read."
        )
    if channels:
        check_layers("encoder", shapes)
    if not channels or latent_dim is None or flat is None:
        raise LayoutError(
            f"its encoder is none of the published convolutional ones (they have names such as "
            f"encoder.0.weight); it has {first_few(sorted(shapes))}"
        )
    side = math.isqrt(flat // channels[-1])
    if side * side * channels[-1] != flat:
        raise LayoutError(
            f"{last} of its encoder takes {flat} values, which is no square image of "
            f"{channels[-1]} channels"
        )
    config = validated(
        EncoderConfig,
        "its encoder",
        latent_dim=latent_dim,
        channels=tuple(channels),
        attention_after=attention_after,
        num_heads=_ENCODER_HEADS,
    )
    return config, side * 2 ** len(channels)


_ENCODER_LAYER = re.compile(r"encoder\.(\d+)\.(?:qkv\.)?weight")
_RESAMPLER = re.compile(r"output_blocks\.(\d+)\.[1-9]\.(?:in_layers\.0|conv)\.weight")


def _levels(shapes: Shapes) -> tuple[int, int]:
    """Levels, and output blocks of each: every level but the outermost ends by resampling."""
    down, up = (_count(shapes, name) for name in ("input_blocks", "output_blocks"))
    levels = 1 + len({m[1] for name in shapes if (m := _RESAMPLER.fullmatch(name))})
    if down != up or down % levels or down < 2 * levels:
        raise LayoutError(
            f"its U-Net has {down} input blocks, {up} output blocks and {levels} levels; "
            f"an ADM-type U-Net has as many output as input blocks, equally many in each level"
        )
    return levels, down // levels


def _count(shapes: Shapes, name: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(name + ".")})


def _shape(shapes: Shapes, name: str, num_axes: int) -> Sequence[int]:
    if name not in shapes:
        raise LayoutError(
            f"it has no {name}, which every ADM-type U-Net has; it has {first_few(sorted(shapes))}"
        )
    if len(shapes[name]) != num_axes:
        raise LayoutError(
            f"{name} has shape {tuple(shapes[name])}; {num_axes} axes are needed (images are 2-D)"
        )
    return shapes[name]
