"""Ridge regression in closed form: what every linear probe here is fitted by.

Letters: N samples, D dimensions, T targets.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.linear_model import RidgeCV

STRENGTHS = tuple(float(x) for x in np.logspace(0, 5, 11))


def standardised(
    train_x: NDArray[np.float32], test_x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both by the mean and standard deviation of the training half."""
    mean, std = train_x.mean(axis=0), train_x.std(axis=0) + 1e-6
    return (train_x - mean) / std, (test_x - mean) / std


def signed(labels: NDArray[np.int8]) -> NDArray[np.float64]:
    """0 and 1 as -1 and 1, so that what is told is right where it has the sign."""
    return labels.astype(np.float64) * 2 - 1


def fit_ridge(x: NDArray[np.float32], targets: NDArray[Any]) -> RidgeCV:
    """On standardised features (N, D) and targets (N, T) or (N,); for each target the strength of
    least leave-one-out error."""
    ridge = RidgeCV(STRENGTHS, alpha_per_target=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # weak strengths on collinear pixels
        return ridge.fit(x, targets)
