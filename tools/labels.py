"""Labels of a shard set: what each sample's json says under `attributes`."""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_stream import Sample, decode_sample, member_sample
from data_pipelines.shard_index import ShardIndex, read_index, read_members


@dataclass(frozen=True, slots=True)
class Labels:
    """Binary attributes of a shard set, a row per sample, in the order of `keys`."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    values: NDArray[np.int8]
    """(samples, attributes), 0 or 1."""

    def of(self, keys: list[str]) -> NDArray[np.int8]:
        """Rows in the order of `keys`.

        Raises:
            ValueError: a key has no labels: features and labels are of different shard sets.
        """
        row_of = {key: row for row, key in enumerate(self.keys)}
        unknown = [key for key in keys if key not in row_of]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(keys)} features have no labels, for example key "
                f"{unknown[0]}; the shards changed after the export: export again"
            )
        return self.values[[row_of[key] for key in keys]]


def read_samples(store: ObjectStore, index: ShardIndex) -> list[Sample]:
    """Every raw sample of a shard set, in order; for sets that fit in memory."""
    samples = []
    for shard in index.shards:
        url = join(index.url, shard.name)
        table, tar = read_members(store, index, shard), store.read(url)
        samples += [member_sample(table, row, url, tar, 0) for row in range(shard.num_samples)]
    return samples


def read_labels(store: ObjectStore, shards_url: str) -> Labels:
    """Labels of every sample at `shards_url`.

    Raises:
        ValueError: a sample has no json, no `attributes` of 0 and 1 in it, or others than the rest.
    """
    return labels_of(read_samples(store, read_index(store, shards_url)))


def labels_of(samples: list[Sample]) -> Labels:
    """Labels of raw samples; see `read_labels`."""
    names = tuple(sorted(_attributes(samples[0])))
    rows = []
    for sample in samples:
        attributes = _attributes(sample)
        if different := attributes.keys() ^ set(names):
            raise ValueError(
                f"sample {sample['__key__']} of {sample['__url__']} and the first sample do not "
                f"both have the attributes {sorted(different)}; label every sample alike"
            )
        rows.append([attributes[name] for name in names])
    keys = tuple(sample["__key__"] for sample in samples)
    return Labels(keys, names, np.array(rows, np.int8))


def _attributes(sample: Sample) -> dict[str, int]:
    try:
        attributes = dict(json.loads(sample["json"])["attributes"].items())
        if wrong := {name: value for name, value in attributes.items() if value not in (0, 1)}:
            raise ValueError(f"{wrong} is neither 0 nor 1")
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"sample {sample['__key__']} of {sample['__url__']} has no labels "
            f"({type(error).__name__}: {error}); its json needs `attributes` of 0 and 1"
        ) from error
    return attributes


def read_pixels(samples: list[Sample], size_px: int) -> NDArray[np.uint8]:
    """Images of raw samples; (N, H, W, 3) uint8."""
    return np.stack([decode_sample(sample, size_px) for sample in samples])
