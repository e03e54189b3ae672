"""Where attributes lie in a feature: directions of linear classifiers, with and without a mask.

Letters: N samples, D = latent_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.partition import Partition
from tools.attribute_probe import probe
from tools.counterfactual_pairs import Labelled
from tools.denoising import encode
from tools.probmask import train_probmask
from tools.representations import Representation
from tools.ridge import fit_ridge, signed, standardised

KEPT_SHARE = 8
"""ProbMask keeps one dimension in so many; the paper 16, 32 or 128 of 512."""
EVERYTHING = "all dimensions"


@dataclass(frozen=True, slots=True)
class Direction:
    """Where an attribute lies in the feature, and how well few dimensions tell it."""

    attribute: str
    weight_D: Tensor
    """Of a linear classifier of standardised features."""
    masked_D: Tensor
    """Of one that learnt which dimensions to keep; 0 elsewhere."""
    mean_D: Tensor
    std_D: Tensor
    precision: dict[str, float]
    """Average precision on the other half of the labelled images, by a probe of all dimensions, of
    those that ProbMask keeps, and of as many that have the largest weights."""
    kept: dict[str, int]
    """Dimensions that ProbMask keeps, by subset."""


def directions_of(model: DiTi, labelled: Labelled, attributes: Sequence[str]) -> list[Direction]:
    """Learnt on every other labelled image, scored on the rest.

    Raises:
        ValueError: an attribute has one value only in a half, or is not among the labels.
    """
    if unknown := [name for name in attributes if name not in labelled.names]:
        raise ValueError(
            f"the pairs differ in {unknown[0]}, of which the labelled set says nothing; it has "
            f"{', '.join(labelled.names)}"
        )
    z = encode(model, labelled.images).numpy()
    return [
        direction_of(model.partition, z, labelled.labels[:, labelled.names.index(name)], name)
        for name in attributes
    ]


def direction_of(
    partition: Partition, z_ND: NDArray[np.float32], y_N: NDArray[np.int8], attribute: str
) -> Direction:
    """Learnt on every other row of features and labels, scored on the rest.

    Raises:
        ValueError: the attribute has one value only in a half.
    """
    train, test, y, test_y = z_ND[::2], z_ND[1::2], y_N[::2], y_N[1::2]
    num_kept = max(1, z_ND.shape[1] // KEPT_SHARE)
    whole = Representation(EVERYTHING, train, y[:, None], test, test_y[:, None])
    x, _ = standardised(train, test)
    weight = np.asarray(fit_ridge(x, signed(y)).coef_, np.float32).reshape(-1)
    found = train_probmask(torch.from_numpy(x), torch.from_numpy(y), num_kept=num_kept)
    largest = np.abs(weight).argsort()[::-1][:num_kept]
    kept = np.flatnonzero(found.mask_D.numpy())
    fewer = [
        whole._replace(name=name, train_x=train[:, dims], test_x=test[:, dims])
        for name, dims in (("ProbMask", kept), ("largest weights", largest))
    ]
    return Direction(
        attribute=attribute,
        weight_D=torch.from_numpy(weight),
        masked_D=found.weight_D,
        mean_D=torch.from_numpy(train.mean(axis=0)),
        std_D=torch.from_numpy(train.std(axis=0)),
        precision={each.name: probe(each, (attribute,)).mean for each in (whole, *fewer)},
        kept={
            subset.name: int(found.mask_D[slice(*subset.dims)].sum())
            for subset in partition.subsets
        },
    )
