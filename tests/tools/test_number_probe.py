"""Numbers read from features that hold them, partly hold them, or do not."""

import numpy as np
import pytest

from tools.number_probe import NumberResult, probe_numbers
from tools.representations import Representation

N = 500
UNITS = np.array([0.01, 100.0])
PLACE = np.array([5.0, -300.0])


def half(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers in units of their own, and features that are these numbers with noise."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(N, 2))
    x = np.c_[drawn + noise * rng.normal(size=(N, 2)), rng.normal(size=(N, 3))]
    return x.astype(np.float32), drawn * UNITS + PLACE


def run(noise: float) -> NumberResult:
    train_x, train_y = half(1, noise)
    test_x, test_y = half(2, noise)
    return probe_numbers(Representation("it", train_x, train_y, test_x, test_y), ("size", "hue"))


def test_a_feature_that_holds_the_numbers_tells_them_in_their_own_units() -> None:
    result = run(0.0)
    assert (result.name, result.dims, result.numbers) == ("it", 5, ("size", "hue"))
    assert result.pearson == pytest.approx((1, 1), abs=1e-4)
    assert np.all(np.array(result.squared_error) < 1e-3 * UNITS**2)


def test_noise_as_strong_as_the_number_leaves_half_of_its_variance() -> None:
    result = run(1.0)
    assert result.pearson == pytest.approx((0.5**0.5,) * 2, abs=0.06)
    assert result.unexplained == pytest.approx((0.5, 0.5), abs=0.08)
    assert result.squared_error == pytest.approx(tuple(0.5 * UNITS**2), rel=0.2)
    assert result.mean_pearson == pytest.approx(np.mean(result.pearson))
    assert result.mean_unexplained == pytest.approx(np.mean(result.unexplained))


def test_noise_tells_nothing() -> None:
    result = run(1e6)
    assert result.pearson == pytest.approx((0, 0), abs=0.15)
    assert result.unexplained == pytest.approx((1, 1), abs=0.05)


def test_one_number_alone_is_told_as_among_others() -> None:
    (train_x, train_y), (test_x, test_y) = half(1, 0.5), half(2, 0.5)
    alone = Representation("it", train_x, train_y[:, 1:], test_x, test_y[:, 1:])
    assert probe_numbers(alone, ("hue",)).pearson[0] == pytest.approx(run(0.5).pearson[1])


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_number_that_never_changes_is_refused(where: str) -> None:
    halves = {"train": half(1, 0.0), "test": half(2, 0.0)}
    halves[where][1][:, 0] = 3
    (train_x, train_y), (test_x, test_y) = halves.values()
    with pytest.raises(ValueError, match=rf"\['size'\] have one value only in the {where} half"):
        probe_numbers(Representation("it", train_x, train_y, test_x, test_y), ("size", "hue"))
