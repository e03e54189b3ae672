"""The probe on features whose answer is known."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from data_pipelines.feature_layout import FeatureColumn
from data_pipelines.feature_store import Features
from tools.attribute_probe import ProbeResult, probe, weight_shares
from tools.representations import Representation, subsets_of

N = 400
PREVALENCE = (0.5, 0.2)
ATTRIBUTES = ("hat", "smiling")


def labels(seed: int, n: int = N) -> NDArray[np.int8]:
    """(n, 2), independent, of the two prevalences."""
    return (np.random.default_rng(seed).random((n, 2)) < PREVALENCE).astype(np.int8)


def noise(seed: int, dims: int, n: int = N) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, dims)).astype(np.float32)


TRAIN_Y, TEST_Y = labels(1), labels(2)
TRAIN_NOISE, TEST_NOISE = noise(3, 6), noise(4, 6)


def run_probe(train_x: NDArray[np.float32], test_x: NDArray[np.float32]) -> ProbeResult:
    return probe(Representation("tested", train_x, TRAIN_Y, test_x, TEST_Y), ATTRIBUTES)


def blurred(y: NDArray[np.int8], seed: int) -> NDArray[np.float32]:
    """Six dimensions of noise, two of which lean towards the labels."""
    x = noise(seed, 6)
    x[:, 2:4] += 1.5 * y
    return x


def features_of(x: NDArray[Any], columns: tuple[FeatureColumn, ...]) -> Features:
    keys = [str(row) for row in range(len(x))]
    rows = np.arange(len(x), dtype=np.int32)
    return Features(keys, ["s"] * len(x), rows, x.astype(np.float32), pa.table({}), columns)


def test_a_feature_that_holds_the_labels_is_read_perfectly():
    result = run_probe(np.c_[TRAIN_NOISE, TRAIN_Y], np.c_[TEST_NOISE, TEST_Y])
    assert result.average_precision == pytest.approx((1.0, 1.0))
    assert result.mean == pytest.approx(1.0)
    assert (result.name, result.dims, result.attributes) == ("tested", 8, ATTRIBUTES)


def test_a_feature_that_holds_the_labels_upside_down_is_read_as_well():
    result = run_probe(np.c_[TRAIN_NOISE, 1 - TRAIN_Y], np.c_[TEST_NOISE, 1 - TEST_Y])
    assert result.average_precision == pytest.approx((1.0, 1.0))


def test_noise_is_worth_about_the_share_of_positives():
    result = run_probe(TRAIN_NOISE, TEST_NOISE)
    assert result.average_precision == pytest.approx(tuple(TEST_Y.mean(axis=0)), abs=0.07)


def test_each_attribute_is_scored_by_itself():
    only_the_first = run_probe(np.c_[TRAIN_NOISE, TRAIN_Y[:, :1]], np.c_[TEST_NOISE, TEST_Y[:, :1]])
    assert only_the_first.average_precision[0] == pytest.approx(1.0)
    assert only_the_first.average_precision[1] == pytest.approx(TEST_Y[:, 1].mean(), abs=0.07)
    assert only_the_first.mean_over(["hat"]) == pytest.approx(1.0)
    assert only_the_first.mean_over(["smiling"]) == only_the_first.average_precision[1]


def test_one_attribute_alone_gets_the_same_score_as_among_others():
    train_x, test_x = blurred(TRAIN_Y, 5), blurred(TEST_Y, 6)
    both = run_probe(train_x, test_x)
    alone = probe(
        Representation("alone", train_x, TRAIN_Y[:, 1:], test_x, TEST_Y[:, 1:]), ATTRIBUTES[1:]
    )
    assert alone.average_precision == pytest.approx(both.average_precision[1:])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scale_and_place_of_the_features_do_not_matter(scale: float):
    train_x, test_x = blurred(TRAIN_Y, 5), blurred(TEST_Y, 6)
    result = run_probe(train_x, test_x)
    assert 0.6 < result.mean < 0.95, "neither perfect nor noise, so that a change would show"
    scales = np.array([scale, 1, 1, scale, 1 / scale, 1], np.float32)
    moved = run_probe(train_x * scales + 2 * scales, test_x * scales + 2 * scales)
    assert moved.average_precision == pytest.approx(result.average_precision, abs=2e-3)


def test_a_dimension_that_never_changes_does_no_harm():
    train_x, test_x = blurred(TRAIN_Y, 5), blurred(TEST_Y, 6)
    still = np.full((N, 1), 7.3, np.float32)
    with_it = run_probe(np.c_[train_x, still], np.c_[test_x, still])
    expected = run_probe(train_x, test_x).average_precision
    assert with_it.average_precision == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("half", ["train", "test"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_constant_attribute_is_refused_by_name_and_half(half: str, value: int):
    halves = {"train": TRAIN_Y.copy(), "test": TEST_Y.copy()}
    halves[half][:, 1] = value
    with pytest.raises(ValueError, match=rf"\['smiling'\] have one value only in the {half} half"):
        probe(
            Representation("x", TRAIN_NOISE, halves["train"], TEST_NOISE, halves["test"]),
            ATTRIBUTES,
        )


def test_the_whole_feature_comes_first_and_then_each_subset_alone():
    columns = (
        FeatureColumn("z002", (50, 200), (6, 12)),  # a selection: it need not start at z000
        FeatureColumn("z003", (200, 1000), (12, 14)),
    )

    assert subsets_of(features_of(noise(3, 8), columns)) == [
        ("all subsets", slice(0, 8)),
        ("z002: time-steps 50-200", slice(0, 6)),
        ("z003: time-steps 200-1000", slice(6, 8)),
    ]


def test_weights_lie_where_the_attribute_is():
    columns = (FeatureColumn("z000", (0, 100), (0, 2)), FeatureColumn("z001", (100, 1000), (2, 6)))
    found = weight_shares(features_of(blurred(TRAIN_Y, 5), columns), TRAIN_Y, ATTRIBUTES)
    assert found.subsets == ("z000: time-steps 0-100", "z001: time-steps 100-1000")
    assert found.dims == (2, 4)
    for shares in found.shares.values():
        assert sum(shares) == pytest.approx(1)
        assert shares[1] > 0.9
    only_smiling = TRAIN_Y * np.array([0, 1], np.int8)
    with pytest.raises(
        ValueError, match=r"\['hat'\] have one value only in the set of 400 samples"
    ):
        weight_shares(features_of(TRAIN_NOISE, columns), only_smiling, ATTRIBUTES)
