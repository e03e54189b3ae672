"""The trainable encoder E: x_0 -> z (METHOD section 4).

A row of stride-2 convolutions, one self-attention on the way, one linear layer to z. The indices
inside `encoder` are those of the published checkpoints.

Letters: B batch, C channels, H height, W width, D = latent_dim.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from configs.task import AnyEncoderConfig, EncoderConfig, VitConfig
from pretrain.resnet10 import ResNet10
from pretrain.unet import AttentionBlock, GroupNorm
from pretrain.vit import VitEncoder


def make_encoder(
    config: AnyEncoderConfig, *, image_size_px: int, dim_ends: Sequence[int] | None = None
) -> "AnyEncoder":
    """The encoder that a run describes.

    Args:
        dim_ends: where the subsets of z end; None for one subset.

    Raises:
        ValueError: images of this size do not fit it.
    """
    match config:
        case EncoderConfig():
            return Encoder(config, image_size_px=image_size_px)
        case VitConfig():
            ends = dim_ends or (config.latent_dim,)
            return VitEncoder(config, image_size_px=image_size_px, dim_ends=ends)
        case _:
            return ResNet10()


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> z (B, D), float."""

    def __init__(self, config: EncoderConfig, *, image_size_px: int) -> None:
        super().__init__()
        halvings = 2 ** len(config.channels)
        if image_size_px % halvings:
            raise ValueError(
                f"data.image_size_px must be divisible by {halvings}, because encoder.channels "
                f"has {len(config.channels)} stride-2 convolutions; got {image_size_px}"
            )
        self.image_size_px = image_size_px
        layers: list[nn.Module] = []
        previous = 3
        for number, channels in enumerate(config.channels, start=1):
            layers.append(nn.Conv2d(previous, channels, 3, stride=2, padding=1))
            if number == config.attention_after:
                layers.append(AttentionBlock(channels, num_heads=config.num_heads))
            layers += [GroupNorm(channels), nn.SiLU()]
            previous = channels
        side = image_size_px // halvings
        layers += [nn.Flatten(), nn.Linear(previous * side * side, config.latent_dim)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[-2:] != (self.image_size_px, self.image_size_px):
            raise ValueError(
                f"this encoder takes {self.image_size_px} px square images, "
                f"got shape {tuple(x_BCHW.shape)}"
            )
        return self.encoder(x_BCHW.to(next(self.parameters()).dtype))


AnyEncoder = Encoder | ResNet10 | VitEncoder
