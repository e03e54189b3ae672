"""What preprocessing does: raw image-text tars in, training shards out; every field and rule."""

import os
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema import StoreConfig
from configs.values import Amount, FiniteFloat, NonNegativeInt, PositiveInt, Section, Url


class FiltersConfig(Section):
    """Which samples stay. A rule that is null is not asked.

    Scores are read from a sample's json. Where a rule asks for one that is not there, the sample
    goes, and is counted under that rule.
    """

    min_similarity: FiniteFloat | None = None
    """Of image and caption, as LAION gives it: `similarity`, a cosine."""
    min_aesthetic: FiniteFloat | None = None
    """`aesthetic`, `aesthetic_score` or `AESTHETIC_SCORE`, in points."""
    max_punsafe: FiniteFloat | None = None
    """`punsafe`: probability that the image is not safe for work."""
    max_pwatermark: FiniteFloat | None = None
    """`pwatermark`: probability that it has a watermark."""
    min_caption_characters: PositiveInt | None = None
    """Without leading and trailing blanks; no caption has none."""
    min_side_px: PositiveInt | None = None
    """Of the shorter side, as the image comes."""
    max_aspect: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Longer side over shorter."""


class DuplicatesConfig(Section):
    """Of images that are alike, the first one in the order of the raw tars stays."""

    exact: bool = True
    """The same bytes of the image file."""
    near_bits: Literal[0, 2] | None = 0
    """Perceptual hashes, of 64 bits, that differ in at most so many count as alike; null does not
    look at them. 2, one coefficient's place taken by another, finds more re-encoded and resized
    images, in a time that grows with the square of their number: for some millions at most."""


class PreprocessConfig(Section):
    """From img2dataset's output to a shard set that runs train on."""

    raw: Url
    """Folder of tars as img2dataset writes them: image, `.txt`, `.json` by key."""
    out: Url
    """Folder of the training shards; `OUT-work` beside it holds what is under way."""
    seed: NonNegativeInt = 0
    """Decides the order of samples in the training shards."""
    image_size_px: PositiveInt
    """Side of the centre square that each image is cut and resized to."""
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 95
    rows_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    """Samples per training shard; the last ones are evened out, so that sizes differ by one."""
    mix_shards: Amount = 8
    """So many training shards are shuffled together, out of neighbouring raw tars of a shuffled
    list; a worker has about so many tars on its disk meanwhile."""
    filters: FiltersConfig = FiltersConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    workers: Amount = 2
    """Ray actors, one core each."""
    store: StoreConfig = StoreConfig()

    @model_validator(mode="after")
    def _out_is_not_raw(self) -> Self:
        raw = _plain(self.raw)
        for ours in (_plain(self.out), _plain(self.work)):
            if raw == ours or ours.startswith(f"{raw}/") or raw.startswith(f"{ours}/"):
                raise ValueError(
                    f"raw and out must lie beside each other, and raw may not be {self.work}, "
                    f"which is ours; got {self.raw} and {self.out}"
                )
        return self

    @property
    def work(self) -> str:
        """Folder of what is under way."""
        return f"{self.out.rstrip('/')}-work"

    @property
    def staged(self) -> str:
        """Folder of what stays of each raw tar, and of the verdicts."""
        return f"{self.work}/staged"

    @property
    def groups(self) -> str:
        """Folder of the plans of training shards, and of what was made by them."""
        return f"{self.work}/groups"


def _plain(url: str) -> str:
    """A place in one spelling."""
    local = url.removeprefix("file://")
    return url.rstrip("/") if "://" in local else os.path.abspath(local)  # noqa: PTH100 (no Path: it may not exist here)
