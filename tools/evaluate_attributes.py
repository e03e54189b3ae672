"""`diti eval attributes`: what can be read from features, beside what needs no training."""

import numpy as np
from numpy.typing import NDArray

from data_pipelines.feature_store import FeatureManifest, Features, open_features, read_manifest
from data_pipelines.object_store import ObjectStore
from tools.attribute_probe import ProbeResult, probe, probe_features
from tools.labels import Labels, labels_of, places_of, read_pixels, read_source


def evaluate_attributes(
    store: ObjectStore,
    *,
    train_url: str,
    test_url: str,
    untrained: tuple[str, str] | None = None,
    pixels: bool = True,
) -> list[ProbeResult]:
    """Probes of the whole feature, each subset, the untrained encoder's feature and raw pixels.

    Args:
        train_url, test_url: features of two disjoint shard sets; the probe learns on the first and
            is scored on the second. Labels are read from the shards that they were exported from.
        untrained: the same for the encoder before training.
        pixels: also probe the raw pixels of the same images.

    Raises:
        ValueError: both halves come from the same shards, or from different encoders; the shards
            changed after the export; or labels are missing or differ.
    """
    manifests = _read_halves(store, (train_url, test_url))
    untrained_manifests = _read_halves(store, untrained) if untrained else manifests
    for trained, other in zip(manifests, untrained_manifests, strict=True):
        if trained.index_digest != other.index_digest:
            raise ValueError(
                f"the untrained encoder's features come from other shards ({other.source_url}) "
                f"than the trained one's ({trained.source_url}); export the same splits"
            )
    samples = [read_source(store, manifest) for manifest in manifests]
    labels = [labels_of(half) for half in samples]
    halves = [open_features(url, store=store).arrays() for url in (train_url, test_url)]
    attributes = labels[0].names
    if attributes != labels[1].names:
        raise ValueError(
            f"{train_url} and {test_url} come from shards that are labelled with different "
            f"attributes: {sorted(set(attributes) ^ set(labels[1].names))}"
        )
    rows = _rows_of(labels, manifests, halves)
    results = probe_features(halves[0], rows[0], halves[1], rows[1], attributes)
    if untrained:
        others = [open_features(url, store=store).arrays() for url in untrained]
        rows = _rows_of(labels, untrained_manifests, others)
        values = [half.values for half in others]
        results.append(
            probe("untrained encoder", values[0], rows[0], values[1], rows[1], attributes)
        )
    if pixels:
        size_px = manifests[0].config["data"]["image_size_px"]
        flat = [read_pixels(half, size_px).reshape(len(half), -1) / 255.0 for half in samples]
        results.append(
            probe(
                "raw pixels",
                flat[0].astype("float32"),
                labels[0].values,
                flat[1].astype("float32"),
                labels[1].values,
                attributes,
            )
        )
    return results


def _rows_of(
    labels: list[Labels], manifests: list[FeatureManifest], halves: list[Features]
) -> list[NDArray[np.int8]]:
    """Labels of both halves in the order of their features."""
    return [
        each.of(places_of(manifest, half))
        for each, manifest, half in zip(labels, manifests, halves, strict=True)
    ]


def _read_halves(store: ObjectStore, urls: tuple[str, str]) -> list[FeatureManifest]:
    """Manifests of the features to learn on and of those to score on."""
    train, test = manifests = [read_manifest(store, url) for url in urls]
    if train.encoder_sha256 != test.encoder_sha256:
        raise ValueError(
            f"{urls[0]} ({train.checkpoint}) and {urls[1]} ({test.checkpoint}) were made by "
            f"different encoders; export both from one checkpoint"
        )
    if train.index_digest == test.index_digest:
        raise ValueError(
            f"{urls[0]} and {urls[1]} both come from {train.source_url}; a probe must be tested "
            f"on images that it has not seen: export a second split"
        )
    return manifests
