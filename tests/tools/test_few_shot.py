"""Few-shot probes on features whose answer is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tools.few_shot import FewShotResult, Shortcut, few_shot, plan_tasks
from tools.representations import Representation

ATTRIBUTES = ("glasses", "rare", "male")
N = 1_000


def labels(seed: int) -> NDArray[np.int8]:
    """(N, 3), independent of each other."""
    return (np.random.default_rng(seed).random((N, 3)) < (0.5, 0.01, 0.5)).astype(np.int8)


TRAIN_Y, TEST_Y = labels(1), labels(2)
SHORTCUT = Shortcut("male", 1.0)


def feature(y: NDArray[np.int8], seed: int, **strengths: float) -> NDArray[np.float32]:
    """Eight dimensions: glasses lean on the first, male on the second, the rest is noise."""
    x = np.random.default_rng(seed).normal(size=(len(y), 8)).astype(np.float32)
    for dim, name in enumerate(("glasses", "male")):
        x[:, dim] += strengths.get(name, 0) * (2.0 * y[:, ATTRIBUTES.index(name)] - 1)
    return x


def run(
    shots: int, shortcut: Shortcut | None = None, dims: slice = slice(None), **strengths: float
):
    tasks = plan_tasks(TRAIN_Y, ATTRIBUTES, shots=shots, draws=10, shortcut=shortcut)
    train_x, test_x = feature(TRAIN_Y, 3, **strengths), feature(TEST_Y, 4, **strengths)
    tested = Representation("tested", train_x[:, dims], TRAIN_Y, test_x[:, dims], TEST_Y)
    return few_shot(tested, tasks, ATTRIBUTES, shortcut)


def of(result: FewShotResult, attribute: str) -> NDArray[np.float64]:
    return result.accuracy[:, result.attributes.index(attribute)]


def test_a_clear_feature_is_learnt_from_five_examples() -> None:
    result = run(5, glasses=5.0)
    assert of(result, "glasses").mean() > 0.95
    assert (result.name, result.dims, result.shots) == ("tested", 8, 5)
    assert result.accuracy.shape == (10, len(result.attributes))


def test_noise_is_at_chance() -> None:
    assert run(20).mean == pytest.approx(0.5, abs=0.03)


def test_more_examples_help_and_agree_more() -> None:
    few, many = run(5, glasses=1.0), run(50, glasses=1.0)
    assert of(few, "glasses").mean() + 0.05 < of(many, "glasses").mean()
    assert of(few, "glasses").std() > of(many, "glasses").std()
    assert few.mean == pytest.approx(few.accuracy.mean())
    assert few.spread == pytest.approx(few.accuracy.mean(axis=1).std(ddof=1))


def test_attributes_with_too_few_examples_are_left_out() -> None:
    assert run(5).attributes == ATTRIBUTES
    assert run(20).attributes == ("glasses", "male"), "of rare there are about ten"
    with pytest.raises(ValueError, match="no attribute has enough of the 1000"):
        run(501)


def test_a_shortcut_misleads_the_whole_feature_and_not_the_subset_that_lacks_it() -> None:
    """Both are equally clear in the feature, and in the few examples they are the same."""
    strengths = {"glasses": 2.0, "male": 2.0}
    fair, misled = run(20, **strengths), run(20, SHORTCUT, **strengths)
    intervened = run(20, SHORTCUT, slice(0, 1), **strengths)
    assert of(fair, "glasses").mean() > 0.95
    assert of(misled, "glasses").mean() < 0.85
    assert of(intervened, "glasses").mean() > 0.95
    assert "male" not in misled.attributes


def test_accuracy_under_a_shortcut_weighs_the_four_combinations_alike() -> None:
    """A feature that only tells male is right in half of them, whatever their numbers."""
    skewed = TEST_Y.copy()
    skewed[: N * 9 // 10, 2] = skewed[: N * 9 // 10, 0]
    halves = [y[:, [0, 2]] for y in (TRAIN_Y, skewed)]
    train_x, test_x = (feature(y, 5, male=9.0) for y in (TRAIN_Y, skewed))
    names = ("glasses", "male")
    tasks = plan_tasks(halves[0], names, shots=20, draws=2, shortcut=SHORTCUT)
    result = few_shot(
        Representation("male", train_x, halves[0], test_x, halves[1]), tasks, names, SHORTCUT
    )
    assert result.accuracy == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("share", "alike"), [(0.5, 5), (0.9, 9), (1.0, 10)])
def test_the_shortcut_agrees_in_its_share_of_the_examples(share: float, alike: int) -> None:
    [task] = plan_tasks(
        TRAIN_Y[:, [0, 2]],
        ("glasses", "male"),
        shots=10,
        draws=1,
        shortcut=Shortcut("male", share),
    )
    [rows] = task.draws
    assert len(set(rows.tolist())) == 20
    glasses, male = TRAIN_Y[rows, 0], TRAIN_Y[rows, 2]
    assert glasses.sum() == 10
    for value in (0, 1):
        assert (male[glasses == value] == value).sum() == alike


def test_draws_differ_and_come_again() -> None:
    def draws(seed: int) -> list[list[int]]:
        tasks = plan_tasks(TRAIN_Y, ATTRIBUTES, shots=5, draws=3, seed=seed)
        return [rows.tolist() for task in tasks for rows in task.draws]

    assert draws(0) == draws(0) != draws(1)
    assert len({tuple(rows) for rows in draws(0)}) == 9


def test_an_attribute_does_not_change_the_draws_of_another() -> None:
    both = plan_tasks(TRAIN_Y, ATTRIBUTES, shots=5, draws=2)
    alone = plan_tasks(TRAIN_Y[:, 2:], ATTRIBUTES[2:], shots=5, draws=2)
    for one, other in zip(both[2].draws, alone[0].draws, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 to 1, not 0\.4"):
        Shortcut("male", 0.4)
    with pytest.raises(ValueError, match="no attribute tall; there are: glasses, rare, male"):
        plan_tasks(TRAIN_Y, ATTRIBUTES, shots=5, draws=1, shortcut=Shortcut("tall", 0.9))
    tasks = plan_tasks(TRAIN_Y, ATTRIBUTES, shots=5, draws=1)
    x, y = feature(TEST_Y, 4)[:10], np.zeros((10, 3), np.int8)
    y[:5] = (1, 0, 1)
    with pytest.raises(ValueError, match="10 test samples do not have both values of rare"):
        few_shot(Representation("tested", feature(TRAIN_Y, 3), TRAIN_Y, x, y), tasks, ATTRIBUTES)
