"""What the drawn data sets share: chance that is a function of names, and SVG -> JPEG."""

import hashlib
import io
from collections.abc import Mapping

import numpy as np
import resvg_py
import simplejpeg
from numpy.typing import NDArray
from PIL import Image


def uniform(seed: str, name: str) -> float:
    """A number in [0, 1), independent for every (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def pick(weights: Mapping[str, int], place: float) -> str:
    """The value at `place` in [0, 1) of the weights laid end to end."""
    remaining = place * sum(weights.values())
    for value, weight in weights.items():
        remaining -= weight
        if remaining < 0:
            return value
    return list(weights)[-1]  # a place just below 1 can round up to the whole sum


def jpeg_of_svg(svg: str, size_px: int) -> bytes:
    """An opaque SVG as a square JPEG of quality 95, 4:4:4: fine detail is one pixel wide."""
    # Straight to the final size: drawing at 2x or 4x and averaging made the avatars' mouths paler.
    return jpeg_of(np.asarray(image_of_svg(svg, size_px, size_px).convert("RGB")))


def image_of_svg(svg: str, width: int, height: int) -> Image.Image:
    """An SVG drawn to that many pixels; RGBA."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def jpeg_of(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """RGB pixels as a JPEG of quality 95, 4:4:4."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels_HWC), quality=95, colorspace="RGB", colorsubsampling="444"
    )
