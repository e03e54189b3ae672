"""Encoding for features: the same numbers whatever the batch's size or device, scales of int8."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.feature_layout import INT8_LIMIT
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_reader import iter_shard
from pretrain.shard_features import (
    INT8_HEADROOM,
    EncoderOnDevice,
    columns_of,
    measured_scales,
)
from pretrain.trained import TrainedEncoder, load_published_encoder
from tests.published_files import SIZE_PX, write_run
from tests.tiny_run import make_shards

STORE = ObjectStore()
IMAGES = np.random.default_rng(0).integers(0, 256, (70, SIZE_PX, SIZE_PX, 3), np.uint8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TrainedEncoder:
    return load_published_encoder(write_run(tmp_path_factory.mktemp("authors")))


def test_z_is_what_the_encoder_makes_of_pixels_in_minus_one_to_one(
    encoder: TrainedEncoder,
) -> None:
    z = EncoderOnDevice(encoder, use_gpu=False)(IMAGES)
    assert (z.shape, z.dtype) == ((70, 24), np.float32)
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    np.testing.assert_allclose(z, encoder.encoder(pixels).numpy(), rtol=1e-4, atol=1e-5)


def test_scales_are_those_of_the_largest_value_with_room_above(
    encoder: TrainedEncoder, tmp_path: Path
) -> None:
    index = make_shards(STORE, str(tmp_path), split="test", shards=3, rows=8)
    on_cpu = EncoderOnDevice(encoder, use_gpu=False)
    columns = columns_of(encoder.partition)
    whole = measured_scales(STORE, on_cpu, index, columns)
    assert len(whole) == 24
    assert measured_scales(STORE, on_cpu, index, columns) == whole
    assert measured_scales(STORE, on_cpu, index, columns[1:3]) == whole[4:16]
    images = [
        decode_sample(sample, SIZE_PX)
        for shard in index.shards
        for sample in iter_shard(STORE, shard)
    ]
    largest = np.abs(on_cpu(np.stack(images))).max(axis=0)
    np.testing.assert_allclose(whole, largest * INT8_HEADROOM / INT8_LIMIT, rtol=1e-4)


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same_numbers_also_for_a_batch_that_is_not_full(
    encoder: TrainedEncoder,
) -> None:
    expected = EncoderOnDevice(encoder, use_gpu=False)(IMAGES)
    z = EncoderOnDevice(encoder, use_gpu=True)(IMAGES)
    assert z.shape == expected.shape
    cosines = (z * expected).sum(1) / np.linalg.norm(z, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.999
