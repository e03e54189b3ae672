"""Does each attribute live in a place of its own? Disentanglement scores of features.

DCI (Eastwood and Williams 2018) of an importance matrix R, here the squared weights of each
attribute's linear probe: a dimension is *disentangled* where it matters to one attribute only, an
attribute is *complete* where one dimension tells it. And leakage: what each subset alone tells of
an attribute, as a share of what the whole feature tells. Written here because no maintained
package has DCI for given features.

Letters: P places (dimensions or subsets), A attributes, S subsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipelines.feature_store import Features
from tools.attribute_probe import ProbeResult, squared_weights
from tools.representations import subsets_of

LEAST_GAIN = 0.05
"""Average precision above the base rate, from which on an attribute counts as told."""


@dataclass(frozen=True, slots=True)
class Dci:
    """Both from 0 to 1, where 1 is best."""

    disentanglement: float
    completeness: float


@dataclass(frozen=True, slots=True)
class Leakage:
    """Of what the whole feature tells of an attribute beyond its base rate, what a subset tells."""

    subsets: tuple[str, ...]
    attributes: tuple[str, ...]
    shares: NDArray[np.float64]
    """(A, S); below 0 where a subset tells less than nothing."""
    untold: tuple[str, ...]
    """Left out: the whole feature tells next to nothing of them, and shares of that are noise."""

    @property
    def best(self) -> NDArray[np.float64]:
        """(A,): the share of each attribute's best subset."""
        return self.shares.max(axis=1)

    @property
    def others(self) -> NDArray[np.float64]:
        """(A,): the mean share of the other subsets; 0 if there are none."""
        count = self.shares.shape[1] - 1
        return (self.shares.sum(axis=1) - self.best) / max(1, count)


@dataclass(frozen=True, slots=True)
class Disentanglement:
    """All that is known of where the attributes live."""

    by_dimension: Dci
    by_subset: Dci
    informativeness: float
    """Mean average precision of the whole feature."""
    leakage: Leakage


def dci(importance_PA: NDArray[np.float64]) -> Dci:
    """Of a matrix of importances, none negative.

    D = sum_p rho_p (1 - H_A(R_p / sum_a R_pa)) with rho_p = sum_a R_pa / sum R, and
    C = mean_a (1 - H_P(R_a / sum_p R_pa)); H_n is entropy to the base n. With one place or one
    attribute only, there is nothing to share, and the score is 1.
    """
    mass_P, mass_A = importance_PA.sum(axis=1), importance_PA.sum(axis=0)
    disentangled = 1 - _entropy(importance_PA.T, mass_P)
    complete = 1 - _entropy(importance_PA, mass_A)
    return Dci(
        float((disentangled * mass_P).sum() / mass_P.sum()),
        float(complete.mean()),
    )


def _entropy(shares: NDArray[np.float64], mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each column, to the base of its length."""
    if len(shares) == 1:
        return np.zeros(shares.shape[1])
    parts = shares / np.where(mass > 0, mass, 1)
    logs = np.log(np.where(parts > 0, parts, 1))
    return -(parts * logs).sum(axis=0) / np.log(len(shares))


def leakage(probes: Sequence[ProbeResult], base_rate_A: NDArray[np.float64]) -> Leakage:
    """Of the probes of the whole feature and of each subset.

    Args:
        base_rate_A: share of the test half that has the attribute: the precision of knowing
            nothing.
    """
    whole, *subsets = probes
    gain = np.array(whole.average_precision) - base_rate_A
    parts = np.array([subset.average_precision for subset in subsets]) - base_rate_A
    told = gain > LEAST_GAIN
    return Leakage(
        tuple(subset.name for subset in subsets),
        tuple(name for name, is_told in zip(whole.attributes, told, strict=True) if is_told),
        (parts[:, told] / gain[told]).T,
        tuple(name for name, is_told in zip(whole.attributes, told, strict=True) if not is_told),
    )


def disentanglement(
    features: Features,
    y: NDArray[np.int8],
    probes: Sequence[ProbeResult],
    base_rate_A: NDArray[np.float64],
) -> Disentanglement:
    """Of labelled features, whose probes were scored on another half.

    Args:
        y: (N, A) labels of these features, 0 or 1.
        probes, base_rate_A: as of `leakage`.

    Raises:
        ValueError: an attribute has one value only.
    """
    weights_DA = squared_weights(features.values, y, probes[0].attributes)
    _, *subsets = subsets_of(features)
    weights_SA = np.stack([weights_DA[dims].sum(axis=0) for _, dims in subsets])
    return Disentanglement(
        dci(weights_DA), dci(weights_SA), probes[0].mean, leakage(probes, base_rate_A)
    )
