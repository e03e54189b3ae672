"""What a shard set holds, as counts that add up: of a tar, of a set, of a hundred thousand tars."""

import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.decoding import FORMATS
from data_pipelines.sample_reader import Sample
from data_pipelines.sample_stream import IMAGE_EXTENSIONS

BINS = 64
MOST_CHARACTERS = 10_000
"""Of a caption; a longer one is none."""
MOST_OF_A_SCORE = 1e6
"""What lies beyond is no score."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something measured of samples, and the range that its histogram covers."""

    title: str
    unit: str
    low: float
    high: float
    keys: tuple[str, ...] = ()
    """Names that it has in a sample's json; none for what is measured on the members."""


QUANTITIES = {
    "short_side": Quantity("Shorter side", "pixels", 0, 2048),
    "aspect": Quantity("Width over height", "ratio", 0, 4),
    "image_bytes": Quantity("Image file", "KiB", 0, 512),
    "caption": Quantity("Caption", "characters", 0, 320),
    "aesthetic": Quantity(
        "Aesthetic score", "points", 0, 10, ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE")
    ),
    "similarity": Quantity("Image-text similarity", "cosine", 0, 1, ("similarity", "SIMILARITY")),
}


@dataclass(slots=True)
class Histogram:
    """Counts in BINS equal bins; what lies outside counts in the first or last one."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    def add(self, value: float, quantity: Quantity) -> None:
        inside = min(max(value, quantity.low), quantity.high)
        share = (inside - quantity.low) / (quantity.high - quantity.low)
        self.counts[min(BINS - 1, int(share * BINS))] += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)

    def __iadd__(self, other: "Histogram") -> "Histogram":
        self.counts += other.counts
        self.total += other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        return self


@dataclass(slots=True)
class SetStats:
    """Of any number of samples."""

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    """How many samples have a member of this extension."""
    member_bytes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    """Samples whose image or json cannot be read. Only headers are: pixels may still be broken."""
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram() for name in QUANTITIES}
    )

    def add(self, sample: Sample) -> None:
        """Count one raw sample in."""
        self.samples += 1
        contents = {name: value for name, value in sample.items() if not name.startswith("__")}
        for extension, content in contents.items():
            self.members[extension] += 1
            self.member_bytes[extension] += len(content)
        for name, value in self._measured(contents):
            self.histograms[name].add(value, QUANTITIES[name])

    def __iadd__(self, other: "SetStats") -> "SetStats":
        self.samples += other.samples
        self.members += other.members
        self.member_bytes += other.member_bytes
        self.problems += other.problems
        for name, histogram in other.histograms.items():
            self.histograms[name] += histogram
        return self

    def _measured(self, contents: dict[str, bytes]) -> Iterator[tuple[str, float]]:
        image = next((contents[name] for name in IMAGE_EXTENSIONS if name in contents), None)
        if image is None:
            self.problems["no image"] += 1
        elif (size := _size_of(image)) is None:
            self.problems["image header cannot be read"] += 1
        else:
            width, height = size
            yield "short_side", min(size)
            yield "aspect", width / height
            yield "image_bytes", len(image) / 2**10
        described = _described(contents)
        if described is None:
            self.problems["json cannot be read"] += 1
            described = {}
        caption = self._caption(contents, described)
        if caption is not None:
            yield "caption", len(caption)
        for name, quantity in QUANTITIES.items():
            for key in quantity.keys:
                value = described.get(key)
                if isinstance(value, bool):
                    continue
                if isinstance(value, int | float) and abs(value) <= MOST_OF_A_SCORE:
                    yield name, value
                    break

    def _caption(self, contents: dict[str, bytes], described: dict[str, object]) -> str | None:
        """Of the sample's text, or else of its json; absurd ones are problems."""
        text: object = described.get("caption")
        if contents.get("txt"):
            try:
                text = contents["txt"].decode()
            except UnicodeDecodeError:
                self.problems["caption is no UTF-8"] += 1
                return None
        if not isinstance(text, str):
            return None
        if len(text) > MOST_CHARACTERS:
            self.problems[f"caption of more than {MOST_CHARACTERS} characters"] += 1
            return None
        return text


def _size_of(image: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", *FORMATS)) as opened:
            return opened.size if min(opened.size) > 0 else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _described(contents: dict[str, bytes]) -> dict[str, object] | None:
    if "json" not in contents:
        return {}
    try:
        value = json.loads(contents["json"])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
