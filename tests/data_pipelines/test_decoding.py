"""Decoding: every common kind of image becomes square RGB; everything else is a DecodeError."""

import io
import random
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipelines import decoding
from data_pipelines.decoding import DecodeError, centre_square, decode_image, decode_whole

COLOURS = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [180, 180, 60]]], np.uint8)
QUADRANTS = Image.fromarray(COLOURS.repeat(24, axis=0).repeat(24, axis=1))  # 48 x 48


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants_of(pixels: np.ndarray) -> np.ndarray:
    """Colours in the middle of each quadrant, (2, 2, 3) int."""
    side = len(pixels)
    middles = [side // 4, side // 4 + side // 2]
    return pixels[np.ix_(middles, middles)].astype(int)


GREY = np.asarray(QUADRANTS.convert("L")).astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encoded(QUADRANTS, "JPEG", quality=95), 4),
        (encoded(QUADRANTS, "JPEG", quality=95, progressive=True), 4),
        (encoded(QUADRANTS.convert("CMYK"), "JPEG", quality=95), 6),
        (encoded(QUADRANTS, "PNG"), 0),
        (encoded(QUADRANTS.convert("RGBA"), "PNG"), 0),
        (encoded(QUADRANTS.quantize(8), "PNG"), 6),
        (encoded(QUADRANTS, "WEBP", lossless=True), 0),
        (encoded(QUADRANTS, "WEBP", quality=95), 6),
        (encoded(QUADRANTS.convert("RGBA"), "WEBP", lossless=True), 0),
        (encoded(QUADRANTS.quantize(8), "GIF"), 6),
        (encoded(QUADRANTS, "BMP"), 0),
    ],
    ids=["jpeg", "progressive", "cmyk", "png", "rgba", "palette", "webp", "lossy-webp",
         "alpha-webp", "gif", "bmp"],
)  # fmt: skip
@pytest.mark.parametrize("size_px", [48, 24])
def test_colour_images_come_out_as_rgb(data: bytes, tolerance: int, size_px: int):
    pixels = decode_image(data, size_px)
    assert pixels.shape == (size_px, size_px, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(quadrants_of(pixels) - COLOURS).max() <= tolerance


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encoded(QUADRANTS.convert("L"), "JPEG", quality=95), 4),
        (encoded(QUADRANTS.convert("L"), "PNG"), 0),
        (encoded(QUADRANTS.convert("LA"), "PNG"), 0),
        (encoded(Image.fromarray(GREY * 257), "PNG"), 0),
    ],
    ids=["jpeg", "png", "with-alpha", "16-bit"],
)
def test_grey_images_come_out_as_rgb_of_equal_channels(data: bytes, tolerance: int):
    found = quadrants_of(decode_image(data, 48))
    expected = quadrants_of(np.stack([GREY] * 3, axis=-1))
    assert np.abs(found - expected).max() <= tolerance


def test_black_and_white_and_a_transparent_colour_are_kept():
    black_and_white = QUADRANTS.convert("L").point(lambda v: 255 * (v > 100)).convert("1")
    assert set(np.unique(decode_image(encoded(black_and_white, "PNG"), 48))) == {0, 255}
    clear = QUADRANTS.convert("RGBA")
    clear.putalpha(0)
    assert (quadrants_of(decode_image(encoded(clear, "PNG"), 48)) == COLOURS).all()


# ---------------------------------------------------------------------------------- crop and resize


def stripes(colours: list[tuple[int, int, int]]) -> Image.Image:
    """Three stripes of 20 x 20, left to right."""
    return Image.fromarray(np.array([colours], np.uint8).repeat(20, axis=0).repeat(20, axis=1))


