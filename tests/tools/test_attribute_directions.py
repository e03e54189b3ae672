"""Directions of attributes in a feature whose informative dimensions are known."""

import numpy as np
import pytest

from pretrain.partition import Partition
from tools.attribute_directions import EVERYTHING, direction_of

PARTITION = Partition((100, 400, 1000), (8, 16, 24))


def test_a_direction_points_at_the_attribute_and_its_mask_says_in_which_subset_it_lies():
    rng = np.random.default_rng(0)
    y = (rng.random(800) < 0.5).astype(np.int8)
    z = rng.normal(size=(800, 24)).astype(np.float32)
    z[:, 9:12] += 2.0 * y[:, None]
    z = 5 + 3 * z  # as features are: neither centred nor of one scale
    found = direction_of(PARTITION, z, y, "hat")
    assert found.kept == {"z000": 0, "z001": 3, "z002": 0}  # one in eight of 24
    assert found.masked_D.nonzero().flatten().tolist() == [9, 10, 11]
    assert found.weight_D.argsort(descending=True)[:3].sort().values.tolist() == [9, 10, 11]
    assert found.mean_D.numpy() == pytest.approx(z[::2].mean(axis=0))
    assert found.std_D.numpy() == pytest.approx(z[::2].std(axis=0))
    assert list(found.precision) == [EVERYTHING, "ProbMask", "largest weights"]
    assert found.precision["ProbMask"] > 0.9


def test_precision_is_of_images_that_nothing_was_learnt_on():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(60, 24)).astype(np.float32)
    y = np.tile([0, 1, 1, 0], 15).astype(np.int8)
    found = direction_of(PARTITION, z, y, "nothing")
    assert all(precision < 0.8 for precision in found.precision.values())


def test_an_attribute_of_one_value_is_refused():
    with pytest.raises(ValueError, match="have one value only"):
        direction_of(PARTITION, np.ones((8, 24), np.float32), np.ones(8, np.int8), "hat")
