"""Measure the scaling of a KL autoencoder: 1/std of the latents of training images.

python -m utils.tokenizer.scaling --vae_ckpt kl-f16.ckpt --data_path imagenet --image_size 256
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from models.kl_vae import KLAutoencoder
from models.tokenizer import exact_convolutions
from models.weights import load_tokenizer
from utils.config.training import DataConfig
from utils.data.datasets import open_dataset, plain_batches
from utils.runtime.entry import entry
from utils.runtime.flags import Flags, at_least, parse


@dataclass(frozen=True)
class ScalingConfig(Flags):
    """Latent scaling"""

    vae_ckpt: str = "pretrained/kl16.ckpt"  # a KL autoencoder: a file, or a tokenizer run's directory
    image_size: int = 256  # side of the images
    images: int = 2000  # training images, evenly over the split
    batch: int = 16  # images at a time

    def __post_init__(self):
        super().__post_init__()
        at_least(self, image_size=1, images=1, batch=1)


@dataclass(frozen=True)
class ScalingFlags(Flags):
    """Everything `utils.tokenizer.scaling` takes."""

    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    data: DataConfig = field(default_factory=DataConfig)


@torch.no_grad()
def measure_scaling(vae: KLAutoencoder, data: DataConfig, size: int, images: int, batch: int = 16) -> float:
    """1/std of drawn latents of training images, by their moments: E[m² + v] - E[m]²."""
    views = open_dataset(data, size, 0, "train")
    count, first, second = 0, 0.0, 0.0
    for pixels, _ in plain_batches(views, images, batch):
        with exact_convolutions():
            mean, log_variance = (x.double() for x in vae.moments(pixels.to(vae.device)))
        count += mean.numel()
        first += mean.sum().item()
        second += (mean.square() + log_variance.exp()).sum().item()
    return (second / count - (first / count) ** 2) ** -0.5


@entry
def main() -> None:
    flags = parse(ScalingFlags, description=__doc__, prog="python -m utils.tokenizer.scaling")
    wanted, vae = flags.scaling, load_tokenizer(flags.scaling.vae_ckpt)
    if not isinstance(vae, KLAutoencoder):
        raise ValueError(f"{wanted.vae_ckpt} is no KL autoencoder: its codes need no scaling")
    vae = vae.to("cuda" if torch.cuda.is_available() else "cpu")
    found = measure_scaling(vae, flags.data, wanted.image_size, wanted.images, wanted.batch)
    print(f"--latent_scaling {found:.4f}")


if __name__ == "__main__":
    main()
