"""The data set `laion-like`: what img2dataset would have downloaded, its faults known.

This module owns what row `n` is: `draw_row(spec, row)` is a pure function, as `draw_avatar` is. A
row's face is that row of the avatars' training split, with the same attributes and caption, drawn
at a size of the web's (shorter side 160 to 900 px, sides 1:2 to 2:1) before soft shades of its
background, with grain, so that a JPEG costs the bytes and the time that a photograph's does. The
centre square is the avatar's drawing, so that its attributes hold for whoever cuts that out.

A share of the rows has one of FAULTS each. The truth is in the Parquet file beside the tar, and in
no json: `fault` ("" for none), and for a copy `duplicate_of`, the key of the row that was copied.
Copied rows come earlier and have no fault, so one who keeps the first of each group keeps those;
where a row finds none to copy (row 0, or nearly every row has a fault), it has no fault itself.
Rows without a fault have `punsafe` and `pwatermark` below 0.45.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from data_pipelines.avatars import AvatarSpec, avatar_svg
from data_pipelines.drawing import image_of_svg, uniform
from data_pipelines.shard_writer import ROWS_PER_SHARD_LIMIT, sample_key

Fault = Literal[
    "truncated",  # a JPEG that ends too early
    "no_image",  # a page of HTML
    "wrong_extension",  # a PNG
    "duplicate",  # the bytes of another row's image, under another caption and URL
    "near_duplicate",  # another row's image, a little smaller and of another quality
    "tiny",  # shorter side 40 px
    "huge",  # a JPEG of more than 100 megapixels in 0.4 MB
    "extreme_aspect",  # sides 8:1
    "no_caption",  # no txt
    "empty_caption",
    "no_json",
    "broken_json",  # ends too early
    "nsfw",  # punsafe 0.99
    "watermark",  # pwatermark 0.99
]
FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)
COPIES: Final = ("duplicate", "near_duplicate")

SCHEMA: Final = pa.schema(
    [
        *((name, pa.float64()) for name in ("similarity", "punsafe", "pwatermark")),
        ("AESTHETIC_SCORE", pa.float64()),
        *((name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256", "md5", "fault", "duplicate_of")),
    ]
)
"""img2dataset's: first what its list of URLs said, then what it found; then the truth."""
_TRUTH: Final = ("fault", "duplicate_of")

_SHORTER_PX: Final = (160.0, 900.0)
_SHORTER_OF_EXTREME_PX: Final = (160.0, 300.0)  # else the longer side would be 7,200
_TINY_PX: Final = 40
_LONGEST_RATIO: Final = 2.0
_EXTREME_RATIO: Final = 8.0
_QUALITY: Final = (70, 95)
_GRAIN: Final = 10  # of 255 levels, at most
_SHADE: Final = 45  # of 255 levels, at most, by which the background is lighter or darker
# Most of a row's time is the SVG's pixels: above this side it is enlarged. The grain never is.
_DRAWN_PX: Final = 320
_SVG_SIDE: Final = 128.0
_SVG_CANVAS: Final = re.compile(
    r'<g clip-path="url\(#[^"]*\)"><rect width="128" height="128" fill="#([0-9a-f]{6})"/>'
)
"""The avatars' background, and the square that they are cut out to."""
_SOURCES_TRIED: Final = 32


@dataclass(frozen=True, slots=True)
class LaionSpec:
    """Everything that decides a row besides its number; `faults` is the share of rows with one.

    Raises ValueError for a share outside 0 to 1, and for shards that img2dataset cannot number.
    """

    seed: int = 0
    faults: float = 0.1
    rows_per_shard: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.faults <= 1:
            raise ValueError(f"the share of faults must lie in 0 to 1, got {self.faults}")
        if not 1 <= self.rows_per_shard <= ROWS_PER_SHARD_LIMIT:
            raise ValueError(
                f"rows per shard must be 1 to {ROWS_PER_SHARD_LIMIT}, got {self.rows_per_shard}"
            )


@dataclass(frozen=True, slots=True)
class LaionRow:
    """`members`: extension (jpg, txt, json; the last two may be missing) -> bytes in the tar.

    `columns`: its line of the Parquet file, by the names of SCHEMA. The json says the same but for
    the truth, and `attributes` {name: 0 or 1} of the face besides. `width` and `height` are the
    image's; where it cannot be decoded, what they were before it was damaged.
    """

    key: str
    members: dict[str, bytes]
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Picture:
    data: bytes
    width: int
    height: int