@pytest.mark.parametrize("size_px", [20, 10, 32])
def test_the_centre_square_is_kept(size_px: int):
    wide = stripes([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        pixels = decode_image(encoded(image, "PNG"), size_px)
        assert (pixels == (0, 255, 0)).all()
        assert pixels.shape == (size_px, size_px, 3)


def test_an_image_that_has_the_size_is_not_touched():
    noise = np.random.default_rng(0).integers(0, 256, (17, 17, 3), np.uint8)
    assert (decode_image(encoded(Image.fromarray(noise), "PNG"), 17) == noise).all()


@pytest.mark.parametrize(("width", "height"), [(31, 50), (50, 31), (40, 40), (9, 12)])
def test_resizing_filters_rather_than_picks(width: int, height: int):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    pixels = decode_image(encoded(Image.fromarray(noise), "PNG"), 16)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(noise).crop((left, top, left + side, top + side))
    reference = np.asarray(square.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pixels - reference).max() <= 1
    picked = np.asarray(square.resize((16, 16), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(pixels - picked).max() > 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_whole_image_has_every_pixel_and_its_centre_square_is_what_decoding_gives(kind: str):
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind, quality=100, subsampling=0)
    whole = decode_whole(data)
    assert whole.shape == (30, 64, 3)
    assert np.abs(whole.astype(int) - noise).max() <= (8 if kind == "JPEG" else 0)
    assert (centre_square(whole, 20) == decode_image(data, 20)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_whole_image_is_turned_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stripes([(255, 0, 0), (0, 255, 0), (0, 0, 255)]), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (decode_whole(data) == np.asarray(upright)).all()


# ------------------------------------------------------------------------------------ hostile bytes


def test_a_jpeg_cut_anywhere_is_refused():
    data = encoded(QUADRANTS, "JPEG")
    for length in (2, 3, 20, len(data) // 3, len(data) // 2, len(data) - 40, len(data) - 1):
        with pytest.raises(DecodeError, match=f"damaged JPEG of {length} bytes: "):
            decode_image(data[:length], 16)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_images_cut_in_their_pixels_are_refused(kind: str):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for length in (1, 10, 30, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(DecodeError, match=f"{length} bytes that are no"):
            decode_image(data[:length], 16)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404 Not Found</html>", encoded(QUADRANTS, "EPS"), encoded(QUADRANTS, "TIFF")],
    ids=["empty", "html", "eps", "tiff"],
)
def test_what_is_no_image_of_a_known_kind_is_refused_without_trying(data: bytes):
    with pytest.raises(DecodeError, match="no JPEG and none of PNG, WEBP, GIF, BMP"):
        decode_image(data, 16)


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG whose header claims a size that its data does not have."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000)
    parts = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(QUADRANTS, "JPEG"))
    at = data.index(b"\xff\xc0") + 5  # frame header: marker, length, precision, height, width
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "data",
    [
        png_claiming(9_000, 9_000),
        png_claiming(60_000, 60_000),
        png_claiming(2**31 - 1, 2**31 - 1),
        jpeg_claiming(65_000, 65_000),
        encoded(QUADRANTS, "GIF")[:6] + b"\xff\xff\xff\xff" + encoded(QUADRANTS, "GIF")[10:],
    ],
    ids=["png", "larger-png", "largest-png", "jpeg", "gif"],
)
def test_a_bomb_is_refused_by_its_header(data: bytes, monkeypatch: pytest.MonkeyPatch):
    def decodes(*arguments: object, **options: object) -> None:
        raise AssertionError("the pixels were asked for")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decodes)
    monkeypatch.setattr(Image.Image, "convert", decodes)
    started = time.monotonic()
    with pytest.raises(DecodeError, match=r"pixels|exceeds limit"):
        decode_image(data, 16)
    assert time.monotonic() - started < 1.0


def test_the_limit_is_exact(monkeypatch: pytest.MonkeyPatch):
    for kind in ("JPEG", "PNG"):
        monkeypatch.setattr(decoding, "MAX_PIXELS", 48 * 48)
        decode_image(encoded(QUADRANTS, kind), 16)
        monkeypatch.setattr(decoding, "MAX_PIXELS", 48 * 48 - 1)
        with pytest.raises(DecodeError, match="48x48 pixels are more than the limit of 2303"):
            decode_image(encoded(QUADRANTS, kind), 16)


HOSTS = [
    encoded(QUADRANTS, "JPEG"),
    encoded(QUADRANTS, "PNG"),
    encoded(QUADRANTS.quantize(8), "PNG"),
    encoded(QUADRANTS, "WEBP"),
    encoded(QUADRANTS, "GIF"),
    encoded(QUADRANTS, "BMP"),
]


def with_valid_checksums(data: bytes) -> bytes:
    """The PNG chunks as they stand, each with the checksum that belongs to it."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out) + data[at:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, max_examples=200)
@given(st.sampled_from(HOSTS), st.integers(0, 2**32))
def test_damage_of_any_kind_gives_pixels_or_a_decode_error(data: bytes, seed: int):
    random_ = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(min(len(damaged), random_.choice([40, 120, len(damaged)])))
        match random_.randrange(3):
            case 0:
                damaged[at] = random_.choice([0, 127, 128, 255, random_.randrange(256)])
            case 1:
                del damaged[at : at + random_.randint(1, 8)]
            case 2:
                damaged[at:at] = random_.randbytes(random_.randint(1, 8))
        if len(damaged) < 16:
            return
    attempt = bytes(damaged)
    if attempt.startswith(b"\x89PNG") and random_.random() < 0.7:
        attempt = with_valid_checksums(attempt)
    with suppress(DecodeError):
        assert decode_image(attempt, 16).shape == (16, 16, 3)


def test_a_damaged_png_header_with_a_valid_checksum_is_a_decode_error():
    short = bytearray(encoded(QUADRANTS, "PNG"))
    short[11] = 12  # the header chunk ends one byte early
    with pytest.raises(DecodeError, match="no usable image"):
        decode_image(with_valid_checksums(bytes(short)), 16)


# ------------------------------------------------------------------------------- large and turned


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_upright_as_its_metadata_says(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind == "PNG" else {"quality": 95}
    data = encoded(QUADRANTS, kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.abs(quadrants_of(decode_image(data, 48)) - quadrants_of(expected)).max() <= 6


def test_metadata_behind_a_long_first_segment_counts_too():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(QUADRANTS, "JPEG", quality=95, exif=exif)
    comment = b"\xff\xfe" + (60_000).to_bytes(2, "big") + b"c" * 59_998
    late = data[:2] + comment + data[2:]
    assert np.array_equal(decode_image(late, 48), decode_image(data, 48))
    upright = decode_image(encoded(QUADRANTS, "JPEG", quality=95), 48)
    assert np.abs(decode_image(late, 48).astype(int) - upright[::-1, ::-1]).max() <= 6


def test_a_jpeg_of_exactly_twice_the_size_is_decoded_at_half_its_scale(
    monkeypatch: pytest.MonkeyPatch,
):
    asked: list[int] = []
    decode = simplejpeg.decode_jpeg

    def note(data: bytes, **options):
        asked.append(options.get("min_factor", 1))
        return decode(data, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", note)
    for side in (127, 128, 129, 255, 256):
        decode_image(encoded(Image.new("RGB", (side, side)), "JPEG"), 64)
    assert asked == [1, 2, 2, 2, 4]


def test_broken_metadata_around_sound_pixels_does_no_harm():
    data = encoded(QUADRANTS, "JPEG", quality=95)
    broken = data[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\xff\xff" + b"\xff" * 4 + data[2:]
    assert np.abs(quadrants_of(decode_image(broken[:], 48)) - COLOURS).max() <= 6


@pytest.mark.parametrize(("width", "height"), [(1024, 512), (500, 900), (512, 512), (256, 300)])
def test_a_large_jpeg_comes_out_as_if_all_of_it_had_been_decoded(width: int, height: int):
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(columns / 40 + rows / (30 + 10 * c)) for c in range(3)]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    data = encoded(image, "JPEG", quality=95)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    reference = np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    found = decode_image(data, 64).astype(int)
    assert np.abs(found - reference).mean() < 2
    assert np.abs(found - reference).max() < 12


def test_a_chunk_that_breaks_the_decoder_itself_is_a_decode_error():
    """Pillow meets an empty iCCP chunk behind the pixels with an IndexError."""
    sink = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 8, 7)).save(sink, "PNG")
    png = sink.getvalue()
    body = b"iCCP"
    chunk = (0).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    end = png.index(b"IEND") - 4
    with pytest.raises(DecodeError, match="no usable image"):
        decode_image(png[:end] + chunk + png[end:], 8)
