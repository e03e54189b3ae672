"""`diti plan --export`: what the features of a large image set will take, before any is computed.

Bytes are those of a part that is really encoded, with the run's columns; time is this machine's, a
core a worker.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import RunConfig
from configs.task import DitiTask
from data_pipelines.feature_layout import (
    INT8_LIMIT,
    VALUE_TYPES,
    Dtype,
    FeatureColumn,
    FeatureLayout,
)
from data_pipelines.feature_part import PartOrigin, encode_part
from pretrain.encoder import make_encoder
from pretrain.partition import make_partition
from pretrain.shard_features import CPU_BATCH, columns_of

LAION_2B_IMAGES = 2_322_161_807
ROWS_PER_SHARD = 10_000
_TIMED_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A range of time-steps that one may ask for."""

    name: str
    timesteps: tuple[int, int]
    dims: int
    bytes_per_sample: dict[Dtype, float]


@dataclass(frozen=True, slots=True)
class ExportOutlook:
    """Of one set of images on a number of workers."""

    images: int
    shards: int
    workers: int
    shards_per_worker: int
    """Of those that have most."""
    images_per_second: float
    """Of one worker, reading and decoding apart."""
    hours: float
    choices: list[Choice]


def look_ahead_to_export(
    config: RunConfig,
    *,
    workers: int,
    images: int = LAION_2B_IMAGES,
    images_per_second: float | None = None,
) -> ExportOutlook:
    """Plan the export of a run's features.

    Args:
        images_per_second: of one worker; None measures this machine's encoder on one core.

    Raises:
        ValueError: the run trains no DiTi encoder.
    """
    if not isinstance(config.task, DitiTask):
        raise ValueError(
            f"task.kind is {config.task.kind!r}; only the export of a DiTi run is planned"
        )
    shards = -(-images // ROWS_PER_SHARD)
    per_worker = -(-shards // workers)
    rate = images_per_second or _measured_rate(config, config.task)
    partition = make_partition(config.task.partition, config.task.encoder.latent_dim)
    columns = columns_of(partition)
    ranges = {"all": columns}
    for name, subsets in partition.named_ranges(0, partition.num_timesteps).items():
        names = {subset.name for subset in subsets}
        ranges[name] = tuple(column for column in columns if column.name in names)
    return ExportOutlook(
        images=images,
        shards=shards,
        workers=workers,
        shards_per_worker=per_worker,
        images_per_second=rate,
        hours=per_worker * ROWS_PER_SHARD / rate / 3600,
        choices=[_choice(name, chosen) for name, chosen in ranges.items()],
    )


def _choice(name: str, columns: tuple[FeatureColumn, ...]) -> Choice:
    dims = columns[-1].dims[1] - columns[0].dims[0]
    return Choice(
        name=name,
        timesteps=(columns[0].timesteps[0], columns[-1].timesteps[1]),
        dims=dims,
        bytes_per_sample={dtype: _bytes_per_sample(columns, dims, dtype) for dtype in VALUE_TYPES},
    )


def _bytes_per_sample(columns: tuple[FeatureColumn, ...], dims: int, dtype: Dtype) -> float:
    """Of a whole part of normal values, with keys as img2dataset's."""
    scales = (4 / INT8_LIMIT,) * dims if dtype == "int8" else None
    part = encode_part(
        FeatureLayout(columns, dtype, scales),
        PartOrigin("0" * 64, "000000.tar", "0" * 64),
        keys=[f"{row:010d}" for row in range(ROWS_PER_SHARD)],
        rows=range(ROWS_PER_SHARD),
        features=np.random.default_rng(0).standard_normal((ROWS_PER_SHARD, dims), np.float32),
    )
    return len(part) / ROWS_PER_SHARD


@torch.inference_mode()
def _measured_rate(config: RunConfig, task: DitiTask) -> float:
    """Images per CPU second of the encoder, untrained, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = config.data.image_size_px
        ends = make_partition(task.partition, task.encoder.latent_dim).dim_ends
        encoder = make_encoder(task.encoder, image_size_px=size, dim_ends=ends).eval()
        images = torch.rand(CPU_BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
        encoder(images)
        start, done = time.thread_time(), 0
        while time.thread_time() - start < _TIMED_SECONDS:
            encoder(images)
            done += len(images)
        return done / (time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
