"""Editing without training: the codes of the known region are held at every scale.

Legend: B batch, H × W pixels, s side of a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.flexvar import FlexVAR
from models.sampling import Edit, SamplingConfig, generate
from models.scales import ScaleSchedule
from models.tokenizer import Tokenizer


def hold_known(
    vae: Tokenizer, images: Tensor, masks: Tensor, schedule: ScaleSchedule, supervision: str = "latent"
) -> Edit:
    """Hold the codes of images (B, 3, H, W) wherever masks (B, 1, H, W; 1 repaints, 0 keeps) let them.

    A cell is repainted when more of it than a bound is masked. The bound falls from a half at the coarsest scale,
    whose few cells would else all be lost to a small mask, to nothing at the finest.
    """
    known = vae.known(images, schedule, supervision)
    finest = schedule.sides[-1]
    repaint = {
        s: F.interpolate(masks.float(), size=(s, s), mode="area").flatten(1) > 0.5 * (1 - s / finest)
        for s in schedule.sides
    }  # (B, s²)

    def edit(s: int, codes: Tensor) -> Tensor:
        cells = repaint[s] if codes.ndim == 2 else repaint[s].unsqueeze(-1)
        codes = torch.where(cells, codes, known.at(s))
        known.add(s, codes)
        return codes

    return edit


def inpaint(
    model: FlexVAR,
    vae: Tokenizer,
    images: Tensor,
    masks: Tensor,
    labels: Tensor,
    schedule: ScaleSchedule,
    draw: SamplingConfig,
    seeds: Sequence[int],
    supervision: str = "latent",
) -> Tensor:
    """Repaint the masked region of images as the classes `labels`; every other pixel stays as it is.

    Args:
        images: (B, 3, H, W) in [-1, 1], H = W = factor · the schedule's finest side.
        masks: (B, 1, H, W): 1 repaints a pixel, 0 keeps it.
        labels: (B,) class ids. With another class than the image's own this is class-conditional editing; with a
            mask around a smaller picture it is out-painting (`place_on_canvas`).
        supervision: how the model's training made codes of images: see `Tokenizer.tokenize`.

    Returns: (B, 3, H, W) in [-1, 1].
    """
    if draw.more_smooth:
        raise ValueError("more_smooth is for pictures from scratch: painting holds codes")
    side = schedule.sides[-1] * vae.config.factor
    if images.shape[-2:] != (side, side):
        raise ValueError(f"these scales make {side}×{side} images, got one of {tuple(images.shape[-2:])}")
    if masks.shape != (len(images), 1, side, side):
        raise ValueError(f"the mask must be {(len(images), 1, side, side)}, as the image, got {tuple(masks.shape)}")
    device = model.device
    images, masks = images.to(device), masks.to(device)
    edit = hold_known(vae, images, masks, schedule, supervision)
    painted = generate(model, vae, labels, schedule, draw, seeds, edit)
    return torch.where(masks > 0.5, painted.clamp(-1, 1), images)


def place_on_canvas(images: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Shrink images (B, 3, H, W) to `share` of the side, in the middle of a grey canvas of the old size.

    Returns: the canvas (B, 3, H, W) and the mask (B, 1, H, W) of what is to be painted around the picture.
    """
    if not 0 < share < 1:
        raise ValueError(f"the picture must take more than 0 and less than 1 of the canvas, got {share}")
    side = images.shape[-1]
    inner = max(1, round(side * share))
    start = (side - inner) // 2
    window = slice(start, start + inner)
    canvas, mask = torch.zeros_like(images), torch.ones_like(images[:, :1])
    canvas[:, :, window, window] = F.interpolate(images, size=(inner, inner), mode="area")
    mask[:, :, window, window] = 0
    return canvas, mask
