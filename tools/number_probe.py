"""Numbers read from features by a linear probe: the paper's attribute regression.

Targets are standardised too, so that one strength suits all units.
"""

from dataclasses import dataclass

import numpy as np

from tools.representations import Representation
from tools.ridge import fit_ridge, standardised


@dataclass(frozen=True, slots=True)
class NumberResult:
    """How well each number is told, in the order of `numbers`."""

    name: str
    dims: int
    numbers: tuple[str, ...]
    pearson: tuple[float, ...]
    """Correlation r of the told and the true values, -1 to 1."""
    squared_error: tuple[float, ...]
    """Mean squared error in the number's own units."""
    unexplained: tuple[float, ...]
    """The same over the variance of the test half; 1 is what knowing the mean gives."""

    @property
    def mean_pearson(self) -> float:
        return float(np.mean(self.pearson))

    @property
    def mean_unexplained(self) -> float:
        return float(np.mean(self.unexplained))


def probe_numbers(
    representation: Representation[np.float64], numbers: tuple[str, ...]
) -> NumberResult:
    """Fit on the training half, score on the test half.

    Raises:
        ValueError: a number is the same for all samples of a half.
    """
    name, train_x, train_y, test_x, test_y = representation
    for half, values in (("train", train_y), ("test", test_y)):
        if still := [n for n, each in zip(numbers, values.T, strict=True) if np.ptp(each) == 0]:
            raise ValueError(
                f"numbers {still} have one value only in the {half} half of {len(values)} samples; "
                f"use more samples"
            )
    train_x, test_x = standardised(train_x, test_x)
    middle, scale = train_y.mean(axis=0), train_y.std(axis=0)
    told = fit_ridge(train_x, (train_y - middle) / scale).predict(test_x)
    told = told.reshape(test_y.shape) * scale + middle  # flat for one number
    error = np.mean((told - test_y) ** 2, axis=0)
    return NumberResult(
        name,
        train_x.shape[1],
        numbers,
        tuple(
            float(np.corrcoef(said, true)[0, 1])
            for said, true in zip(told.T, test_y.T, strict=True)
        ),
        tuple(error.tolist()),
        tuple((error / test_y.var(axis=0)).tolist()),
    )
