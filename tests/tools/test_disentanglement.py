"""Scores of importances and of probes that can be worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.feature_layout import FeatureColumn
from data_pipelines.feature_store import Features
from tools.attribute_probe import ProbeResult
from tools.disentanglement import dci, disentanglement, leakage


def test_an_attribute_to_each_place_is_perfect() -> None:
    found = dci(np.diag([1.0, 2.0, 0.5]))
    assert (found.disentanglement, found.completeness) == pytest.approx((1, 1))


def test_everything_everywhere_is_worst() -> None:
    found = dci(np.ones((4, 3)))
    assert (found.disentanglement, found.completeness) == pytest.approx((0, 0), abs=1e-12)


def test_an_attribute_in_two_places_of_four_is_half_complete() -> None:
    """Its entropy is one bit of two; the places are its own, the two others are nobody's."""
    found = dci(np.array([[1.0, 0], [1, 0], [0, 1], [0, 0]]))
    assert found.disentanglement == pytest.approx(1)
    assert found.completeness == pytest.approx((0.5 + 1) / 2)


def test_a_place_of_two_attributes_counts_by_its_importance() -> None:
    """Place 0, with 2/3 of the importance, is shared in halves; place 1 has one attribute."""
    found = dci(np.array([[1.0, 1.0], [1.0, 0.0]]))
    assert found.disentanglement == pytest.approx(2 / 3 * 0 + 1 / 3 * 1)
    assert found.completeness == pytest.approx((0 + 1) / 2)


def test_a_single_place_holds_every_attribute_whole() -> None:
    found = dci(np.array([[1.0, 3.0]]))
    assert found.completeness == 1
    assert found.disentanglement == pytest.approx(1 - 0.811278, abs=1e-5)


def probed(name: str, *precision: float) -> ProbeResult:
    return ProbeResult(name, 1, ("hat", "smiling", "rare"), precision)


def test_leakage_is_the_share_of_what_the_whole_feature_tells_beyond_the_base_rate() -> None:
    probes = [
        probed("all", 0.9, 0.6, 0.14),
        probed("z000", 0.9, 0.2, 0.04),
        probed("z001", 0.3, 0.5, 0.05),
        probed("z002", 0.5, 0.1, 0.05),
    ]
    found = leakage(probes, np.array([0.5, 0.2, 0.1]))
    assert found.subsets == ("z000", "z001", "z002")
    assert found.attributes == ("hat", "smiling")
    assert found.untold == ("rare",)
    assert found.shares == pytest.approx(np.array([[1, -0.5, 0], [0, 0.75, -0.25]]))
    assert found.best == pytest.approx([1, 0.75])
    assert found.others == pytest.approx([-0.25, -0.125])


def test_leakage_of_one_subset_has_no_others() -> None:
    probes = [probed("all", 0.9, 0.6, 0.5), probed("z000", 0.9, 0.6, 0.5)]
    found = leakage(probes, np.array([0.5, 0.2, 0.1]))
    assert found.best == pytest.approx([1, 1, 1])
    assert found.others == pytest.approx([0, 0, 0])


def test_features_with_a_place_for_each_attribute_score_high_and_mixed_ones_low() -> None:
    columns = (FeatureColumn("z000", (0, 100), (0, 2)), FeatureColumn("z001", (100, 1000), (2, 4)))
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (400, 2)).astype(np.int8)
    noise = rng.normal(size=(400, 3))
    apart = np.c_[y[:, 0] + 0.1 * noise[:, 0], noise[:, 1], y[:, 1], noise[:, 2]]
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    base = y.mean(axis=0)
    probes = [ProbeResult(name, 4, ("a", "b"), (1.0, 1.0)) for name in ("all", "z000", "z001")]

    def score(x: np.ndarray):
        features = Features(
            ["k"] * 400, ["s"] * 400, np.arange(400, dtype=np.int32), x.astype(np.float32),
            pa.table({}), columns,
        )  # fmt: skip
        return disentanglement(features, y, probes, base)

    good, mixed = score(apart), score(apart @ turn)
    assert good.informativeness == 1
    for dim in ("by_dimension", "by_subset"):
        for what in ("disentanglement", "completeness"):
            assert getattr(getattr(good, dim), what) > 0.9
            assert getattr(getattr(mixed, dim), what) < 0.7
