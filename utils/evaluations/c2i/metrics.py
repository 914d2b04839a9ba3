"""Distances between sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D; divided by n - 1) of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (N, D)."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians: |μa - μb|² + tr(Σa + Σb - 2·√(Σa·Σb)).

    The trace of √(Σa·Σb) is that of √(√Σa·Σb·√Σa), whose eigenvalues are real and not negative; those that rounding
    makes negative count as zero.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return (shift + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()
