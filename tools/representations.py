"""What a probe may look at: the whole feature, one subset, raw pixels.

Letters: N samples, D dimensions, L labels.
"""

from typing import Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.feature_layout import FeatureColumn, select_columns
from data_pipelines.feature_store import Features
from tools.labels import Value


class Representation(NamedTuple, Generic[Value]):
    """What the images of both halves look like to a probe, and their labels."""

    name: str
    train_x: NDArray[np.float32]
    """(N, D)."""
    train_y: NDArray[Value]
    """(N, L)."""
    test_x: NDArray[np.float32]
    test_y: NDArray[Value]


def subsets_of(
    features: Features, timesteps: tuple[int, int] | None = None
) -> list[tuple[str, slice]]:
    """Name and dimensions of the whole feature, of each subset, and of those in a range together.

    Raises:
        ValueError: no subset has time-steps in that half-open range.
    """
    columns = features.columns
    chosen: list[tuple[str, tuple[FeatureColumn, ...]]]
    chosen = [(column.name, (column,)) for column in columns]
    if timesteps is not None:
        some = select_columns(columns, timesteps)
        chosen.append((f"{some[0].name} to {some[-1].name}", some))
    first = columns[0].dims[0]
    subsets = [("all subsets", slice(0, columns[-1].dims[1] - first))]
    for name, some in chosen:
        start, end = some[0].timesteps[0], some[-1].timesteps[1]
        dims = slice(some[0].dims[0] - first, some[-1].dims[1] - first)
        subsets.append((f"{name}: time-steps {start}-{end}", dims))
    return subsets
