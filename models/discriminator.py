"""The patch discriminator that a tokenizer can be trained against.

Legend: B batch, H × W pixels, h × w patches.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

WIDEST = 8  # times the first layer's width


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) → a logit for each of many overlapping patches (B, 1, h, w).

    `layers` convolutions of stride 2, then two of stride 1; with three of them a patch is 70 pixels wide. Norms are
    over channels of one image: a logit depends on its image alone, whatever the batch and the ranks.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        self.smallest = 3 * 2**layers  # pixels of an image's side that leave one patch
        widths = [width * min(2**i, WIDEST) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            blocks += [nn.Conv2d(c_in, c_out, 4, stride, padding=1), nn.GroupNorm(c_out // 16, c_out)]
            blocks += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).float()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits: the mean of max(0, 1 - real) and max(0, 1 + fake)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
