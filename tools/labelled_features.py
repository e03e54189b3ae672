"""Two halves of labelled features: a probe learns on the first and is scored on the second.

Letters: N samples, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.feature_store import FeatureManifest, Features, FeatureSet, open_features
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_reader import Sample
from tools.labels import Labels, Value, places_of, read_pixels, read_source
from tools.representations import Representation, subsets_of

Other = TypeVar("Other", bound=np.generic)
LabelReader = Callable[[Sequence[Sample]], Labels[Value]]
"""`attributes_of`, `numbers_of` or `classes_of`."""


@dataclass(frozen=True, slots=True)
class Half(Generic[Value]):
    """Features, and the shard set that they were exported from."""

    manifest: FeatureManifest
    features: Features
    samples: list[Sample]
    """All of the set, also those that have no features."""
    labels: Labels[Value]

    @property
    def y(self) -> NDArray[Value]:
        """(N, L) labels, in the order of the features."""
        return self.labels.of(places_of(self.manifest, self.features))

    def labelled(self, labels_of: LabelReader[Other]) -> Half[Other]:
        """The same with what its samples say otherwise."""
        return Half(self.manifest, self.features, self.samples, labels_of(self.samples))

    def flat_pixels(self) -> NDArray[np.float32]:
        """(samples, H * W * 3) in [0, 1], in the order of `labels.values`."""
        pixels = read_pixels(self.samples, self.manifest.config["data"]["image_size_px"])
        return (pixels.reshape(len(pixels), -1) / 255.0).astype(np.float32)


def representations_of(
    train: Half[Value],
    test: Half[Value],
    timesteps: tuple[int, int] | None = None,
    *,
    pixels: bool = False,
) -> list[Representation[Value]]:
    """The whole feature first, then each subset alone, those of a range together, and raw pixels.

    Raises:
        ValueError: no subset has time-steps in that half-open range.
    """
    train_y, test_y = train.y, test.y
    train_x, test_x = train.features.values, test.features.values
    found = [
        Representation(name, train_x[:, dims], train_y, test_x[:, dims], test_y)
        for name, dims in subsets_of(train.features, timesteps)
    ]
    return [*found, raw_pixels(train, test)] if pixels else found


def raw_pixels(train: Half[Value], test: Half[Value]) -> Representation[Value]:
    """The images themselves."""
    before, after = train.labels.values, test.labels.values
    return Representation("raw pixels", train.flat_pixels(), before, test.flat_pixels(), after)


def read_halves(
    store: ObjectStore, train_url: str, test_url: str, labels_of: LabelReader[Value]
) -> tuple[Half[Value], Half[Value]]:
    """Features of two disjoint shard sets by one encoder, with the labels of their shards.

    Raises:
        ValueError: both come from the same shards, or from different encoders; the shards changed
            after the export; or labels are missing, or differ in their names.
    """
    train, test = (
        _half(store, each, labels_of) for each in open_halves(store, train_url, test_url)
    )
    if different := set(train.labels.names) ^ set(test.labels.names):
        raise ValueError(
            f"{train_url} and {test_url} come from shards with different labels: "
            f"{sorted(different)}"
        )
    return train, test


def read_half(store: ObjectStore, url: str, labels_of: LabelReader[Value]) -> Half[Value]:
    """One of them. Raises ValueError as `read_halves`."""
    return _half(store, open_features(url, store=store), labels_of)


def _half(store: ObjectStore, features: FeatureSet, labels_of: LabelReader[Value]) -> Half[Value]:
    samples = read_source(store, features.manifest)
    return Half(features.manifest, features.arrays(), samples, labels_of(samples))


def open_halves(store: ObjectStore, train_url: str, test_url: str) -> list[FeatureSet]:
    """The features to learn on and those to score on; raises as `read_halves`."""
    halves = [open_features(url, store=store) for url in (train_url, test_url)]
    train, test = (half.manifest for half in halves)
    if train.encoder_sha256 != test.encoder_sha256:
        raise ValueError(
            f"{train_url} ({train.checkpoint}) and {test_url} ({test.checkpoint}) were made by "
            f"different encoders; export both from one checkpoint"
        )
    if train.index_digest == test.index_digest:
        raise ValueError(
            f"{train_url} and {test_url} both come from {train.source_url}; a probe must be tested "
            f"on images that it has not seen: export a second split"
        )
    return halves