def draw_row(spec: LaionSpec, row: int) -> LaionRow:
    """The row, a pure function of its arguments. Raises ValueError for a negative row."""
    if row < 0:
        raise ValueError(f"rows are numbered from 0, got {row}")
    fault, source = fault_of(spec, row)
    key, seed = _key(spec, row), _seed(spec, row)
    shown = row if source is None else source
    svg, avatar = _avatar(spec, shown)
    picture = _spoilt(_drawn(svg, _size(_seed(spec, shown), fault), _seed(spec, shown)), fault, key)
    own = avatar if source is None else _avatar(spec, row)[1]
    caption = {"no_caption": None, "empty_caption": ""}.get(fault, own["caption"])
    columns = {
        **_scores(seed, fault),
        "caption": caption,
        "url": f"https://example.org/{hashlib.sha256(seed.encode()).hexdigest()[:8]}/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.width,
        "original_height": picture.height,
        "exif": "{}",
        "sha256": hashlib.sha256(picture.data).hexdigest(),
        "md5": hashlib.md5(picture.data, usedforsecurity=False).hexdigest(),
        "fault": fault,
        "duplicate_of": None if source is None else _key(spec, source),
    }
    members = {"jpg": picture.data}
    if caption is not None:
        members["txt"] = caption.encode()
    if fault != "no_json":
        described = _json(columns, avatar["attributes"])
        members["json"] = described[: len(described) // 2] if fault == "broken_json" else described
    return LaionRow(key, members, columns)


def fault_of(spec: LaionSpec, row: int) -> tuple[Fault | Literal[""], int | None]:
    """What is wrong with a row ("" for nothing), and the row that it copies, if it does."""
    fault = _fault_by_chance(spec, row)
    if fault not in COPIES:
        return fault, None
    source = _source(spec, row)
    return (fault, source) if source is not None else ("", None)


def _fault_by_chance(spec: LaionSpec, row: int) -> Fault | Literal[""]:
    seed = _seed(spec, row)
    if uniform(seed, "fault") >= spec.faults:
        return ""
    return FAULTS[int(uniform(seed, "kind") * len(FAULTS))]


def _source(spec: LaionSpec, row: int) -> int | None:
    """An earlier row without a fault, any of them alike; None if hardly one is without."""
    tried = (int(uniform(_seed(spec, row), f"source.{n}") * row) for n in range(_SOURCES_TRIED))
    return next((r for r in tried if r < row and not _fault_by_chance(spec, r)), None)


def _seed(spec: LaionSpec, row: int) -> str:
    return f"laion-like/{spec.seed}/{row}"


def _key(spec: LaionSpec, row: int) -> str:
    return sample_key(*divmod(row, spec.rows_per_shard))


def _avatar(spec: LaionSpec, row: int) -> tuple[str, dict[str, Any]]:
    return avatar_svg(AvatarSpec(seed=spec.seed, split="train"), row)


def _json(columns: Mapping[str, Any], attributes: Mapping[str, int]) -> bytes:
    described = {name: value for name, value in columns.items() if name not in _TRUTH}
    return json.dumps({**described, "attributes": attributes}, indent=4).encode()


def _scores(seed: str, fault: str) -> dict[str, float]:
    def between(name: str, low: float, high: float, power: int = 1) -> float:
        return round(low + (high - low) * uniform(seed, name) ** power, 4)

    return {
        "similarity": between("similarity", 0.15, 0.45),
        "punsafe": 0.99 if fault == "nsfw" else between("punsafe", 0, 0.45, power=4),
        "pwatermark": 0.99 if fault == "watermark" else between("pwatermark", 0, 0.45, power=4),
        "AESTHETIC_SCORE": between("aesthetic", 3, 7),
    }


# ---------------------------------------------------------------------------------------- pictures


def _size(seed: str, fault: str) -> tuple[int, int]:
    """Width and height in pixels; both sides and their ratio are log-uniform."""
    low, high = _SHORTER_OF_EXTREME_PX if fault == "extreme_aspect" else _SHORTER_PX
    shorter = _TINY_PX if fault == "tiny" else round(low * (high / low) ** uniform(seed, "size"))
    ratio = _LONGEST_RATIO ** uniform(seed, "ratio")
    longer = round(shorter * (_EXTREME_RATIO if fault == "extreme_aspect" else ratio))
    return (longer, shorter) if uniform(seed, "wide") < 0.5 else (shorter, longer)


def _drawn(svg: str, size: tuple[int, int], seed: str) -> _Picture:
    """A JPEG of the row's quality, 4:2:0. Its centre square is the avatar, so its labels hold."""
    width, height = size
    chance = np.random.default_rng(int(uniform(seed, "light") * 2**53))
    shrunk = min(1.0, _DRAWN_PX / max(size))
    small = (max(1, round(width * shrunk)), max(1, round(height * shrunk)))
    face, colour = _cut_out(svg, width / height)
    light = chance.integers(-_SHADE, _SHADE + 1, (4, 4, 1))
    shades = Image.fromarray(_levels(light + np.frombuffer(colour, np.uint8)))
    image = shades.resize(small, Image.Resampling.BICUBIC)
    drawn = image_of_svg(face, *small)
    image.paste(drawn, mask=drawn)
    grain = int(uniform(seed, "grain") * (_GRAIN + 1))
    noise = chance.integers(-grain, grain + 1, (height, width, 1), np.int8)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.int16)
    return _Picture(_jpeg(_levels(pixels + noise), _quality(seed)), width, height)


