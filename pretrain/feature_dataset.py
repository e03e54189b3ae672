"""Exported features as a torch data set."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_pipelines.feature_store import Features, FeatureSet


class FeatureDataset(IterableDataset[dict[str, Any]]):
    """Samples of a feature set for a DataLoader, whose workers share its parts.

    Each is {"key": str, "shard": str, "row": int, "z": float32 (d,)}, with the d dimensions of the
    columns that `features` was opened for, of which only those are read; and, where fields of the
    samples' json were copied, "copied": {name: value}. A value that a sample did not have is None,
    which a DataLoader needs a `collate_fn` for. Parts come in the manifest's order, one in memory
    at a time.
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
            for key, shard, row, values, fields in zip(
                part.keys, part.shards, part.rows.tolist(), z, _copied_fields(part), strict=True
            ):
                yield {"key": key, "shard": shard, "row": row, "z": values} | fields


def _copied_fields(part: Features) -> list[dict[str, Any]]:
    if not part.copied.num_columns:
        return [{}] * len(part.keys)
    return [{"copied": fields} for fields in part.copied.to_pylist()]
