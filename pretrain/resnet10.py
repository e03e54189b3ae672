"""The other published encoder: a ResNet of four basic blocks (METHOD section 4, ResNet10).

METHOD does not give the stride of the first convolution; 1 is assumed, the habit for small images.

BatchNorm normalises by the images of a rank's micro-batch, so with this encoder, and only with it,
the numbers of a run depend on `cluster.num_workers` and `train.max_micro_batch`.

Letters: B batch, C channels, H height, W width, D = latent_dim.
"""

from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (64, 128, 256, 512)


def _conv(in_channels: int, out_channels: int, side: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, side, stride=stride, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip; the second normalisation starts at 0, so as nothing."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.bn2.weight)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            shortcut = _conv(in_channels, out_channels, 1, stride)
            self.skip = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.skip(x_BCHW) + self.bn2(self.conv2(h)))


class ResNet10(nn.Module):
    """Image (B, 3, H, W) in [-1, 1], of any size -> z (B, 512): the mean over the last pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _conv(3, CHANNELS[0], 3)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.blocks = nn.Sequential(
            BasicBlock(CHANNELS[0], CHANNELS[0], 1),
            BasicBlock(CHANNELS[0], CHANNELS[1], 2),
            BasicBlock(CHANNELS[1], CHANNELS[2], 2),
            BasicBlock(CHANNELS[2], CHANNELS[3], 2),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x_BCHW)))
        return self.blocks(h).mean(dim=(2, 3))
