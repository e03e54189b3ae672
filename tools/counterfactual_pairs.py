"""Shard sets that counterfactuals are judged by: pairs of images, and labelled ones.

Letters: B batch, A attributes, C channels, H height, W width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.object_store import ObjectStore, absolute
from data_pipelines.sample_reader import Sample
from data_pipelines.shard_index import read_index
from tools.counterfactual import changed_pixels
from tools.denoising import to_unit
from tools.labels import attributes_of, iter_samples, read_pixels

LABELLED_IMAGES = 2048


@dataclass(frozen=True, slots=True)
class Pairs:
    """Images in [-1, 1], BCHW: `b` is `a` with one attribute changed."""

    attribute: str
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images in [-1, 1], BCHW, with labels (B, A)."""

    images: Tensor
    names: tuple[str, ...]
    labels: NDArray[np.int8]


def read_pairs(store: ObjectStore, url: str, count: int, size_px: int) -> Pairs:
    """The first `count` pairs of a shard set.

    Raises:
        ValueError: the set has fewer, its rows are no pairs that differ in one attribute, or no
            difference can be seen.
    """
    index = read_index(store, absolute(url))
    if index.num_samples < 2 * count:
        raise ValueError(
            f"{url} has {index.num_samples // 2} pairs, {count} were asked for; lower --count"
        )
    samples = list(islice(iter_samples(store, index), 2 * count))
    said = [_pair_in(sample) for sample in samples]
    attributes = {attribute for attribute, _ in said}
    if len(attributes) > 1:
        raise ValueError(
            f"the pairs of {url} differ in {', '.join(sorted(attributes))}; give a shard set "
            f"of its own for each attribute"
        )
    for row in range(0, len(said), 2):
        if said[row] != said[row + 1]:
            raise ValueError(
                f"rows {row} and {row + 1} of {url} are no pair: their json says they belong to "
                f"pairs {said[row][1]} and {said[row + 1][1]}"
            )
    images = to_unit(read_pixels(samples, size_px))
    a, b = images[::2], images[1::2]
    visible = changed_pixels(a / 2, b / 2).flatten(1).any(dim=1)
    if not (visible[::2].any() and visible[1::2].any()):
        raise ValueError(
            f"the two images of a pair of {url} look the same: no pixel differs by a tenth of "
            f"black to white; there is nothing to reach"
        )
    return Pairs(attributes.pop(), a, b)


def read_labelled(
    store: ObjectStore, url: str, pairs_urls: Sequence[str], size_px: int
) -> Labelled:
    """The first LABELLED_IMAGES of a shard set.

    Raises:
        ValueError: labels are missing or differ, or the set is one of the pairs.
    """
    index = read_index(store, absolute(url))
    if index.digest in {read_index(store, absolute(each)).digest for each in pairs_urls}:
        raise ValueError(
            f"--labelled {url} holds the pairs themselves; classifiers must not be learnt on the "
            f"images that they judge: give another shard set"
        )
    samples = list(islice(iter_samples(store, index), LABELLED_IMAGES))
    labels = attributes_of(samples)
    return Labelled(to_unit(read_pixels(samples, size_px)), labels.names, labels.values)


def _pair_in(sample: Sample) -> tuple[str, int]:
    """Attribute and number of the pair that a sample belongs to, from its json."""
    try:
        pair = json.loads(sample["json"])["pair"]
        attribute, number = pair["attribute"], pair["index"]
        if not isinstance(attribute, str) or not isinstance(number, int):
            raise ValueError(f"attribute {attribute!r}, index {number!r}")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"sample {sample['__key__']} of {sample['__url__']} belongs to no pair "
            f"({type(error).__name__}: {error}); `diti data make avatars` draws pairs with --pairs"
        ) from error
    return attribute, number
