"""Two halves of labelled features: a probe learns on the first and is scored on the second."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipelines.feature_store import FeatureManifest, Features, FeatureSet, open_features
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_reader import Sample
from tools.labels import Labels, labels_of, places_of, read_pixels, read_source


@dataclass(frozen=True, slots=True)
class Half:
    """Features, and the shard set that they were exported from."""

    manifest: FeatureManifest
    features: Features
    samples: list[Sample]
    """All of the set, also those that have no features."""
    labels: Labels

    @property
    def attributes(self) -> tuple[str, ...]:
        return self.labels.names

    @property
    def y(self) -> NDArray[np.int8]:
        """(N, A) labels, 0 or 1, in the order of the features."""
        return self.labels.of(places_of(self.manifest, self.features))

    def flat_pixels(self) -> NDArray[np.float32]:
        """(samples, H * W * 3) in [0, 1], in the order of `labels.values`."""
        pixels = read_pixels(self.samples, self.manifest.config["data"]["image_size_px"])
        return (pixels.reshape(len(pixels), -1) / 255.0).astype(np.float32)


def read_halves(store: ObjectStore, train_url: str, test_url: str) -> tuple[Half, Half]:
    """Features of two disjoint shard sets by one encoder, with the labels of their shards.

    Raises:
        ValueError: both come from the same shards, or from different encoders; the shards changed
            after the export; or labels are missing, or differ in their names.
    """
    train, test = (_half(store, each) for each in open_halves(store, train_url, test_url))
    if different := set(train.attributes) ^ set(test.attributes):
        raise ValueError(
            f"{train_url} and {test_url} come from shards that are labelled with different "
            f"attributes: {sorted(different)}"
        )
    return train, test


def read_half(store: ObjectStore, url: str) -> Half:
    """One of them. Raises ValueError as `read_halves`."""
    return _half(store, open_features(url, store=store))


def _half(store: ObjectStore, features: FeatureSet) -> Half:
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
