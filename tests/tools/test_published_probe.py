"""The paper's probe: what it does, and what it does wrong."""

import numpy as np
import pytest
import torch

from tools import published_probe as module
from tools.attribute_probe import probe
from tools.published_probe import published_probe
from tools.representations import Representation

NAMES = ("hat", "smiling")


def half(seed: int, n: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Two attributes, each leaning on a dimension of six."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 2)) < (0.5, 0.2)).astype(np.int8)
    x = rng.normal(size=(n, 6))
    x[:, 2:4] += 2 * y
    return x.astype(np.float32), y


TRAIN, VALID, TEST = half(1, n=12_000), half(2), half(3)


def run(scale: float = 1.0):
    (train_x, train_y), (valid_x, valid_y), (test_x, test_y) = TRAIN, VALID, TEST
    it = Representation("it", train_x * scale, train_y, test_x * scale, test_y)
    return published_probe(it, valid_x * scale, valid_y, NAMES)


def test_it_finds_what_the_closed_form_finds_where_numbers_are_of_size_one() -> None:
    result = run()
    assert (result.name, result.dims, result.attributes) == ("it", 6, NAMES)
    exact = probe(Representation("it", *TRAIN, *TEST), NAMES)
    assert result.average_precision == pytest.approx(exact.average_precision, abs=0.03)
    assert result == run(), "the same weights at the start, every time"


def test_features_of_small_numbers_are_told_worse_though_they_hold_the_same() -> None:
    assert run(1e-3).mean < run().mean - 0.03


def test_the_epoch_is_chosen_on_the_validation_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers given by hand, the one that is best on the validation set is scored on the test."""

    def layer(*weights: float) -> torch.nn.Linear:
        made = torch.nn.Linear(6, 2)
        with torch.no_grad():
            made.weight.zero_()
            made.weight[0, 2], made.weight[1, 3] = weights
        return made

    good, half_wrong, wrong = layer(1, 1), layer(1, -1), layer(-1, -1)
    for order in ([wrong, good, half_wrong], [good, half_wrong], [half_wrong, wrong, good]):
        monkeypatch.setattr(module, "_epochs", lambda x, y, order=order: iter(order))
        assert run().mean > 0.85


def test_attributes_of_one_value_are_refused() -> None:
    it = Representation("it", *TRAIN, *TEST)
    with pytest.raises(ValueError, match=r"\['smiling'\] have one value only in the validation"):
        published_probe(it, VALID[0], VALID[1] * np.array([1, 0], np.int8), NAMES)
