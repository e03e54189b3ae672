"""64 bits of how an image looks: re-encoding and a little resizing change few of them.

The signs of its lowest frequencies, after Zauner, "Implementation and Benchmarking of Perceptual
Image Hash Functions" (2010): 8x8 coefficients of the cosine transform of 32x32 grey pixels, each
compared with their median.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _FREQUENCIES = 32, 8


def _cosines() -> NDArray[np.float64]:
    """The lowest non-constant frequencies on `_SIDE` places; (8, 32)."""
    place, frequency = np.arange(_SIDE) + 0.5, np.arange(1, _FREQUENCIES + 1)
    return np.cos(np.pi / _SIDE * frequency[:, None] * place)


_COSINES = _cosines()
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def perceptual_hash(pixels_HWC: NDArray[np.uint8]) -> int:
    """Of a square of uint8 RGB pixels; 64 bits."""
    grey = Image.fromarray(pixels_HWC).convert("L")
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    low = np.round(_COSINES @ small @ _COSINES.T, 3).ravel()  # what rounding makes is no sign
    return int(_BITS[low > np.median(low)].sum())
