"""Grids, captions, strips and curves."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def grid(images: Tensor, columns: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] → one picture (3, H', W') in [0, 1]."""
    from torchvision.utils import make_grid  # as long to import as all else that an entry needs

    return make_grid(images.float().cpu().clamp(-1, 1).add(1).div(2), nrow=columns, padding=2, pad_value=1.0)


def save_picture(picture: Tensor, path: Path) -> None:
    """A picture (3, H, W) in [0, 1] → a PNG file."""
    from torchvision.utils import save_image  # as above

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)


def square(n: int) -> int:
    """Columns that make n pictures about square."""
    return max(1, round(n**0.5))


def spread_labels(n: int, num_classes: int) -> Tensor:
    """n class ids, evenly over the classes (n,)."""
    return torch.arange(n) * num_classes // n if n <= num_classes else torch.arange(n) % num_classes


def grid_layout(images: int, columns: int, cell: int, captioned: bool) -> tuple[int, int, int, int]:
    """Of a captioned grid: width, height, a caption's height, the gap between pictures."""
    gap, bar = max(2, cell // 64), caption_size(cell) * 3 // 2 if captioned else 0
    return columns * (cell + gap) + gap, -(-images // columns) * (cell + bar + gap) + gap, bar, gap


def grid_size(images: int, columns: int, side: int) -> tuple[int, int]:
    """Width and height of a captioned grid of pictures of this side."""
    return grid_layout(images, columns, max(side, SMALLEST_CELL), captioned=True)[:2]


SMALLEST_CELL = 128  # pixels
SMALLEST_FONT = 8  # of a long caption


def caption_size(cell: int) -> int:
    return max(12, cell // 11)


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int, cell: int = 0) -> Image.Image:
    """Pictures of one size in rows, each over its caption. Small ones are enlarged so that captions can be read."""
    cell = cell or max(images[0].width, SMALLEST_CELL)
    width, height, bar, gap = grid_layout(len(images), columns, cell, any(captions))
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + bar + gap)
        sheet.paste(enlarge(image, cell), (x, y))
        size = caption_size(cell)
        while size > SMALLEST_FONT and caption_font(size).getlength(caption) > cell:
            size -= 1
        font = caption_font(size)
        while caption and font.getlength(caption) > cell:
            caption = caption[:-2].rstrip() + "…" if not caption.endswith("…") else caption[:-2] + "…"
        draw.text((x + cell / 2, y + cell + bar / 2), caption, font=font, fill="black", anchor="mm")
    return sheet


@lru_cache
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has more than ASCII."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """A square picture at another size, its pixels kept visible when it grows. Raises ValueError for any other."""
    if image.width != image.height:
        raise ValueError(f"a picture of {image.width}×{image.height} is no square")
    method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
    return image if image.width == side else image.resize((side, side), method)


def coarse_to_fine(steps: dict[int, list[Image.Image]], captions: list[str]) -> Image.Image:
    """A strip: a row an image, a column a scale."""
    finest = max(steps)
    cell = max(steps[finest][0].width, SMALLEST_CELL)
    cells, texts = [], []
    for i, name in enumerate(captions):
        for s, images in steps.items():
            cells.append(images[i])
            texts.append(f"{s}×{s}" if s != finest else f"{s}×{s} {name}")
    return captioned_grid(cells, texts, columns=len(steps), cell=cell)


def save_gif(steps: dict[int, list[Image.Image]], path: Path) -> None:
    """The scales as frames, all images side by side; the last frame stays longest."""
    finest = max(steps)
    cell = max(steps[finest][0].width, SMALLEST_CELL)
    frames = [
        captioned_grid(images, [f"{s}×{s}"] * len(images), square(len(images)), cell=cell)
        for s, images in steps.items()
    ]
    durations = [400] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


Curves = dict[str, tuple[list[int], list[float]]]  # name → x, y


def plot_curves(panels: dict[str, Curves], axes: tuple[str, str], path: Path) -> None:
    """Named curves of (x, y), a panel a title, into one PNG. Curves of up to three points are drawn as markers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 3.6), layout="constrained")
    for plot, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, (x, y) in curves.items():
            plot.plot(x, y, marker="o" if len(x) <= 3 else None, markersize=4, label=name)
        plot.set(title=title, xlabel=axes[0], ylabel=axes[1])
        plot.grid(alpha=0.3)
        plot.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
