"""The transformer encoder: a query token for each subset, through the chosen attention kernel."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.task import VitConfig
from data_pipelines.object_store import ObjectStore
from pretrain.attention import sdpa
from pretrain.encoder import make_encoder
from pretrain.preflight import run_url
from pretrain.train import run
from pretrain.trained import load_encoder
from pretrain.unet import set_attention, set_recomputing
from pretrain.vit import VitEncoder
from tests.tiny_run import make_run
from tools.publish import publish_encoder

CONFIG = VitConfig(kind="vit", size="S", patch_size_px=8, latent_dim=24)
ENDS = (8, 11, 24)
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make() -> VitEncoder:
    torch.manual_seed(0)
    encoder = make_encoder(CONFIG, image_size_px=16, dim_ends=ENDS)
    assert isinstance(encoder, VitEncoder)
    return encoder


def test_each_subset_is_the_answer_to_its_own_query() -> None:
    encoder = make()
    z = encoder(IMAGES)
    assert z.shape == (2, 24)
    for number, dims in enumerate((slice(0, 8), slice(8, 11), slice(11, 24))):
        torch.nn.init.zeros_(encoder.heads[number].weight)
        encoder.heads[number].bias.data.fill_(7.0)
        changed = encoder(IMAGES)
        assert (changed[:, dims] == 7).all()
        rest = torch.ones(24, dtype=torch.bool)
        rest[dims] = False
        assert torch.equal(changed[:, rest], z[:, rest])
        z = changed


def test_every_weight_and_the_place_of_a_patch_count() -> None:
    encoder = make()
    encoder(IMAGES).square().sum().backward()
    assert not [n for n, w in encoder.named_parameters() if w.grad is None or not w.grad.any()]
    swapped = torch.cat([IMAGES[..., 8:], IMAGES[..., :8]], dim=-1)
    assert not torch.allclose(encoder(swapped), encoder(IMAGES), atol=1e-3)


def test_the_kernel_is_the_chosen_one_and_recomputing_changes_no_gradient() -> None:
    encoder, calls = make(), []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return sdpa(q, k, v)

    set_attention(encoder, counted)
    gradients = []
    for recomputes in (False, True):
        set_recomputing(encoder, recomputes)
        encoder.zero_grad()
        encoder(IMAGES).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in encoder.parameters()])
    assert calls == [(2, 6, 4 + 3, 64)] * 36, "12 blocks; with recomputing twice"
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by encoder.patch_size_px \(8\), got 20"):
        make_encoder(CONFIG, image_size_px=20)
    with pytest.raises(ValueError, match="takes 16 px square images"):
        make()(torch.zeros(1, 3, 24, 24))


@pytest.mark.usefixtures("world")
def test_a_run_trains_it_and_its_encoder_is_read_back(tmp_path: Path) -> None:
    store = ObjectStore()
    # The first two steps move what is 0 at the start, and the encoder only then.
    short = ("train.total_images=24", "train.global_batch=8", "train.checkpoint_every_images=24")
    vit = "task.encoder={kind: vit, size: S, patch_size_px: 8, latent_dim: 24}"
    config = make_run(store, str(tmp_path), vit, *short, "cluster.num_workers=1")
    run(config, local_dir=tmp_path)
    trained = load_encoder(store, run_url(config))
    assert isinstance(trained.encoder, VitEncoder)
    assert [head.out_features for head in trained.encoder.heads] == [8, 8, 8]
    start = load_encoder(store, run_url(config), step=0)
    assert start.sha256 != trained.sha256
    with pytest.raises(ValueError, match="kind vit cannot be published yet"):
        publish_encoder(store, trained, str(tmp_path / "out"), ema=True)
