"""Accuracy of a probe that learns from N examples of an attribute and N without it.

A few examples cannot tell what an attribute is from what goes along with it. So they may be drawn
so that another attribute, the shortcut, agrees with the wanted one in most of them; in the test it
does not. A feature that keeps the two apart, or a subset of it that lacks the shortcut (an
intervention on the others), is then right where the whole feature is misled.

Letters: N examples, D dimensions, A attributes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from tools.representations import Representation
from tools.ridge import fit_ridge, signed, standardised

Labels = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Shortcut:
    """An attribute that is like the wanted one in this share (0.5 to 1) of the few examples."""

    attribute: str
    share: float

    def __post_init__(self) -> None:
        if not 0.5 <= self.share <= 1:
            raise ValueError(f"the share of a shortcut must be from 0.5 to 1, not {self.share:g}")


@dataclass(frozen=True, slots=True)
class Task:
    """One attribute to learn, and which examples of the training half each draw learns from."""

    attribute: int
    draws: tuple[NDArray[np.intp], ...]


@dataclass(frozen=True, slots=True)
class FewShotResult:
    """Accuracy of one feature at one number of shots."""

    name: str
    dims: int
    shots: int
    attributes: tuple[str, ...]
    accuracy: NDArray[np.float64]
    """(draws, A): the mean over both values of the attribute, or over all four combinations with
    the shortcut's; 0.5 is chance."""

    @property
    def mean(self) -> float:
        return float(self.accuracy.mean())

    @property
    def spread(self) -> float:
        """Standard deviation, over the draws, of the mean over the attributes."""
        return float(self.accuracy.mean(axis=1).std(ddof=1)) if len(self.accuracy) > 1 else 0.0


def plan_tasks(
    labels: Labels,
    attributes: Sequence[str],
    *,
    shots: int,
    draws: int,
    seed: int = 0,
    shortcut: Shortcut | None = None,
) -> list[Task]:
    """The same examples for every feature, by attribute, draw, shots and seed alone.

    Attributes of which there are too few examples are left out, and so is the shortcut.

    Args:
        labels: (N, A) of the training half.
        shots: examples with the attribute, and as many without it.

    Raises:
        ValueError: no such shortcut, or no attribute is left.
    """
    if shortcut is not None and shortcut.attribute not in attributes:
        raise ValueError(
            f"there is no attribute {shortcut.attribute}; there are: {', '.join(attributes)}"
        )
    tasks = []
    for number, name in enumerate(attributes):
        if shortcut is not None and shortcut.attribute == name:
            continue
        pools = _pools(labels, attributes, number, shots, shortcut)
        if all(len(rows) >= wanted for rows, wanted in pools):
            keys = [[seed, shots, draw, zlib.crc32(name.encode())] for draw in range(draws)]
            tasks.append(Task(number, tuple(_draw(pools, key) for key in keys)))
    if not tasks:
        raise ValueError(
            f"no attribute has enough of the {len(labels)} training samples for {shots} shots; "
            f"export a larger set, or ask for fewer shots"
        )
    return tasks


def _pools(
    labels: Labels,
    attributes: Sequence[str],
    attribute: int,
    shots: int,
    shortcut: Shortcut | None,
) -> list[tuple[NDArray[np.intp], int]]:
    """Rows to draw from, and how many of them, for each value of the attribute."""
    y = labels[:, attribute]
    if shortcut is None:
        return [(np.flatnonzero(y == value), shots) for value in (0, 1)]
    other = labels[:, attributes.index(shortcut.attribute)]
    alike = round(shortcut.share * shots)
    return [
        (np.flatnonzero((y == value) & (other == (value if same else 1 - value))), wanted)
        for value in (0, 1)
        for same, wanted in ((True, alike), (False, shots - alike))
    ]


def _draw(pools: list[tuple[NDArray[np.intp], int]], key: list[int]) -> NDArray[np.intp]:
    generator = np.random.default_rng(key)
    return np.concatenate([generator.permutation(rows)[:wanted] for rows, wanted in pools])


def few_shot(
    representation: Representation[np.int8],
    tasks: Sequence[Task],
    attributes: Sequence[str],
    shortcut: Shortcut | None = None,
) -> FewShotResult:
    """Fit each draw of each task, score on the whole test half.

    The probe is that of `attribute_probe`: ridge regression, its strength chosen by leave-one-out
    error on the few examples. Features are standardised by the whole training half, without labels.

    Raises:
        ValueError: the test half lacks a value of an attribute, or a combination with the shortcut.
    """
    name, train_x, train_y, test_x, test_y = representation
    train_x, test_x = standardised(train_x, test_x)
    columns = []
    for task in tasks:
        groups = _groups(test_y, attributes, task.attribute, shortcut)
        y = train_y[:, task.attribute]
        columns.append([_accuracy(train_x[rows], y[rows], test_x, groups) for rows in task.draws])
    shots = len(tasks[0].draws[0]) // 2
    names = tuple(attributes[task.attribute] for task in tasks)
    return FewShotResult(name, train_x.shape[1], shots, names, np.array(columns).T)


def best_subset(results: Sequence[FewShotResult]) -> str:
    """Of the largest mean accuracy over the numbers of shots; one subset only is the feature."""
    whole, *subsets = dict.fromkeys(result.name for result in results)
    return max(subsets or [whole], key=lambda name: mean(r.mean for r in results if r.name == name))


def _groups(
    test_y: Labels, attributes: Sequence[str], attribute: int, shortcut: Shortcut | None
) -> list[tuple[bool, NDArray[np.intp]]]:
    """(whether the attribute is there, rows of the test half) for each group of equal weight."""
    y = test_y[:, attribute]
    other = np.zeros_like(y)
    if shortcut is not None:
        other = test_y[:, attributes.index(shortcut.attribute)]
    values = (0, 1) if shortcut is not None else (0,)
    groups = [
        (bool(value), np.flatnonzero((y == value) & (other == of_other)))
        for value in (0, 1)
        for of_other in values
    ]
    if any(len(rows) == 0 for _, rows in groups):
        beside = f" beside {shortcut.attribute}" if shortcut is not None else ""
        raise ValueError(
            f"the {len(test_y)} test samples do not have both values of "
            f"{attributes[attribute]}{beside}; export a larger set"
        )
    return groups


def _accuracy(
    x: NDArray[np.float32],
    y: Labels,
    test_x: NDArray[np.float32],
    groups: list[tuple[bool, NDArray[np.intp]]],
) -> float:
    said = fit_ridge(x, signed(y)).predict(test_x) > 0
    return float(np.mean([np.mean(said[rows] == there) for there, rows in groups]))
