"""Other ways to train an encoder of DiTi's shape: what its feature is compared with.

Each takes images and gives one loss each, trained by the same loop on the same stream and exported
like any other; only `encoder` is. What they draw at random is a function of the noise that DiTi
would have got, so of seed and position. Diff-AE, which takes time-steps too, is in `diffae`.

Letters: B batch, C channels, H height, W width, D = latent_dim, A attributes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.task import (
    AnyEncoderConfig,
    BaselineTask,
    DiffAeTask,
    EncoderConfig,
    LabelsTask,
    MaskedTask,
    SimClrTask,
    SimSiamTask,
    VaeTask,
)
from pretrain.diffae import DiffAe
from pretrain.encoder import make_encoder
from pretrain.layers import GroupNorm
from pretrain.views import NUMBERS_OF_A_VIEW, view


class Classifier(nn.Module):
    """Told the labels, so the ceiling: binary cross-entropy of a linear head on z."""

    def __init__(self, task: LabelsTask, *, image_size_px: int) -> None:
        super().__init__()
        self.attributes = task.attributes
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.head = nn.Linear(task.encoder.latent_dim, len(task.attributes))

    def forward(self, x0_BCHW: Tensor, labels_BA: Tensor) -> Tensor:
        """Loss of each sample, the mean over its attributes; float32 (B,)."""
        logits_BA = self.head(self.encoder(x0_BCHW)).float()
        losses_BA = F.binary_cross_entropy_with_logits(
            logits_BA, labels_BA.float(), reduction="none"
        )
        return losses_BA.mean(dim=1)


class Vae(nn.Module):
    """beta-VAE (Higgins et al. 2017); z is the posterior's mean."""

    def __init__(self, task: VaeTask, *, image_size_px: int) -> None:
        super().__init__()
        self.beta, dims = task.beta, task.encoder.latent_dim
        if dims > 3 * image_size_px**2:
            raise ValueError(
                f"a vae's encoder.latent_dim must not exceed an image's {3 * image_size_px**2} "
                f"numbers, got {dims}"
            )
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.log_variance = nn.Linear(dims, dims)
        self.decoder = make_decoder(task.encoder, image_size_px=image_size_px)

    def forward(self, x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """-log p(x|z) + beta KL(q(z|x) || N(0, I)), per pixel; float32 (B,)."""
        mean_BD = self.encoder(x0_BCHW)
        log_variance_BD = self.log_variance(mean_BD).clamp(-10, 10)
        epsilon_BD = noise_BCHW.flatten(1)[:, : mean_BD.shape[1]].to(mean_BD.dtype)
        z_BD = mean_BD + epsilon_BD * (log_variance_BD / 2).exp()
        error_BCHW = self.decoder(z_BD).float() - x0_BCHW
        mean, log_variance = mean_BD.float(), log_variance_BD.float()
        divergence_B = (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        return error_BCHW.square().flatten(1).mean(dim=1) / 2 + (
            self.beta * divergence_B / error_BCHW[0].numel()
        )


class MaskedAutoencoder(nn.Module):
    """Fills in hidden patches from the rest, through z (after He et al. 2022; no transformer)."""

    def __init__(self, task: MaskedTask, *, image_size_px: int) -> None:
        super().__init__()
        self.patch_size_px, self.hidden_share = task.patch_size_px, task.hidden_share
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.decoder = make_decoder(task.encoder, image_size_px=image_size_px)

    def forward(self, x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Mean squared error of the hidden pixels; float32 (B,)."""
        hidden_B1HW = self._hidden(noise_BCHW)
        z_BD = self.encoder(x0_BCHW * ~hidden_B1HW)
        error_BCHW = (self.decoder(z_BD).float() - x0_BCHW).square() * hidden_B1HW
        pixels_B = 3 * hidden_B1HW.flatten(1).sum(dim=1)
        return error_BCHW.flatten(1).sum(dim=1) / pixels_B

    def _hidden(self, noise_BCHW: Tensor) -> Tensor:
        """The patches whose noise is largest; bool (B, 1, H, W)."""
        patch = self.patch_size_px
        score_BhW = F.avg_pool2d(noise_BCHW.mean(dim=1, keepdim=True), patch)
        score_BP = score_BhW.flatten(1)
        count = max(1, round(self.hidden_share * score_BP.shape[1]))
        hidden_BP = torch.zeros_like(score_BP, dtype=torch.bool)
        hidden_BP.scatter_(1, score_BP.topk(count, dim=1).indices, value=True)
        hidden_B1hw = hidden_BP.view_as(score_BhW)
        return hidden_B1hw.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


class SimClr(nn.Module):
    """Two views of an image are told from all others' (Chen et al. 2020).

    The others are those of a rank's micro-batch, so the loss depends on how a batch is split.
    """

    def __init__(self, task: SimClrTask, *, image_size_px: int) -> None:
        super().__init__()
        self.temperature, dims = task.temperature, task.encoder.latent_dim
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.projector = nn.Sequential(
            nn.ReLU(), nn.Linear(dims, dims), nn.ReLU(), nn.Linear(dims, dims)
        )

    def forward(self, x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """NT-Xent of each sample, the mean of its two views; float32 (B,)."""
        count = len(x0_BCHW)
        views = torch.cat(two_views(x0_BCHW, noise_BCHW))  # 2B
        projected = F.normalize(self.projector(self.encoder(views)).float(), dim=1)
        logits = projected @ projected.T / self.temperature
        logits.fill_diagonal_(float("-inf"))  # itself is no other
        partner = torch.arange(2 * count, device=logits.device).roll(count)
        return F.cross_entropy(logits, partner, reduction="none").view(2, count).mean(dim=0)


class SimSiam(nn.Module):
    """One view predicts the other, without negatives (Chen and He 2021).

    Its heads have BatchNorm over a rank's micro-batch.
    """

    def __init__(self, task: SimSiamTask, *, image_size_px: int) -> None:
        super().__init__()
        dims = task.encoder.latent_dim
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.projector = nn.Sequential(
            nn.BatchNorm1d(dims),
            nn.ReLU(),
            nn.Linear(dims, dims),
            nn.BatchNorm1d(dims, affine=False),
        )
        hidden = max(1, dims // 4)
        self.predictor = nn.Sequential(
            nn.Linear(dims, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dims)
        )

    def forward(self, x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Negative cosine between prediction and the other view; float32 (B,), from -1 to 1."""
        targets = [self.projector(self.encoder(v)) for v in two_views(x0_BCHW, noise_BCHW)]
        predictions = [self.predictor(target) for target in targets]
        pairs = zip(predictions, reversed(targets), strict=True)
        cosines = [F.cosine_similarity(p.float(), t.detach().float(), dim=1) for p, t in pairs]
        return -torch.stack(cosines).mean(dim=0)


Baseline = Classifier | Vae | MaskedAutoencoder | SimClr | SimSiam | DiffAe


def make_baseline(task: BaselineTask, *, image_size_px: int) -> Baseline:
    """The model that a run describes.

    Raises:
        ValueError: images of this size do not fit it.
    """
    match task:
        case LabelsTask():
            return Classifier(task, image_size_px=image_size_px)
        case VaeTask():
            return Vae(task, image_size_px=image_size_px)
        case MaskedTask():
            return MaskedAutoencoder(task, image_size_px=image_size_px)
        case SimClrTask():
            return SimClr(task, image_size_px=image_size_px)
        case SimSiamTask():
            return SimSiam(task, image_size_px=image_size_px)
        case DiffAeTask():
            return DiffAe(task, image_size_px=image_size_px)


def two_views(x0_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Two images made of each, by the first numbers of its noise."""
    numbers = noise_BCHW.flatten(1)[:, : 2 * NUMBERS_OF_A_VIEW]
    first, second = torch.special.ndtr(numbers).chunk(2, dim=1)  # uniform in [0, 1]
    return view(x0_BCHW, first), view(x0_BCHW, second)


def make_decoder(config: AnyEncoderConfig, *, image_size_px: int) -> nn.Sequential:
    """z (B, D) to an image (B, 3, H, W): the convolutional encoder backwards."""
    channels = config.channels[::-1] if isinstance(config, EncoderConfig) else (512, 256, 128, 64)
    side = image_size_px // 2 ** len(channels)
    layers: list[nn.Module] = [
        nn.Linear(config.latent_dim, channels[0] * side * side),
        nn.Unflatten(1, (channels[0], side, side)),
    ]
    for wide, narrow in zip(channels, (*channels[1:], channels[-1]), strict=True):
        layers += [
            GroupNorm(wide),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(wide, narrow, 3, padding=1),
        ]
    layers += [GroupNorm(channels[-1]), nn.SiLU(), nn.Conv2d(channels[-1], 3, 3, padding=1)]
    return nn.Sequential(*layers)
