"""The ceiling: an encoder trained with labels, by the same loop, on the same stream."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import RunConfig
from configs.task import EncoderConfig, LabelsTask
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_labels import LabelError
from data_pipelines.shard_index import read_index
from pretrain import checkpoint
from pretrain.classifier import Classifier
from pretrain.inputs import to_tensors, zeros
from pretrain.preflight import preflight, run_url, sample_order
from pretrain.replay import replay
from pretrain.run_plan import plan_run
from pretrain.train import open_batches, run
from pretrain.trained import load_encoder
from pretrain.world import World
from tests.ranks import run_on_ranks
from tests.tiny_run import make_run
from tools.labels import labels_of, read_samples

STORE = ObjectStore()
pytestmark = pytest.mark.usefixtures("world")
ENCODER = "{latent_dim: 24, channels: [32, 32, 32], attention_after: 2}"
LABELS = f"task={{kind: labels, attributes: [dark_background, glasses], encoder: {ENCODER}}}"


def labels_run(folder: Path, *overrides: str) -> RunConfig:
    return make_run(STORE, str(folder), LABELS, "train.global_batch=16", *overrides)


def test_the_loss_is_the_cross_entropy_of_a_linear_head_averaged_over_attributes() -> None:
    task = LabelsTask(
        kind="labels",
        attributes=("a", "b"),
        encoder=EncoderConfig(latent_dim=8, channels=(32, 32), attention_after=None),
    )
    torch.manual_seed(0)
    model = Classifier(task, image_size_px=16)
    images, _ = zeros(model, 3, 16, "cpu")
    images = torch.randn_like(images)
    labels = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.int8)
    told = torch.sigmoid(model.encoder(images) @ model.head.weight.T + model.head.bias)
    likelihood = torch.where(labels == 1, told, 1 - told)
    expected = -likelihood.log().mean(dim=1)
    torch.testing.assert_close(model(images, labels), expected)


def test_each_image_comes_with_its_own_labels(tmp_path: Path, world: World) -> None:
    config = labels_run(tmp_path)
    index = read_index(STORE, join(str(tmp_path), "train"))
    plan = plan_run(config.train, 1)
    order = sample_order(config, index)
    batches = open_batches(STORE, index, order, config, plan, world, first_batch=0)
    batch = next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    truth = labels_of(read_samples(STORE, index))
    wanted = [truth.names.index(name) for name in ("dark_background", "glasses")]
    shards, rows = order.locate(batch.positions)
    places = [(index.shards[s].url, r) for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]
    np.testing.assert_array_equal(batch.labels, truth.of(places)[:, wanted])
    assert 0 < batch.labels.mean() < 1
    assert isinstance(config.task, LabelsTask)
    model = Classifier(config.task, image_size_px=32)
    images, labels = to_tensors(batch, config, model, torch.device("cpu"))
    assert images.shape == (16, 3, 32, 32)
    assert torch.equal(labels, torch.from_numpy(batch.labels))


def test_it_learns_what_it_is_told_and_is_an_encoder_as_any_other(tmp_path: Path) -> None:
    config = labels_run(tmp_path, "train.total_images=640", "optimizer.learning_rate=3e-3")
    manifest = run(config, local_dir=tmp_path)
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert manifest.backbone_sha256 is None
    assert all(line["frozen_gflops"] == 0 < line["trained_gflops"] for line in lines)
    trained = load_encoder(STORE, run_url(config))
    assert trained.backbone_sha256 is None
    [subset] = trained.partition.subsets
    assert subset.dims == (0, 24)
    again = replay(config, 3)
    assert again.loss == losses[2]
    assert {sample.timestep for sample in again.samples} == {None}


def test_two_ranks_follow_one(tmp_path: Path) -> None:
    curves = []
    for workers, stage in ((1, 0), (2, 3)):
        config = labels_run(tmp_path, f"name=on-{workers}", f"engine.zero_stage={stage}")
        config = config.model_copy(
            update={"cluster": config.cluster.model_copy(update={"num_workers": workers})}
        )
        run_on_ranks(config, tmp_path, stop_at=4)
        manifest = checkpoint.find(STORE, run_url(config), None)
        lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
        curves.append([line["loss"] for line in lines])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_an_attribute_that_the_samples_do_not_have_is_refused_before_the_start(
    tmp_path: Path,
) -> None:
    config = make_run(STORE, str(tmp_path), LABELS.replace("glasses", "glases"))
    told = re.escape("has no attribute glases; it has bald, beard,")
    with pytest.raises(LabelError, match=told):
        preflight(config, 1)
