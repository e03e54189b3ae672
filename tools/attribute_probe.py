"""Average precision of binary attributes read from features by a linear probe.

The probe is ridge regression in closed form on standardised features, its strength chosen per
attribute by leave-one-out error on the training half: no learning rate, no epochs, no seed, and no
advantage for a feature of larger scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from data_pipelines.feature_store import Features
from tools.representations import Representation, subsets_of
from tools.ridge import fit_ridge, signed, standardised


@dataclass(frozen=True, slots=True)
class WeightShares:
    """Of the squared weights of each attribute's probe, what lies in each subset."""

    subsets: tuple[str, ...]
    dims: tuple[int, ...]
    shares: dict[str, tuple[float, ...]]
    """By attribute, a share for each subset; they add up to 1."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Average precision per attribute, in the order of `attributes`."""

    name: str
    dims: int
    attributes: tuple[str, ...]
    average_precision: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.average_precision))

    def mean_over(self, attributes: list[str]) -> float:
        chosen = [
            ap
            for a, ap in zip(self.attributes, self.average_precision, strict=True)
            if a in attributes
        ]
        return float(np.mean(chosen))


def probe(representation: Representation[np.int8], attributes: tuple[str, ...]) -> ProbeResult:
    """Fit on the training half, score on the test half.

    Raises:
        ValueError: an attribute has only one value in one of the halves.
    """
    name, train_x, train_y, test_x, test_y = representation
    refuse_constant(train_y, attributes, "the train half")
    refuse_constant(test_y, attributes, "the test half")
    train_x, test_x = standardised(train_x, test_x)
    ridge = fit_ridge(train_x, signed(train_y))
    scores = ridge.predict(test_x).reshape(test_y.shape)  # flat for one attribute
    return ProbeResult(
        name,
        train_x.shape[1],
        attributes,
        tuple(
            float(average_precision_score(truth, score))
            for truth, score in zip(test_y.T, scores.T, strict=True)
        ),
    )


def refuse_constant(labels: NDArray[np.int8], attributes: tuple[str, ...], where: str) -> None:
    """Raises ValueError for attributes with one value only."""
    constant = [a for a, y in zip(attributes, labels.T, strict=True) if y.min() == y.max()]
    if constant:
        raise ValueError(
            f"attributes {constant} have one value only in {where} of {len(labels)} samples; use "
            f"more samples"
        )


def weight_shares(
    features: Features, y: NDArray[np.int8], attributes: tuple[str, ...]
) -> WeightShares:
    """Where the probes of whole features look; the paper's figure of classifier weights.

    Raises:
        ValueError: an attribute has only one value.
    """
    squares = squared_weights(features.values, y, attributes)
    _, *subsets = subsets_of(features)
    shares = np.stack([squares[dims].sum(axis=0) for _, dims in subsets], axis=1)
    return WeightShares(
        tuple(name for name, _ in subsets),
        tuple(dims.stop - dims.start for _, dims in subsets),
        dict(zip(attributes, map(tuple, shares.tolist()), strict=True)),
    )


def squared_weights(
    x: NDArray[np.float32], y: NDArray[np.int8], attributes: tuple[str, ...]
) -> NDArray[np.float64]:
    """(D, A): of each attribute's probe of standardised features; each column adds up to 1.

    Raises:
        ValueError: an attribute has only one value.
    """
    refuse_constant(y, attributes, "the set")
    x, _ = standardised(x, x[:0])
    weights = np.asarray(fit_ridge(x, signed(y)).coef_, np.float64)
    squares = weights.reshape(len(attributes), -1).T ** 2
    return squares / squares.sum(axis=0)
