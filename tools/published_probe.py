"""The paper's own linear probe of attributes (METHOD section 8.1), with its weak points.

One linear layer on raw features, binary cross-entropy, Adam at one rate for `EPOCHS` epochs in the
order of the set; the epoch that is best on a validation set is scored on the test set. How large
the feature's numbers are changes what it finds, so it compares encoders less fairly than
`attribute_probe`. The published code also mirrors half of the training images; features are
exported once, unmirrored.

Letters: N samples, D dimensions, A attributes.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from tools.attribute_probe import ProbeResult, refuse_constant
from tools.representations import Representation

EPOCHS = 15
BATCH = 128
LEARNING_RATE = 1e-3
SEED = 0
"""Of the layer's first weights; the published code sets none."""


def published_probe(
    representation: Representation[np.int8],
    valid_x: NDArray[np.float32],
    valid_y: NDArray[np.int8],
    attributes: tuple[str, ...],
) -> ProbeResult:
    """Learn on the training half, choose the epoch on the validation set, score on the test half.

    Args:
        valid_x, valid_y: (N, D) features and (N, A) labels, 0 or 1.

    Raises:
        ValueError: an attribute has one value only in the validation or in the test half.
    """
    name, train_x, train_y, test_x, test_y = representation
    refuse_constant(valid_y, attributes, "the validation set")
    refuse_constant(test_y, attributes, "the test half")
    best, found = -1.0, ()
    for layer in _epochs(torch.from_numpy(train_x), torch.from_numpy(train_y)):
        precision = float(np.mean(_precision(layer, valid_x, valid_y)))
        if precision > best:
            best, found = precision, _precision(layer, test_x, test_y)
    return ProbeResult(name, train_x.shape[1], attributes, found)


def _epochs(x_ND: Tensor, y_NA: Tensor) -> Iterator[nn.Linear]:
    """The layer after each epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = nn.Linear(x_ND.shape[1], y_NA.shape[1])
    optimizer = torch.optim.Adam(layer.parameters(), LEARNING_RATE)
    for _ in range(EPOCHS):
        for x, y in zip(x_ND.split(BATCH), y_NA.split(BATCH), strict=True):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(layer(x), y.float()).backward()
            optimizer.step()
        yield layer


@torch.inference_mode()
def _precision(layer: nn.Linear, x: NDArray[np.float32], y: NDArray[np.int8]) -> tuple[float, ...]:
    scores = layer(torch.from_numpy(x)).numpy()
    pairs = zip(y.T, scores.T, strict=True)
    return tuple(float(average_precision_score(truth, score)) for truth, score in pairs)
