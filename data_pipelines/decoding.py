"""Image bytes -> square RGB pixels of one size. Every input is hostile."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Images that claim more pixels are refused before they are decoded."""
FORMATS = ("PNG", "WEBP", "GIF", "BMP")
"""What Pillow may open; other plug-ins are not for hostile bytes (EPS starts Ghostscript)."""


class DecodeError(ValueError):
    """The bytes are not an image that can be used."""


def decode_image(data: bytes, size_px: int) -> NDArray[np.uint8]:
    """Decode, cut the centre square, resize; (size_px, size_px, 3) uint8 RGB.

    Raises:
        DecodeError: not an image, damaged, or more than MAX_PIXELS.
    """
    pixels = _decode_jpeg(data) if data[:2] == b"\xff\xd8" else _decode_other(data)
    height, width, _ = pixels.shape
    if height == width == size_px:
        return pixels
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    resized = square.resize((size_px, size_px), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(resized)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height))
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError(f"damaged JPEG of {len(data)} bytes: {error}") from error


def _decode_other(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            if image.mode == "I;16":  # Pillow clips 16-bit grey to white instead of scaling it
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise DecodeError(f"{len(data)} bytes that are no JPEG and none of {kinds}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{len(data)} bytes that are no usable image: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
