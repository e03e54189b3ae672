"""`diti eval attributes` and `weights`: what can be read from features, and from which subset."""

from dataclasses import replace

from data_pipelines.object_store import ObjectStore
from tools.attribute_probe import (
    ProbeResult,
    WeightShares,
    probe,
    probe_features,
    weight_shares,
)
from tools.labelled_features import Half, open_halves, read_half, read_halves


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
    train, test = read_halves(store, train_url, test_url)
    others = _untrained(store, untrained, train, test) if untrained else None
    attributes = train.attributes
    results = probe_features(train.features, train.y, test.features, test.y, attributes)
    if others:
        before, after = others
        values = before.features.values, before.y, after.features.values, after.y
        results.append(probe("untrained encoder", *values, attributes))
    if pixels:
        values = train.flat_pixels(), train.labels.values, test.flat_pixels(), test.labels.values
        results.append(probe("raw pixels", *values, attributes))
    return results


def evaluate_weights(store: ObjectStore, url: str) -> WeightShares:
    """Which subsets the probes of labelled features lean on.

    Raises:
        ValueError: the shards changed after the export, labels are missing, or an attribute has
            one value only.
    """
    half = read_half(store, url)
    return weight_shares(half.features, half.y, half.attributes)


def _untrained(
    store: ObjectStore, urls: tuple[str, str], train: Half, test: Half
) -> tuple[Half, Half]:
    """The same halves with the features of the untrained encoder.

    Raises:
        ValueError: those come from other shards.
    """
    first, second = open_halves(store, *urls)
    for half, other in ((train, first.manifest), (test, second.manifest)):
        if half.manifest.index_digest != other.index_digest:
            raise ValueError(
                f"the untrained encoder's features come from other shards ({other.source_url}) "
                f"than the trained one's ({half.manifest.source_url}); export the same splits"
            )
    return (
        replace(train, manifest=first.manifest, features=first.arrays()),
        replace(test, manifest=second.manifest, features=second.arrays()),
    )
