"""Recognition of classes from features: by nearest neighbours, and by a linear classifier.

Both look at standardised features. Neighbours vote as in instance discrimination (Wu et al. 2018):
the `NEIGHBOURS` most alike by cosine, each with weight exp(cosine / TEMPERATURE). The linear one is
multinomial logistic regression; its strength is chosen on a part of the training half and not on
the test half.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from tools.representations import Representation
from tools.ridge import standardised

NEIGHBOURS = 20
TEMPERATURE = 0.07
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 5
"""One in so many training samples chooses the strength."""
MOST_STEPS = 200

Features = NDArray[np.float32]
Classes = NDArray[np.str_]
Classifier = Callable[[Features, Classes, Features], Classes]
"""(train_x, train_classes, test_x) -> what it says of the test half; features standardised."""


@dataclass(frozen=True, slots=True)
class ClassResult:
    """How often a classifier of one representation is right."""

    name: str
    dims: int
    accuracy: float
    balanced: float
    """The mean over the classes of the test half, however rare; 1 / classes is chance."""


def probe_classes(
    representation: Representation[np.str_], label: int, classify: Classifier
) -> ClassResult:
    """Learn on the training half, score on the test half.

    Args:
        label: which of the labels are the classes.

    Raises:
        ValueError: a half has one class only, or the test half has a class that training lacks.
    """
    name, train_x, train_y, test_x, test_y = representation
    train_classes, test_classes = train_y[:, label], test_y[:, label]
    _refuse_unfit(train_classes, test_classes)
    train_x, test_x = standardised(train_x, test_x)
    said = classify(train_x, train_classes, test_x)
    return ClassResult(
        name,
        train_x.shape[1],
        float(np.mean(said == test_classes)),
        float(balanced_accuracy_score(test_classes, said)),
    )


def by_neighbours(train_x: Features, train_classes: Classes, test_x: Features) -> Classes:
    """The vote of the nearest samples of the training half, of all where it has fewer."""
    weights: Any = _weights_of  # sklearn's types know its names for weights only
    number = min(NEIGHBOURS, len(train_x))
    neighbours = KNeighborsClassifier(number, metric="cosine", weights=weights)
    return neighbours.fit(train_x, train_classes).predict(test_x)


def _weights_of(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp((1 - distances) / TEMPERATURE)


def by_a_line(train_x: Features, train_classes: Classes, test_x: Features) -> Classes:
    """Logistic regression, of the strength that is best on every fifth sample."""
    held_out = np.arange(len(train_x)) % HELD_OUT == 0

    def score(strength: float) -> float:
        model = _logistic(train_x[~held_out], train_classes[~held_out], strength)
        return float(model.score(train_x[held_out], train_classes[held_out]))

    best = _logistic(train_x, train_classes, max(STRENGTHS, key=score))
    return np.asarray(best.predict(test_x), np.str_)


def _logistic(x: Features, classes: Classes, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough after so many steps
        return LogisticRegression(C=strength, max_iter=MOST_STEPS).fit(x, classes)


def _refuse_unfit(train_classes: Classes, test_classes: Classes) -> None:
    for half, classes in (("train", train_classes), ("test", test_classes)):
        if len(set(classes)) < 2:
            raise ValueError(
                f"all {len(classes)} samples of the {half} half are {str(classes[0])!r}; there is "
                f"nothing to tell apart: use more samples"
            )
    if unknown := sorted(set(test_classes.tolist()) - set(train_classes.tolist())):
        raise ValueError(
            f"the test half has the classes {', '.join(map(repr, unknown))}, of which the train "
            f"half has no example; use more samples"
        )
