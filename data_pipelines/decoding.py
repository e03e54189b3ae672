"""Image bytes -> square RGB pixels of one size. Every input is hostile."""

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Images that claim more pixels are refused before they are decoded."""
FORMATS = ("PNG", "WEBP", "GIF", "BMP")
"""What Pillow may open; other plug-ins are not for hostile bytes (EPS starts Ghostscript)."""


_METADATA_BYTES = 65_536
"""EXIF comes first in a JPEG, in a segment of at most this length."""
_JPEG_EXIF, _EXIF = b"Exif", (b"eXIf", b"EXIF")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """The bytes are not an image that can be used."""


class TooManyPixelsError(DecodeError):
    """An image claims more than MAX_PIXELS."""


class NotEncodedError(DecodeError):
    """What a model was to make of an image beforehand is not there."""


def decode_image(data: bytes, size_px: int) -> NDArray[np.uint8]:
    """Decode, cut the centre square, resize, turn upright; (size_px, size_px, 3) uint8 RGB.

    A JPEG of twice the size and more is decoded at a half, a quarter or an eighth of its scale.

    Raises:
        DecodeError: not an image, damaged, or more than MAX_PIXELS.
    """
    out = np.empty((size_px, size_px, 3), np.uint8)
    decode_image_into(out, data, place=0.5)
    return out


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as the file claims them, without decoding; before it is turned upright.

    Raises:
        DecodeError: not an image, or more than MAX_PIXELS.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
        except ValueError as error:
            raise DecodeError(f"damaged JPEG of {len(data)} bytes: {error}") from error
        _check_size(width, height)
        return width, height
    with _opened(data) as image:
        _check_size(*image.size)
        return image.size


def decode_whole(data: bytes) -> NDArray[np.uint8]:
    """Every pixel of the image, turned upright; (height, width, 3) uint8 RGB.

    Raises:
        DecodeError: as `decode_image`.
    """
    if data[:2] == b"\xff\xd8":
        return _upright(_decode_jpeg(data, None, None)[0], data)
    return _upright(_decode_other(data), data)


def centre_square(pixels: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """The centre square of whole pixels, resized; (size_px, size_px, 3) uint8."""
    return _resized_square(pixels, size_px, 1.0, 0.5)


def decode_image_into(out: NDArray[np.uint8], data: bytes, place: float) -> None:
    """The same into a contiguous array of that shape. After an error, its content is not defined.

    Args:
        place: of the square along the longer side, in [0, 1); 0.5 is the centre.

    Raises:
        DecodeError: as `decode_image`.
    """
    size_px = len(out)
    is_jpeg = data[:2] == b"\xff\xd8"
    pixels, scale = _decode_jpeg(data, size_px, out) if is_jpeg else (_decode_other(data), 1.0)
    turned = _JPEG_EXIF in data[:_METADATA_BYTES] if is_jpeg else any(m in data for m in _EXIF)
    if pixels is out and not turned:
        return
    square = _resized_square(pixels, size_px, scale, place)
    out[:] = _upright(square, data) if turned else square


def _resized_square(
    pixels: NDArray[np.uint8], size_px: int, scale: float, place: float
) -> NDArray[np.uint8]:
    """The square at its place in the image before it was scaled, to whole pixels of that."""
    height, width = (round(side / scale) for side in pixels.shape[:2])
    side = min(height, width)
    top, left = (int((length - side) * place) * scale for length in (height, width))
    first_row, first_column = math.floor(top), math.floor(left)
    square = pixels[
        first_row : math.ceil(top + side * scale), first_column : math.ceil(left + side * scale)
    ]
    if square.shape[:2] == (size_px, size_px):
        return square
    top, left = top - first_row, left - first_column
    right, bottom = min(left + side * scale, square.shape[1]), min(top + side * scale, len(square))
    resized = Image.fromarray(square).resize(
        (size_px, size_px),
        Image.Resampling.BILINEAR,
        box=(left, top, right, bottom),
        reducing_gap=2.0,
    )
    return np.asarray(resized)


def _upright(pixels: NDArray[np.uint8], data: bytes) -> NDArray[np.uint8]:
    """Turned and mirrored as the EXIF orientation says; a centre square stays the centre."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", *FORMATS)) as image:
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, struct.error):
        return pixels  # broken metadata around sound pixels
    if turn is None:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(turn))


def _decode_jpeg(
    data: bytes, size_px: int | None, out: NDArray[np.uint8] | None
) -> tuple[NDArray[np.uint8], float]:
    """Its pixels, and their scale: 1, or the smallest of 1/2, 1/4 and 1/8 that is large enough.

    The pixels are `out` where they fit as they are. Without a size they are all there.
    """
    try:
        height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
        _check_size(width, height)
        if out is not None and height == width == size_px:
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
            return out, 1.0
        scales = (1, 2, 4, 8) if size_px is not None else ()
        shrunk = max((n for n in scales if min(height, width) >= n * (size_px or 0)), default=1)
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            min_height=-(-height // shrunk),
            min_width=-(-width // shrunk),
            min_factor=shrunk,
        )
        return pixels, 1 / shrunk
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError(f"damaged JPEG of {len(data)} bytes: {error}") from error


def _decode_other(data: bytes) -> NDArray[np.uint8]:
    with _opened(data) as image:
        _check_size(*image.size)
        if image.mode == "I;16":  # Pillow clips 16-bit grey to white instead of scaling it
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image that is no JPEG; whatever goes wrong with it in the block is a DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise DecodeError(f"{len(data)} bytes that are no JPEG and none of {kinds}") from error
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes bring a decoder to errors of any kind
        raise DecodeError(f"{len(data)} bytes that are no usable image: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooManyPixelsError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
