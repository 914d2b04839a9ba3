"""The contract of a tokenizer, and what all tokenizers share.

Legend: B batch, H × W pixels, h × w latent sides, D codebook width, V codebook rows, s side of a scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.scales import ScaleSchedule

NEAREST_AT_ONCE = 1024  # vectors compared with the whole codebook at a time
CACHED = 2**23  # values of a feature map that fit into a CPU's cache


class Quantised(NamedTuple):
    """Images of a training step, quantised and decoded, with gradients."""

    codes: list[Tensor]  # (B, s²) of each side
    vectors: list[Tensor]  # (B·s², D) of each side, before quantisation
    images: list[Tensor]  # the pictures that they decode to; their gradient goes straight through the quantiser
    codebook: Tensor  # mean squared distance of the chosen rows to the vectors, for the rows
    commitment: Tensor  # the same for the vectors; of a KL autoencoder the divergence of the posterior
    real: list[Tensor] | None = None  # what the pictures should be; None: the image, resized to each


class Tokenizer(nn.Module):
    """Images in [-1, 1] ↔ codes of several sides: what training, sampling and evaluation ask of a tokenizer."""

    tf32 = False  # `tokenize` may round convolutions to TF32 on a GPU
    equivariant = False  # KL, in training: latents resized and turned must decode to the image treated alike (EQ-VAE)
    supervisions: tuple[str, ...] = ("latent", "image")  # values of --supervision that it knows
    config: Any  # a `VQVAEConfig`, or a subclass
    encoder: nn.Module
    decoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _apply(self, fn, recurse=True):
        """PyTorch's, for `to` and `cuda`. Weights that come to a GPU are laid out row by row: channels last makes
        convolutions faster on a CPU, and a third slower there."""

        def laid_out(t: Tensor) -> Tensor:
            found = fn(t)
            return found.contiguous() if found.is_cuda and not t.is_cuda else found

        return super()._apply(laid_out, recurse)

    def freeze_unused(self, schedule: ScaleSchedule) -> None:
        """Ask no gradient of parameters that training on a schedule never uses: DDP would wait for it."""

    def compile_parts(self) -> None:
        """Compile the decoder; another size of its input compiles it anew."""
        self.decoder.compile()

    @property
    @abstractmethod
    def pathway(self) -> Any:
        """The pathway of its codes: how they feed the next scale."""

    @torch.no_grad()
    def tokenize(self, images: Tensor, sides: Sequence[int], supervision: str = "latent") -> dict[int, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], or of bytes → their codes at these sides, {s: (B, s²)}.

        A scale's codes come from the image's latent, resized by area to the scale ("latent"), or from the latent of the
        image resized to the scale's resolution ("image"). In full fp32, whatever precision the caller works in; with
        `tf32` its convolutions are in TF32.
        Raises ValueError for a supervision that this tokenizer does not know.
        """
        if supervision not in self.supervisions:
            known = " or ".join(self.supervisions)
            raise ValueError(f"{type(self).__name__} goes with --supervision {known}, not {supervision}")
        with torch.autocast(images.device.type, enabled=False), exact_convolutions(self.tf32):
            return self.codes_of_images(from_bytes(images), sides, supervision)

    @abstractmethod
    def codes_of_images(self, images: Tensor, sides: Sequence[int], supervision: str) -> dict[int, Tensor]:
        """`tokenize`, within the precision it needs."""

    @abstractmethod
    def decode_at(self, codes: Mapping[int, Tensor], s: int, schedule: ScaleSchedule) -> Tensor:
        """Codes of all sides of a schedule up to s, {side: (B, side²)} → images (B, 3, H, W), not clamped to [-1, 1].

        Their side is `pixels(s, schedule)`.
        """

    @abstractmethod
    def decode_inputs(self, codes: Mapping[int, Tensor], i: int, schedule: ScaleSchedule) -> Tensor:
        """Codes of the scales before number i, {side: (B, side²)} → a picture (B, 3, H, W) of what feeds scale i."""

    @abstractmethod
    def pixels(self, s: int, schedule: ScaleSchedule) -> int:
        """Pixels of a side of the image that the codes up to side s decode to."""

    @abstractmethod
    def quantise(self, images: Tensor, sides: Sequence[int]) -> Quantised:
        """Images (B, 3, H, W) through the tokenizer, at these sides, for its training."""

    def to_cache(self, images: Tensor, sides: ScaleSchedule, supervision: str) -> Tensor:
        """Images (B, 3, H, W) → what a cache of these sides holds of each (B, n), on the CPU: codes, in 16 bits."""
        found = self.tokenize(images, sides.sides, supervision)
        return torch.cat(list(found.values()), dim=1).to(torch.uint16).cpu()

    def from_cache(
        self, rows: Tensor, sides: ScaleSchedule, schedule: ScaleSchedule, supervision: str
    ) -> dict[int, Tensor]:
        """Rows (B, n) of a cache of these sides → the tokens of a schedule's, as `tokenize` gives them."""
        return {s: rows[:, sides.span(sides.sides.index(s))].long() for s in schedule.sides}

    def cached_sides(self, size: int, schedule: ScaleSchedule) -> ScaleSchedule:
        """The sides that a code cache of images of `size` pixels holds.

        All, so that it has those of any schedule; where what is cached depends on the schedule, those alone.
        """
        if self.config.tied_to_schedule:
            if schedule.sides[-1] * self.config.factor != size:
                raise ValueError(f"the scales {schedule.sides} are of {schedule.sides[-1] * self.config.factor} pixels")
            return schedule
        return ScaleSchedule(tuple(range(1, size // self.config.factor + 1)))

    @torch.no_grad()
    def known(self, images: Tensor, schedule: ScaleSchedule, supervision: str) -> KnownCodes:
        """Codes of images to be held in painting. In full fp32, as `tokenize`."""
        with torch.autocast(images.device.type, enabled=False), exact_convolutions():
            return self.known_of_images(images.float(), schedule, supervision)

    def known_of_images(self, images: Tensor, schedule: ScaleSchedule, supervision: str) -> KnownCodes:
        """`known`, within the precision it needs."""
        return KnownCodes(self.codes_of_images(images, schedule.sides, supervision))

    def encode(self, images: Tensor, multiple: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → latent (B, D, h, w). Sides are such multiples, by default whole tokens."""
        multiple = multiple or self.config.factor
        if images.shape[-1] % multiple or images.shape[-2] % multiple:
            raise ValueError(f"image sides must be multiples of {multiple}, got {tuple(images.shape[-2:])}")
        parts = images.split(self.at_once(images, images.shape[-2:].numel()))
        return torch.cat([self.quant_conv(self.encoder(part)) for part in parts])

    def decode_maps(self, maps: Tensor) -> Tensor:
        """Maps of embeddings (B, D, s, s) → images (B, 3, factor·s, factor·s), not clamped to [-1, 1]."""
        parts = maps.split(self.at_once(maps, maps.shape[-1] ** 2 * self.config.factor**2))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    def at_once(self, x: Tensor, pixels: int) -> int:
        """Number of images of x (B, …) to put through the network at a time: on a CPU, what its cache holds."""
        return len(x) if x.device.type != "cpu" else max(1, CACHED // (pixels * self.config.base_width))


class KnownCodes:
    """Codes of images, held in painting: the same whatever was painted around them."""

    def __init__(self, codes: Mapping[int, Tensor]):
        self.codes = codes

    def at(self, s: int) -> Tensor:
        """Codes (B, s²) of the images at side s."""
        return self.codes[s]

    def add(self, s: int, codes: Tensor) -> None:
        """Tell which codes (B, s²) side s was given in the end."""


def nearest_rows(z: Tensor, rows: Tensor) -> Tensor:
    """Vectors (…, D) → index of the nearest of the rows (V, D) by squared distance (…,), the first on a tie."""
    with torch.autocast(z.device.type, enabled=False):  # half precision would choose other rows
        rows, flat = rows.float(), z.flatten(0, -2).float()
        squares, found = rows.square().sum(1), []
        for part in flat.split(NEAREST_AT_ONCE):
            distance = part.square().sum(1, keepdim=True) + squares
            found.append(torch.addmm(distance, part, rows.T, alpha=-2).argmin(dim=1))
        return torch.cat(found).view(z.shape[:-1])


def area(maps: Tensor, s: int) -> Tensor:
    """Maps (B, D, h, w) → (B, D, s, s), by area."""
    return maps if maps.shape[-2:] == (s, s) else F.interpolate(maps, size=(s, s), mode="area")


def exact_convolutions(tf32: bool = False) -> AbstractContextManager:
    """Convolutions in full fp32 on a GPU, whose default is TF32: for codes and features that must not depend on it.

    With `tf32` they are in TF32 all the same.
    """
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32)


def from_bytes(images: Tensor) -> Tensor:
    """Images of bytes → fp32 in [-1, 1]; floats are so already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] → uint8, rounded, on the CPU."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