def _cut_out(svg: str, aspect: float) -> tuple[str, bytes]:
    """The avatar without its background, widened to this ratio of width to height; its colour."""
    (colour,) = _SVG_CANVAS.findall(svg)
    width, height = _SVG_SIDE * max(1.0, aspect), _SVG_SIDE * max(1.0, 1 / aspect)
    left, top = (_SVG_SIDE - width) / 2, (_SVG_SIDE - height) / 2
    view = f'viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}"'
    widened = _SVG_CANVAS.sub("<g>", svg).replace('viewBox="0 0 128 128"', view, 1)
    return widened, bytes.fromhex(colour)


def _levels(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _spoilt(picture: _Picture, fault: str, key: str) -> _Picture:
    """The picture with what is wrong with it, if that is a matter of its bytes."""
    place = uniform(key, fault)
    match fault:
        case "truncated":
            end = int(len(picture.data) * (0.3 + 0.4 * place))
            return replace(picture, data=picture.data[:end])
        case "no_image":
            page = f"<!DOCTYPE html><html><body>404: there is no {key}.jpg here</body></html>"
            return replace(picture, data=page.encode())
        case "wrong_extension":
            return replace(picture, data=_png(picture.data))
        case "near_duplicate":
            return _copied(picture, shrunk=0.85 + 0.1 * place)
        case "huge":
            return _flat(width=10_240 + 32 * int(32 * place), height=10_240)
        case _:
            return picture


def _copied(picture: _Picture, shrunk: float) -> _Picture:
    width, height = round(picture.width * shrunk), round(picture.height * shrunk)
    image = Image.open(io.BytesIO(picture.data)).resize((width, height), Image.Resampling.BICUBIC)
    return _Picture(_jpeg(np.asarray(image), _QUALITY[0] - 10), width, height)


def _flat(width: int, height: int) -> _Picture:
    """A grey JPEG that is whole, though nobody drew it; sides in multiples of 32 and 8 px.

    Grey 128 is all zeros to a JPEG, a bit for each of the two codes of a block: four blocks are one
    byte, as often as one likes.
    """
    buffer = io.BytesIO()
    Image.new("L", (32, 8), 128).save(buffer, "JPEG", optimize=True)
    head, size, rest = buffer.getvalue().partition(bytes([0, 8, 0, 32]))  # in the frame's header
    assert size
    blocks, end = rest[-3:-2], rest[-2:]
    sides = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    scan = blocks * (width // 32 * (height // 8))
    return _Picture(head + sides + rest[:-3] + scan + end, width, height)


def _quality(seed: str) -> int:
    low, high = _QUALITY
    return low + int(uniform(seed, "quality") * (high - low + 1))


def _jpeg(pixels_HWC: np.ndarray, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels_HWC), quality=quality, colorspace="RGB", colorsubsampling="420"
    )


def _png(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
