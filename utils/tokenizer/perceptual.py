"""Distances between images in the features of a frozen network."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import efficientnet_lite, fetch
from models.weights import load_strictly
from utils.runtime.files import read_tensors

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # the name carries the start of its SHA-256


class Perceptual(nn.Module, ABC):
    """Images in [-1, 1], two of (B, 3, H, W) → their mean distance. Frozen, and always in evaluation mode."""

    smallest = 16  # pixels of a side: the coarsest map that is compared has one sixteenth of them

    def train(self, mode: bool = True) -> Perceptual:
        return super().train(False)

    @abstractmethod
    def forward(self, images: Tensor, targets: Tensor) -> Tensor: ...


class LPIPS(Perceptual):
    """LPIPS v0.1 of VGG-16 (Zhang et al. 2018), by the authors' package.

    weights: torchvision's vgg16-397923af.pth; empty: fetched. The package brings its own linear layers.
    """

    def __init__(self, weights: str | Path = ""):
        try:
            import lpips
        except ImportError:
            raise ValueError("--perceptual lpips needs the package lpips: pip install lpips") from None
        super().__init__()
        hint = "give --perceptual_weights PATH, or use --perceptual efficientnet_lite0, which needs no download"
        state = read_tensors(Path(weights)) if weights else fetch(VGG_URL, "VGG", hint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks torchvision for a model by a spelling of old
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # The package cuts VGG's layers into slices, and keeps their numbers: slice2.5 is features.5.
        names = {name: f"features.{name.partition('.')[2]}" for name in self.net.net.state_dict()}
        found = {name: state[old] for name, old in names.items() if old in state}
        load_strictly(self.net.net, found, weights or VGG_URL)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.net(images, targets).mean()


class EfficientNetDistance(Perceptual):
    """LPIPS's distance without its learned weights, in EfficientNet-Lite0: that network needs no download.

    At each of four stages (1/2 to 1/16 of the resolution) features are normalised over the channels; their squared
    distances are averaged over the places, and summed over the stages.
    """

    STAGES = (0, 2, 4, 10)  # the last block of each resolution

    def __init__(self):
        super().__init__()
        self.net = efficientnet_lite(0)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        net, found = self.net, []
        x = net._swish(net._bn0(net._conv_stem(images * (127.5 / 128))))
        for i, block in enumerate(net._blocks[: self.STAGES[-1] + 1]):
            x = block(x)
            if i in self.STAGES:
                found.append(F.normalize(x, dim=1))
        return found

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(targets)
        pairs = zip(self.features(images), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()


def make_perceptual(name: str, weights: str) -> Perceptual | None:
    """The distance that --perceptual names."""
    if name == "lpips":
        return LPIPS(weights)
    return EfficientNetDistance() if name == "efficientnet_lite0" else None
