"""Grids and curves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image


def grid(images: Tensor, columns: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] → one picture (3, H', W') in [0, 1]."""
    return make_grid(images.float().cpu().clamp(-1, 1).add(1).div(2), nrow=columns, padding=2, pad_value=1.0)


def save_picture(picture: Tensor, path: Path) -> None:
    """A picture (3, H, W) in [0, 1] → a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)


def square(n: int) -> int:
    """Columns that make n pictures about square."""
    return max(1, round(n**0.5))


def spread_labels(n: int, num_classes: int) -> Tensor:
    """n class ids, evenly over the classes (n,)."""
    return torch.arange(n) * num_classes // n if n <= num_classes else torch.arange(n) % num_classes


def read_metrics(directory: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


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
