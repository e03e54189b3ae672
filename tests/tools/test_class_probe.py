"""Recognition of classes on points whose classes are known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tools.class_probe import ClassResult, by_a_line, by_neighbours, probe_classes
from tools.representations import Representation

NAMES = np.array(["cat", "dog", "owl"])
CENTRES = np.array([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]], np.float32)
CLASSIFIERS = pytest.mark.parametrize("classify", [by_neighbours, by_a_line])


def half(seed: int, n: int = 300) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Points (n, 4) around the centre of their class, and two labels each, of which the second is
    the class."""
    rng = np.random.default_rng(seed)
    number = rng.permutation(n) % 3
    x = CENTRES[number] + rng.normal(size=(n, 4)).astype(np.float32)
    return x.astype(np.float32), np.stack([rng.permutation(NAMES[number]), NAMES[number]], axis=1)


TRAIN_X, TRAIN_Y = half(1)
TEST_X, TEST_Y = half(2)


def run(classify, train_x=TRAIN_X, train_y=TRAIN_Y, test_x=TEST_X, test_y=TEST_Y) -> ClassResult:
    return probe_classes(Representation("it", train_x, train_y, test_x, test_y), 1, classify)


@CLASSIFIERS
def test_classes_that_lie_apart_are_told(classify) -> None:
    result = run(classify)
    assert (result.name, result.dims) == ("it", 4)
    assert result.accuracy > 0.97
    assert result.balanced == pytest.approx(result.accuracy, abs=0.01)


@CLASSIFIERS
def test_noise_is_worth_chance(classify) -> None:
    rng = np.random.default_rng(3)
    train_x, test_x = (rng.normal(size=(300, 4)).astype(np.float32) for _ in range(2))
    assert run(classify, train_x=train_x, test_x=test_x).accuracy == pytest.approx(1 / 3, abs=0.08)


@CLASSIFIERS
def test_the_unit_of_a_dimension_does_not_matter(classify) -> None:
    unit = np.array([1, 1000, 0.001, 1], np.float32)
    scaled = run(classify, train_x=TRAIN_X * unit, test_x=TEST_X * unit)
    # The thousandth is not exact: the divisor of a dimension that never changes must not be 0.
    assert scaled.accuracy == pytest.approx(run(classify).accuracy, abs=0.01)


@CLASSIFIERS
def test_a_rare_class_counts_as_much_as_a_frequent_one_in_the_balanced_mean(classify) -> None:
    some = np.flatnonzero((TRAIN_Y[:, 1] != "owl") | (np.arange(300) > 285))
    blind = np.zeros_like(TRAIN_X)
    result = run(classify, blind[some], TRAIN_Y[some], np.zeros_like(TEST_X), TEST_Y)
    assert result.balanced == pytest.approx(1 / 3)


def test_the_nearest_neighbours_have_more_say_than_the_many() -> None:
    """Two owls beside the point outvote eighteen dogs that lie at a right angle to it."""
    dogs = np.tile(np.array([[-1.0, 1.0]], np.float32), (18, 1))
    owls = np.tile(np.array([[1.0, 1.0]], np.float32), (2, 1))
    said = by_neighbours(
        np.r_[dogs, owls], np.array(["dog"] * 18 + ["owl"] * 2), np.array([[1, 1]], np.float32)
    )
    assert said.tolist() == ["owl"]


def test_a_linear_classifier_of_many_noisy_dimensions_is_held_back() -> None:
    """With 300 dimensions of noise a free fit of 300 points would know them by heart."""
    rng = np.random.default_rng(4)
    noise = [3 * rng.normal(size=(300, 300)).astype(np.float32) for _ in range(2)]
    result = run(by_a_line, np.c_[TRAIN_X, noise[0]], TRAIN_Y, np.c_[TEST_X, noise[1]], TEST_Y)
    assert result.accuracy > 0.7


def test_what_cannot_be_scored_is_refused() -> None:
    one = np.full_like(TRAIN_Y, "owl")
    with pytest.raises(ValueError, match="all 300 samples of the train half are 'owl'"):
        run(by_a_line, train_y=one)
    with pytest.raises(ValueError, match="all 300 samples of the test half are 'owl'"):
        run(by_a_line, test_y=one)
    known = TRAIN_Y[:, 1] != "owl"
    with pytest.raises(ValueError, match="the test half has the classes 'owl', of which"):
        run(by_a_line, TRAIN_X[known], TRAIN_Y[known])
