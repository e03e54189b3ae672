"""Exported features as a torch data set."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_pipelines.feature_store import FeatureSet


class FeatureDataset(IterableDataset[dict[str, Any]]):
    """Samples of a feature set for a DataLoader, whose workers share its parts.

    Each is {"key": str, "shard": str, "row": int, "z": float32 (d,)}, with the d dimensions of the
    columns that `features` was opened for; only those are read. Parts come in the manifest's order,
    one in memory at a time.
    """

    def __init__(self, features: FeatureSet) -> None:
        self._features = features

    def __len__(self) -> int:
        return self._features.manifest.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for name in islice(self._features.manifest.parts, first, None, step):
            part = self._features.part(name)
            z = torch.from_numpy(part.values)
            for key, shard, row, values in zip(
                part.keys, part.shards, part.rows.tolist(), z, strict=True
            ):
                yield {"key": key, "shard": shard, "row": row, "z": values}
