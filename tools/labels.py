"""Labels of a shard set: what each sample's json says that the image shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.feature_store import FeatureManifest, Features
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_labels import attributes_in, classes_in, numbers_in
from data_pipelines.sample_reader import Sample, iter_shard
from data_pipelines.shard_index import ShardIndex, read_index

Place = tuple[str, int]
"""URL of a tar, and a row in it. Keys are unique in a tar only."""


Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Labels(Generic[Value]):
    """Labels of a shard set, a row per sample, in the order of `places`."""

    places: tuple[Place, ...]
    names: tuple[str, ...]
    values: NDArray[Value]
    """(samples, names)."""

    def of(self, places: Sequence[Place]) -> NDArray[Value]:
        """Rows in the order of `places`.

        Raises:
            ValueError: a sample has no labels: features and labels are of different shard sets.
        """
        row_of = {place: row for row, place in enumerate(self.places)}
        unknown = [place for place in places if place not in row_of]
        if unknown:
            url, row = unknown[0]
            raise ValueError(
                f"{len(unknown)} of {len(places)} features have no labels, for example that of row "
                f"{row} of {url}; the shards changed after the export: export again"
            )
        return self.values[[row_of[place] for place in places]]


def places_of(manifest: FeatureManifest, features: Features) -> list[Place]:
    """Where the samples of these features lie."""
    urls = {shard: join(manifest.source_url, shard) for shard in set(features.shards)}
    rows = features.rows.tolist()
    return [(urls[shard], row) for shard, row in zip(features.shards, rows, strict=True)]


def iter_samples(store: ObjectStore, index: ShardIndex) -> Iterator[Sample]:
    """Every raw sample of a shard set, in order, shard by shard."""
    return (sample for shard in index.shards for sample in iter_shard(store, shard))


def read_samples(store: ObjectStore, index: ShardIndex) -> list[Sample]:
    """The same at once; for sets that fit in memory."""
    return list(iter_samples(store, index))


def read_source(store: ObjectStore, manifest: FeatureManifest) -> list[Sample]:
    """The raw samples that a feature set was exported from.

    Raises:
        ValueError: other shards are there now.
    """
    index = read_index(store, manifest.source_url)
    if index.digest != manifest.index_digest:
        raise ValueError(
            f"the shards at {manifest.source_url} are not those that the features were exported "
            f"from (index {index.digest[:12]}, was {manifest.index_digest[:12]}); export them again"
        )
    return read_samples(store, index)


def attributes_of(samples: Sequence[Sample]) -> Labels[np.int8]:
    """Their attributes, 0 or 1.

    Raises:
        ValueError: a sample is not labelled, or with other attributes than the rest.
    """
    return _labels_of(samples, attributes_in, "attributes", np.int8)


def numbers_of(samples: Sequence[Sample]) -> Labels[np.float64]:
    """Their numbers, in the units of their json.

    Raises:
        ValueError: a sample is not labelled, or with other numbers than the rest.
    """
    return _labels_of(samples, numbers_in, "numbers", np.float64)


def classes_of(samples: Sequence[Sample]) -> Labels[np.str_]:
    """Their classes, a word each.

    Raises:
        ValueError: a sample is not labelled, or with other kinds of classes than the rest.
    """
    return _labels_of(samples, classes_in, "classes", np.str_)


def _labels_of(
    samples: Sequence[Sample],
    labels_in: Callable[[Sample], Mapping[str, Any]],
    what: str,
    dtype: type[Value],
) -> Labels[Value]:
    names = tuple(sorted(labels_in(samples[0])))
    rows = []
    for sample in samples:
        labels = labels_in(sample)
        if different := labels.keys() ^ set(names):
            raise ValueError(
                f"sample {sample['__key__']} of {sample['__url__']} and the first sample do not "
                f"both have the {what} {sorted(different)}; label every sample alike"
            )
        rows.append([labels[name] for name in names])
    places = tuple((sample["__url__"], sample["__row__"]) for sample in samples)
    return Labels(places, names, np.array(rows, dtype))


def read_pixels(samples: list[Sample], size_px: int) -> NDArray[np.uint8]:
    """Images of raw samples; (N, H, W, 3) uint8."""
    return np.stack([decode_sample(sample, size_px) for sample in samples])
