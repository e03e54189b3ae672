"""The ceiling of every evaluation: an encoder of DiTi's shape that was told the labels.

Letters: B batch, C channels, H height, W width, A attributes.
"""

import torch
from torch import Tensor, nn

from configs.task import LabelsTask
from pretrain.encoder import make_encoder


class Classifier(nn.Module):
    """Images and labels to one loss each: binary cross-entropy of a linear head on z.

    Raises:
        ValueError: images of this size do not fit the encoder.
    """

    def __init__(self, task: LabelsTask, *, image_size_px: int) -> None:
        super().__init__()
        self.task = task
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.head = nn.Linear(task.encoder.latent_dim, len(task.attributes))

    def forward(self, x0_BCHW: Tensor, labels_BA: Tensor) -> Tensor:
        """Loss of each sample, the mean over its attributes; float32 (B,)."""
        logits_BA = self.head(self.encoder(x0_BCHW)).float()
        losses_BA = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_BA, labels_BA.float(), reduction="none"
        )
        return losses_BA.mean(dim=1)
