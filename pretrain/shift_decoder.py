"""The decoder: the frozen backbone plus a trainable up path that z steers (METHOD section 4).

One pass through the frozen `time_embed` and `input_blocks`; from there two parallel up paths over
the same skips: the frozen one gives epsilon_theta, the trainable one gives the shift G.

Letters: B batch, C channels, H height, W width, D = latent_dim, E embedding.
"""

import torch
from torch import Tensor, nn

from pretrain.unet import BlockMaker, UNet, walk_up


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
        self.shift_out = make.out()

    def train(self, mode: bool = True) -> "ShiftDecoder":
        """Training mode for the shift path only; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's noise estimate and the shift G, both BCHW."""
        with torch.no_grad():
            emb = self.backbone.embed_time(t_B)
            skips = self.backbone.encode(x_BCHW, emb)
            epsilon = self.backbone.decode(skips, emb)
        emb_z = self.label_emb(condition_BD)
        h = self.shift_middle_block(skips[-1], emb, emb_z)
        h = walk_up(self.shift_output_blocks, h, skips, emb, emb_z)
        return epsilon, self.backbone.unfold(self.shift_out(h))
