"""FID, sFID, IS, precision and recall from features, as the guided-diffusion evaluator defines them.

Legend: N samples, M reference images, D features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3  # precision and recall: a point's neighbourhood reaches to its third neighbour, itself not counted
BLOCK_FLOATS = 50_000_000  # of one block of distances
WINDOW = 11  # pixels of the side of SSIM's window


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance Σ (D, D; divided by n - 1) of features, in float64."""

    mean: Tensor
    covariance: Tensor
    root: Tensor | None = None  # (D, n) with root·rootᵀ = Σ, where features are few

    @classmethod
    def of(cls, features: Tensor | Iterable[Tensor]) -> Statistics:
        """Of features (N, D), or of a stream of them, (n, D) at a time."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        few: list[Tensor] = []  # all of them, while they are no more than their dimensions
        for part in [features] if isinstance(features, Tensor) else features:
            part = part.double()
            count, total, squares = count + len(part), part.sum(0) + total, part.T @ part + squares
            few = [*few, part] if count <= part.shape[1] else []
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        mean = total / count
        covariance = (squares - count * torch.outer(mean, mean)) / (count - 1)
        return cls(mean, covariance, (torch.cat(few) - mean).T / (count - 1) ** 0.5 if few else None)

    def half(self) -> Tensor:
        """H (D, n) with H·Hᵀ = Σ: the root, or a column for each positive eigenvalue."""
        if self.root is not None:
            return self.root
        values, vectors = torch.linalg.eigh(self.covariance)
        positive = values > values[-1:] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, positive] * values[positive].sqrt()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians: |μa - μb|² + tr(Σa + Σb - 2·√(Σa·Σb)).

    With Σa = H·Hᵀ, the trace of √(Σa·Σb) is that of √(Hᵀ·Σb·H), whose eigenvalues are real and not negative. What
    rounding leaves where an eigenvalue is zero counts as zero.
    """
    half, other = (b.half(), a) if a.root is None and b.root is not None else (a.half(), b)
    squares = torch.linalg.eigvalsh(half.T @ other.covariance @ half)
    noise = squares[-1:] * len(squares) * torch.finfo(squares.dtype).eps
    cross = squares.where(squares > noise, 0.0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return (shift + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def check_count(images: int, named: str) -> None:
    """Raises ValueError where precision and recall would find too few images, before any is computed on."""
    if images <= NEIGHBOURS:
        raise ValueError(f"{named}: to be compared, there must be at least {NEIGHBOURS + 1} images, not {images}")


def inception_score(probabilities: Iterable[Tensor], split_size: int = 5000) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))) of each run of `split_size` samples, then the mean over the runs.

    Args:
        probabilities: (n, classes) at a time, in the order of the samples.
    """
    scores = []
    for p in torch.cat([part.double() for part in probabilities]).split(split_size):
        marginal = p.mean(0, keepdim=True)
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)
        scores.append(kl.sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(samples: Tensor, reference: Tensor, fp16: bool = False) -> tuple[float, float]:
    """Share of samples (N, D) within the reference's manifold, and of reference images (M, D) within the samples'.

    A set's manifold is the union of balls around its points, each as wide as the distance to the point's third
    neighbour. `fp16` computes squared distances in half precision, as the original evaluator does.
    """
    sample_radii, reference_radii = radii(samples, fp16), radii(reference, fp16)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, distances in blocks(samples, reference, fp16):
        precise[rows] = (distances <= reference_radii).any(1)
        recalled |= (distances <= sample_radii[rows, None]).any(0)
    return precise.double().mean().item(), recalled.double().mean().item()


def radii(points: Tensor, fp16: bool) -> Tensor:
    """Squared distance of each point (N, D) to its third neighbour (N,)."""
    k = NEIGHBOURS + 1  # a point is its own nearest
    if len(points) < k:
        raise ValueError(f"precision and recall need at least {k} images, got {len(points)}")
    return torch.cat([d.topk(k, dim=1, largest=False).values[:, -1] for _, d in blocks(points, points, fp16)])


def blocks(a: Tensor, b: Tensor, fp16: bool) -> Iterable[tuple[slice, Tensor]]:
    """Squared distances of a (N, D) to b (M, D), some rows at a time: (rows, (n, M))."""
    step = max(1, BLOCK_FLOATS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        distances = squared_distances(a[rows], b, fp16)
        if fp16 and not distances.isfinite().all():
            distances = squared_distances(a[rows], b, False)
        yield rows, distances


def squared_distances(a: Tensor, b: Tensor, fp16: bool) -> Tensor:
    """|a|² + |b|² - 2·a·b, not below zero (N, M). With fp16 every quantity is rounded to half precision."""

    def half(x: Tensor) -> Tensor:
        return x.half().float() if fp16 else x

    a, b = half(a.float()), half(b.float())
    products = half(a @ b.T)
    norms = half(a.square().sum(1, keepdim=True)), half(b.square().sum(1))
    return half(norms[0] + norms[1] - 2 * products).clamp_min(0)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (B, C, H, W) in 0…255, in dB (B,)."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp_min(1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in 0…255, Gaussian window 11 × 11 with σ = 1.5 (B,).

    Source: Wang et al. 2004, K1 = 0.01, K2 = 0.03; over the windows that lie within the image.
    """
    offsets = torch.arange(WINDOW, device=a.device, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()

    def band(n: int) -> Tensor:
        """(n - 10, n): row i holds the window's weights from column i on."""
        rows = torch.arange(n - WINDOW + 1, device=a.device).unsqueeze(1)
        columns = rows + torch.arange(WINDOW, device=a.device)
        return line.new_zeros(len(rows), n).scatter_(1, columns, line.expand(len(rows), -1))

    down, across = band(a.shape[-2]), band(a.shape[-1]).T

    def local(x: Tensor) -> Tensor:  # the window is a product of two lines
        return down @ x @ across

    a, b = a.double(), b.double()
    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    cov = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))
