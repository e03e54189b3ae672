"""Which attributes can be read from features, and from which of their subsets."""

from dataclasses import replace

import numpy as np

from data_pipelines.object_store import ObjectStore
from tools.attribute_probe import ProbeResult, WeightShares, probe, weight_shares
from tools.labelled_features import (
    Half,
    open_halves,
    raw_pixels,
    read_half,
    read_halves,
    representations_of,
)
from tools.labels import attributes_of
from tools.published_probe import published_probe
from tools.representations import Representation, subsets_of


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
    train, test = read_halves(store, train_url, test_url, attributes_of)
    representations = representations_of(train, test)
    if untrained:
        representations.append(_untrained(store, untrained, train, test))
    if pixels:
        representations.append(raw_pixels(train, test))
    return [probe(each, train.labels.names) for each in representations]


def evaluate_as_published(
    store: ObjectStore, *, train_url: str, validation_url: str, test_url: str
) -> list[ProbeResult]:
    """The whole feature and each subset, probed as the paper does (METHOD section 8.1).

    Args:
        validation_url: features of a third shard set, by which the epoch is chosen.

    Raises:
        ValueError: as of `evaluate_attributes`, for any two of the three.
    """
    train, test = read_halves(store, train_url, test_url, attributes_of)
    _, valid = read_halves(store, train_url, validation_url, attributes_of)
    open_halves(store, validation_url, test_url)
    subsets = subsets_of(train.features)
    return [
        published_probe(each, valid.features.values[:, dims], valid.y, train.labels.names)
        for each, (_, dims) in zip(representations_of(train, test), subsets, strict=True)
    ]


def evaluate_weights(store: ObjectStore, url: str) -> WeightShares:
    """Which subsets the probes of labelled features lean on.

    Raises:
        ValueError: the shards changed after the export, labels are missing, or an attribute has
            one value only.
    """
    half = read_half(store, url, attributes_of)
    return weight_shares(half.features, half.y, half.labels.names)


def _untrained(
    store: ObjectStore, urls: tuple[str, str], train: Half[np.int8], test: Half[np.int8]
) -> Representation[np.int8]:
    """The same halves as the untrained encoder sees them.

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
    train = replace(train, manifest=first.manifest, features=first.arrays())
    test = replace(test, manifest=second.manifest, features=second.arrays())
    whole = representations_of(train, test)[0]
    return whole._replace(name="untrained encoder")
