"""Average precision of binary attributes read from features by a linear probe.

The probe is ridge regression in closed form on standardised features, its strength chosen per
attribute by leave-one-out error on the training half: no learning rate, no epochs, no seed, and no
advantage for a feature of larger scale.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.linear_model import RidgeCV
from sklearn.metrics import average_precision_score

from data_pipelines.feature_layout import FeatureColumn, select_columns
from data_pipelines.feature_store import Features

STRENGTHS = tuple(float(x) for x in np.logspace(0, 5, 11))


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


def probe(
    name: str,
    train_x: NDArray[np.float32],
    train_y: NDArray[np.int8],
    test_x: NDArray[np.float32],
    test_y: NDArray[np.int8],
    attributes: tuple[str, ...],
) -> ProbeResult:
    """Fit on the training half, score on the test half.

    Args:
        train_x, test_x: (N, D) features.
        train_y, test_y: (N, A) labels, 0 or 1.

    Raises:
        ValueError: an attribute has only one value in one of the halves.
    """
    refuse_constant(train_y, attributes, "the train half")
    refuse_constant(test_y, attributes, "the test half")
    train_x, test_x = standardised(train_x, test_x)
    ridge = fit_ridge(train_x, train_y)
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


def standardised(
    train_x: NDArray[np.float32], test_x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both by the mean and standard deviation of the training half."""
    mean, std = train_x.mean(axis=0), train_x.std(axis=0) + 1e-6
    return (train_x - mean) / std, (test_x - mean) / std


def fit_ridge(x: NDArray[np.float32], y: NDArray[np.int8]) -> RidgeCV:
    """On standardised features (N, D) and labels (N, A) or (N,) of 0 and 1, a strength for each."""
    ridge = RidgeCV(STRENGTHS, alpha_per_target=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # weak strengths on collinear pixels
        return ridge.fit(x, 2.0 * y - 1.0)


def weight_shares(
    features: Features, y: NDArray[np.int8], attributes: tuple[str, ...]
) -> WeightShares:
    """Where the probes of whole features look; the paper's figure of classifier weights.

    Raises:
        ValueError: an attribute has only one value.
    """
    refuse_constant(y, attributes, "the set")
    x, _ = standardised(features.values, features.values[:0])
    ridge = fit_ridge(x, y)
    squares = np.asarray(ridge.coef_, np.float64).reshape(len(attributes), -1) ** 2
    squares /= squares.sum(axis=1, keepdims=True)
    _, *subsets = subsets_of(features)
    shares = np.stack([squares[:, dims].sum(axis=1) for _, dims in subsets], axis=1)
    return WeightShares(
        tuple(name for name, _ in subsets),
        tuple(dims.stop - dims.start for _, dims in subsets),
        dict(zip(attributes, map(tuple, shares.tolist()), strict=True)),
    )


def probe_features(
    train: Features,
    train_y: NDArray[np.int8],
    test: Features,
    test_y: NDArray[np.int8],
    attributes: tuple[str, ...],
) -> list[ProbeResult]:
    """The whole feature first, then each of its subsets alone."""
    return [
        probe(name, train.values[:, dims], train_y, test.values[:, dims], test_y, attributes)
        for name, dims in subsets_of(train)
    ]


def subsets_of(
    features: Features, timesteps: tuple[int, int] | None = None
) -> list[tuple[str, slice]]:
    """Name and dimensions of the whole feature, of each subset, and of those in a range together.

    Raises:
        ValueError: no subset has time-steps in that half-open range.
    """
    columns = features.columns
    chosen: list[tuple[str, tuple[FeatureColumn, ...]]]
    chosen = [(column.name, (column,)) for column in columns]
    if timesteps is not None:
        some = select_columns(columns, timesteps)
        chosen.append((f"{some[0].name} to {some[-1].name}", some))
    first = columns[0].dims[0]
    subsets = [("all subsets", slice(0, columns[-1].dims[1] - first))]
    for name, some in chosen:
        start, end = some[0].timesteps[0], some[-1].timesteps[1]
        dims = slice(some[0].dims[0] - first, some[-1].dims[1] - first)
        subsets.append((f"{name}: time-steps {start}-{end}", dims))
    return subsets
