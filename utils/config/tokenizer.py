"""Every flag of train_tokenizer.py, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import simple_parsing

from models.generators import TOKENIZERS
from models.scales import ScaleSchedule
from utils.config.training import DataConfig, LogConfig, OptimConfig, RunConfig, WatchConfig, check_watch
from utils.runtime.flags import Flags, at_least, only_with, without


@dataclass(frozen=True)
class TokenizerConfig(Flags):
    """Tokenizer"""

    init_ckpt: str = ""  # weights to start from (a file or a run's directory); empty: from scratch
    image_size: int = 256  # side of the training images
    quantiser: str = simple_parsing.choice(*TOKENIZERS, default="flexvar")
    """flexvar: codes of the latent resized to each side; residual: VAR's, each side codes what the coarser ones left;
    none: a KL autoencoder, whose latents are continuous"""
    base_width: int = 128  # width of the finest level
    width_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """width of each level, in base widths; every level but one halves the resolution"""
    res_blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 256  # channels between the convolutions and the quantiser
    codebook_size: int = 8912  # codebook rows
    codebook_dim: int = 32  # codebook width
    pn: str = "1_2_3_4_5_6_8_10_13_16"  # sides that are quantised and decoded
    sides_per_step: int = 2  # random sides trained in a step, beside the finest

    def __post_init__(self):
        super().__post_init__()
        at_least(
            self,
            image_size=1,
            base_width=32,
            res_blocks=1,
            z_channels=1,
            codebook_size=2,
            codebook_dim=1,
            sides_per_step=0,
        )

    @property
    def scales(self) -> ScaleSchedule:
        return ScaleSchedule.parse(self.pn)


@dataclass(frozen=True)
class TokenizerLossConfig(Flags):
    """Losses: each a mean over the sides of the step"""

    l1: float = 0.0  # weight of the mean absolute error
    l2: float = 1.0  # weight of the mean squared error
    commitment: float = 0.25  # weight of the commitment loss
    kl: float = 1e-6  # quantiser none: weight of the KL divergence of the latents' posterior, a sum over their numbers
    equivariant: bool = False
    """quantiser none: half of the steps resize and turn latents, which must decode to images treated alike (EQ-VAE)"""
    entropy: float = 0.0  # weight of the entropy term: sure of each code, and all codes alike
    perceptual: Literal["none", "lpips", "efficientnet_lite0"] = "none"
    """perceptual distance: lpips (VGG-16, fetched or given), or in efficientnet_lite0's features: no download"""
    perceptual_weight: float = 1.0  # weight of the perceptual distance
    perceptual_weights: str = ""  # torchvision's vgg16-397923af.pth for lpips; empty: fetched
    disc_weight: float = 0.0  # weight of the adversarial loss; 0: no discriminator
    disc_start: int = 20000  # steps before the discriminator begins
    disc_width: int = 64  # width of its first layer
    disc_layers: int = 3  # its layers of stride 2
    disc_adaptive: bool = True  # scale the adversarial gradient to the reconstruction's
    usage_every: int = 100  # steps over which the use of the codebook is counted and logged
    revive: bool = True  # give rows that were not used in those steps new values

    def __post_init__(self):
        super().__post_init__()
        at_least(self, l1=0, l2=0, commitment=0, kl=0, entropy=0, perceptual_weight=0, disc_weight=0, disc_start=0)
        at_least(self, disc_width=16, disc_layers=1, usage_every=1)
        if self.disc_width % 16:
            raise ValueError(f"--disc_width must be a multiple of 16, got {self.disc_width}")
        only_with(self, self.perceptual != "none", "--perceptual", ["perceptual_weight"])
        only_with(self, self.perceptual == "lpips", "--perceptual lpips", ["perceptual_weights"])
        discriminator = ["disc_start", "disc_width", "disc_layers", "disc_adaptive"]
        only_with(self, self.disc_weight > 0, "--disc_weight", discriminator)
        if not (self.l1 or self.l2):
            raise ValueError("--l1 and --l2 are both 0: nothing would ask for the image's pixels")


@dataclass(frozen=True)
class TokenizerTrainConfig(Flags):
    """Everything `train_tokenizer.py` takes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        super().__post_init__()
        check_watch(self.watch, self.optim)
        unread = TOKENIZERS[self.model.quantiser].unread
        for group in (self.model, self.loss):
            names = [f.name for f in fields(group) if f.name in unread]
            without(group, True, f"--quantiser {self.model.quantiser}", names)
        if self.loss.disc_weight and self.optim.precision == "fp16":
            raise ValueError("--disc_weight does not go with --precision fp16: use bf16 or fp32")
