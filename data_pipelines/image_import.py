"""Image files -> samples of shards: as they are, or cut out and resized. Any process can do it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data_pipelines.decoding import DecodeError, centre_square, decode_whole
from data_pipelines.drawing import jpeg_of
from data_pipelines.label_table import Column, described

_FIRST: Final = 10
_CROP: Final = re.compile("([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,6})")


class BadImagesError(ValueError):
    """Images of a folder that cannot be used."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        more = len(self.problems) - _FIRST
        listed = "; ".join(self.problems[:_FIRST]) + (f"; and {more} more" if more > 0 else "")
        return (
            f"{len(self.problems)} of the images cannot be used, mend them or take them away: "
            f"{listed}"
        )


@dataclass(frozen=True, slots=True)
class Crop:
    """A rectangle of the upright image, in pixels from its left upper corner."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done to every image: cut out `crop`, then resize the centre square to `size_px`.

    With neither, files are stored as they are.
    """

    size_px: int | None = None
    crop: Crop | None = None

    @property
    def keeps_files(self) -> bool:
        return self.size_px is None and self.crop is None


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: its path below the folder, its key, and its labels as text."""

    path: str
    key: str
    cells: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FolderShard:
    """The images of one shard, with all that is needed to import them."""

    folder: Path
    entries: tuple[Entry, ...]
    columns: tuple[Column, ...]
    treatment: Treatment


def parse_crop(text: str) -> Crop:
    """`25,57,128,128`: left, top, width, height. Raises ValueError for anything else."""
    match = _CROP.fullmatch(text)
    crop = Crop(*map(int, match.groups())) if match else None
    if crop is None or not crop.width or not crop.height:
        raise ValueError(f"a crop is LEFT,TOP,WIDTH,HEIGHT in whole pixels, got {text!r}")
    return crop


def import_images(shard: FolderShard) -> Iterator[tuple[str, str, bytes, dict[str, Any]]]:
    """(key, extension, bytes, metadata) of each image of a shard.

    Metadata: `path`, `width` and `height` in pixels, and what `described` makes of its labels.

    Raises:
        BadImagesError: after the last one, if any cannot be decoded or is smaller than the crop.
    """
    problems = []
    for entry in shard.entries:
        data = (shard.folder / entry.path).read_bytes()
        try:
            pixels = decode_whole(data)
            if not shard.treatment.keeps_files:
                pixels = _treated(pixels, shard.treatment)
        except DecodeError as error:
            problems.append(f"{entry.path}: {error}")
            continue
        extension = ending_of(entry.path)
        if not shard.treatment.keeps_files:
            data, extension = jpeg_of(pixels), "jpg"
        height, width = pixels.shape[:2]
        metadata = {"path": entry.path, "width": width, "height": height}
        yield entry.key, extension, data, metadata | described(shard.columns, entry.cells)
    if problems:
        raise BadImagesError(problems)


def _treated(pixels: NDArray[np.uint8], treatment: Treatment) -> NDArray[np.uint8]:
    if (crop := treatment.crop) is not None:
        height, width = pixels.shape[:2]
        if crop.left + crop.width > width or crop.top + crop.height > height:
            raise DecodeError(
                f"{width}x{height} pixels, too few for a crop of {crop.width}x{crop.height} at "
                f"left {crop.left}, top {crop.top}"
            )
        pixels = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return pixels if treatment.size_px is None else centre_square(pixels, treatment.size_px)


def ending_of(path: str) -> str:
    """`jpg` of `a/b.JPG`."""
    return PurePosixPath(path).suffix.removeprefix(".").lower()
