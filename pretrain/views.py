"""Another view of an image: cut, mirrored, in other colours (SimCLR's augmentations, without blur).

Letters: B batch, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS_OF_A_VIEW = 8
SMALLEST_AREA = 0.25
COLOUR_STRENGTH = 0.4
GREY_SHARE = 0.2
_LUMA = (0.299, 0.587, 0.114)


def view(images_BCHW: Tensor, numbers_B8: Tensor) -> Tensor:
    """A view of each image, decided by eight numbers in [0, 1].

    Args:
        images_BCHW: RGB in [-1, 1].

    Returns:
        The same shape and range: a square of SMALLEST_AREA to all of the image, scaled to its size;
        mirrored half of the time; brightness, contrast and saturation up or down by up to
        COLOUR_STRENGTH; grey with GREY_SHARE.
    """
    area, x, y, mirror, brightness, contrast, saturation, grey = numbers_B8.unbind(dim=1)
    cut = _cut(images_BCHW, area, x, y, mirror)
    return _recoloured(cut, brightness, contrast, saturation, grey)


def _cut(images_BCHW: Tensor, area: Tensor, x: Tensor, y: Tensor, mirror: Tensor) -> Tensor:
    side = (SMALLEST_AREA + (1 - SMALLEST_AREA) * area).sqrt()
    sign = torch.where(mirror < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(side)
    left, top = ((1 - side) * (2 * place - 1) for place in (x, y))
    rows = [torch.stack([side * sign, zero, left], 1), torch.stack([zero, side, top], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


def _recoloured(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, grey: Tensor
) -> Tensor:
    def factor(number: Tensor) -> Tensor:
        return (1 + COLOUR_STRENGTH * (2 * number - 1))[:, None, None, None]

    luma = images.new_tensor(_LUMA)[:, None, None]
    found = (images + 1) / 2 * factor(brightness)
    middle = (found * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    found = middle + (found - middle) * factor(contrast)
    without = (found * luma).sum(dim=1, keepdim=True)
    colour = torch.where(grey[:, None, None, None] < GREY_SHARE, 0.0, factor(saturation))
    found = without + (found - without) * colour
    return 2 * found.clamp(0, 1) - 1
