"""The decoder: the frozen backbone plus a trainable up path that z steers (METHOD section 4).

One pass through the frozen `time_embed` and `input_blocks`; from there two parallel up paths over
the same skips: the frozen one gives epsilon_theta, the trainable one gives the shift G.

Letters: B batch, C channels, H height, W width, D = latent_dim, E embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.unet import BlockMaker, UNet, walk_up


class FrozenPass(NamedTuple):
    """What the backbone makes of (x_t, t); nothing in it carries a gradient."""

    emb_BE: Tensor
    skips: list[Tensor]
    """Activations of every input block, first to last; the shift path reads them too."""
    output_BCHW: Tensor
    """The backbone's own prediction."""


class Trunk(nn.Module):
    """All that the frozen backbone does in a step, as one call."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet.eval()

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> FrozenPass:
        emb = self.unet.embed_time(t_B)
        skips = self.unet.encode(x_BCHW, emb)
        return FrozenPass(emb, skips, self.unet.decode(skips, emb))


class ShiftDecoder(nn.Module):
    """epsilon_theta(x_t, t) by `look` and, from what it saw, G(x_t, t, c).

    Args:
        backbone: frozen; it is put in eval mode for good. It is no submodule: this module's
            parameters and state, which engines shard, optimize and save, are what training changes.
    """

    def __init__(self, backbone: UNet, *, latent_dim: int) -> None:
        super().__init__()
        self._outside = (Trunk(backbone),)  # a tuple hides it from nn.Module
        make = BlockMaker(backbone.config, steering="scale_shift")
        skips = backbone.skip_channels
        self.label_emb = nn.Linear(latent_dim, make.embed_dim)
        self.shift_middle_block = make.middle(skips[-1])
        self.shift_output_blocks = make.up_path(skips[-1], skips)
        self.shift_out = make.out(backbone.config.in_channels)

    @property
    def trunk(self) -> Trunk:
        """The frozen backbone, as it is run."""
        return self._outside[0]

    @property
    def backbone(self) -> UNet:
        """The frozen backbone."""
        return self.trunk.unet

    def look(self, x_BCHW: Tensor, t_B: Tensor) -> FrozenPass:
        """Everything that the frozen backbone contributes at (x_t, t)."""
        return self.trunk(x_BCHW, t_B)

    def forward(self, frozen: FrozenPass, condition_BD: Tensor) -> Tensor:
        """The shift G under a condition, BCHW; may be called again on the same frozen pass."""
        emb, skips = frozen.emb_BE, frozen.skips
        emb_z = self.label_emb(condition_BD)
        h = self.shift_middle_block(skips[-1], emb, emb_z)
        h = walk_up(self.shift_output_blocks, h, skips, emb, emb_z)
        return self.backbone.unfold(self.shift_out(h))
