"""What DiTi is compared with: other losses for the same encoder, by the same loop and stream."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from configs.schema import RunConfig
from configs.task import BaselineTask, EncoderConfig, LabelsTask
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_labels import LabelError
from data_pipelines.shard_index import read_index
from pretrain import checkpoint
from pretrain.baselines import (
    Baseline,
    Classifier,
    MaskedAutoencoder,
    SimClr,
    SimSiam,
    Vae,
    make_baseline,
    two_views,
)
from pretrain.inputs import to_tensors, zeros
from pretrain.preflight import preflight, run_url, sample_order
from pretrain.progress import Progress
from pretrain.replay import replay
from pretrain.run_plan import plan_run
from pretrain.train import open_batches, run
from pretrain.trained import load_encoder
from pretrain.world import World
from tests.ranks import run_on_ranks
from tests.tiny_run import make_run
from tools.labels import attributes_of, read_samples

STORE = ObjectStore()
pytestmark = pytest.mark.usefixtures("world")
ENCODER = "{latent_dim: 24, channels: [32, 32, 32], attention_after: 2}"
UNET = "{patch_size_px: 2, base_channels: 32, channel_multipliers: [1, 1], attention_factors: [2]}"
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


def small(kind: str, **more: object) -> Baseline:
    """A baseline on 16 px images, with a feature of 8 dimensions."""
    text = {"kind": kind, "encoder": {"latent_dim": 8, "channels": [32, 32]}, **more}
    torch.manual_seed(0)
    task = TypeAdapter(BaselineTask).validate_json(json.dumps(text))
    return make_baseline(task, image_size_px=16)


def images_and_noise(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    return noise.flip(0).clamp(-1, 1), noise


def test_a_vae_weighs_error_and_divergence() -> None:
    model = small("vae", beta=3.0)
    assert isinstance(model, Vae)
    images, noise = images_and_noise(2)
    mean = model.encoder(images)
    deviation = (model.log_variance(mean) / 2).exp()
    error = model.decoder(mean + deviation * noise.flatten(1)[:, :8]) - images
    prior = Normal(torch.zeros(8), torch.ones(8))
    divergence = kl_divergence(Normal(mean, deviation), prior).sum(dim=1)
    expected = (error**2).flatten(1).sum(dim=1) / 2 + 3 * divergence
    torch.testing.assert_close(model(images, noise), expected / (3 * 16 * 16))


def test_a_masked_autoencoder_is_asked_for_what_it_did_not_see() -> None:
    model = small("masked", patch_size_px=4, hidden_share=0.75)
    assert isinstance(model, MaskedAutoencoder)
    images, noise = images_and_noise(2)
    hidden = model._hidden(noise)
    patches = hidden.float().reshape(2, 4, 4, 4, 4).mean(dim=(2, 4))
    assert set(patches.unique().tolist()) == {0, 1}
    assert patches.sum(dim=(1, 2)).tolist() == [12, 12]
    assert not torch.equal(hidden[0], hidden[1])
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = model(images, noise)
    changed = torch.where(hidden, 0.5, images)
    after = model(changed, noise)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(before, after), "but they are what it is scored on"
    error = (model.decoder(model.encoder(images * ~hidden)) - images) ** 2
    expected = [error[i][hidden[i].expand(3, -1, -1)].mean() for i in range(2)]
    torch.testing.assert_close(before, torch.stack(expected))


def test_simclr_tells_a_view_from_all_others() -> None:
    model = small("simclr", temperature=0.5)
    assert isinstance(model, SimClr)
    images, noise = images_and_noise(3)
    first, second = two_views(images, noise)
    assert not torch.allclose(first, second)
    made = model.projector(model.encoder(torch.cat([first, second])))
    similarity = torch.cosine_similarity(made[:, None], made[None], dim=2) / 0.5
    expected = []
    for i in range(3):
        of_both = []
        for own, other in ((i, i + 3), (i + 3, i)):
            rest = [j for j in range(6) if j != own]
            of_both.append(similarity[own, rest].logsumexp(0) - similarity[own, other])
        expected.append(sum(of_both) / 2)
    torch.testing.assert_close(model(images, noise), torch.stack(expected))


def test_simsiam_lets_no_gradient_through_its_targets() -> None:
    model = small("simsiam")
    assert isinstance(model, SimSiam)
    images, noise = images_and_noise(4)
    losses = model(images, noise)
    assert ((losses >= -1) & (losses <= 1)).all()
    losses.mean().backward()
    whole = [p.grad.clone() for p in model.encoder.parameters() if p.grad is not None]
    model.zero_grad()
    views = two_views(images, noise)
    with torch.no_grad():
        targets = [model.projector(model.encoder(view)) for view in views]
    for view, target in zip(views, reversed(targets), strict=True):
        predicted = model.predictor(model.projector(model.encoder(view)))
        (-torch.cosine_similarity(predicted, target).mean() / 2).backward()
    again = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert whole
    torch.testing.assert_close(whole, again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vae", "masked")),
        "simclr",
        "simsiam",
        f"diffae, unet: {UNET}",
    ],
    ids=lambda kind: kind.partition(",")[0],
)
def test_every_baseline_trains_resumes_and_leaves_an_encoder(tmp_path: Path, kind: str) -> None:
    task = f"task={{kind: {kind}, encoder: {ENCODER}}}"
    settings = ("train.global_batch=16", "optimizer.learning_rate=1e-3")
    whole = make_run(STORE, str(tmp_path), task, *settings, "name=whole")
    manifest = run(whole, local_dir=tmp_path)
    lines = checkpoint.read_metrics(STORE, run_url(whole), manifest)
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert load_encoder(STORE, run_url(whole)).partition.latent_dim == 24

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    parted = whole.model_copy(update={"name": "parted"})
    with pytest.raises(KeyboardInterrupt):
        run(parted, local_dir=tmp_path, report=stop)
    again = run(parted, local_dir=tmp_path)
    ends = [
        checkpoint.read_tensors(STORE, run_url(config), end, ema=False)
        for config, end in ((whole, manifest), (parted, again))
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_each_image_comes_with_its_own_labels(tmp_path: Path, world: World) -> None:
    config = labels_run(tmp_path)
    index = read_index(STORE, join(str(tmp_path), "train"))
    plan = plan_run(config.train, 1)
    order = sample_order(config, index)
    batches = open_batches(STORE, index, order, config, plan, world, first_batch=0)
    batch = next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    truth = attributes_of(read_samples(STORE, index))
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


@pytest.mark.slow
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
