"""The decoder: the frozen backbone plus a trainable up path that z steers (METHOD section 4).

One pass through the frozen `time_embed` and `input_blocks`; from there two parallel up paths over
the same skips: the frozen one gives epsilon_theta, the trainable one gives the shift G.

Letters: B batch, C channels, H height, W width, D = latent_dim, E embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.unet import BlockMaker, UNet, walk_up


@dataclass(frozen=True, slots=True)
class FrozenPass:
    """What the backbone makes of (x_t, t); nothing in it carries a gradient."""

    emb_BE: Tensor
    skips: list[Tensor]
    """Activations of every input block, first to last; the shift path reads them too."""
    output_BCHW: Tensor
    """The backbone's own prediction."""


class ShiftDecoder(nn.Module):
    """epsilon_theta(x_t, t) and G(x_t, t, c). `backbone` must already be frozen."""

    def __init__(self, backbone: UNet, *, latent_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        make = BlockMaker(backbone.config, shift=True)
        skips = backbone.skip_channels
        self.label_emb = nn.Linear(latent_dim, make.embed_dim)
        self.shift_middle_block = make.middle(skips[-1])
        self.shift_output_blocks = make.up_path(skips[-1], skips)
        self.shift_out = make.out(backbone.config.in_channels)

    def train(self, mode: bool = True) -> "ShiftDecoder":
        """Training mode for the shift path only; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def look(self, x_BCHW: Tensor, t_B: Tensor) -> FrozenPass:
        """Everything that the frozen backbone contributes at (x_t, t)."""
        emb = self.backbone.embed_time(t_B)
        skips = self.backbone.encode(x_BCHW, emb)
        return FrozenPass(emb, skips, self.backbone.decode(skips, emb))

    def shift(self, frozen: FrozenPass, condition_BD: Tensor) -> Tensor:
        """The shift G under a condition, BCHW; may be called again on the same frozen pass."""
        emb, skips = frozen.emb_BE, frozen.skips
        emb_z = self.label_emb(condition_BD)
        h = self.shift_middle_block(skips[-1], emb, emb_z)
        h = walk_up(self.shift_output_blocks, h, skips, emb, emb_z)
        return self.backbone.unfold(self.shift_out(h))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's prediction and the shift G, both BCHW."""
        frozen = self.look(x_BCHW, t_B)
        return frozen.output_BCHW, self.shift(frozen, condition_BD)
