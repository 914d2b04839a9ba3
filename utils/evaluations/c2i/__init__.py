"""Metrics of class-conditional images: the guided-diffusion evaluator's, streamed. See README.md beside this."""

from utils.evaluations.c2i.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)

__all__ = ["Statistics", "frechet_distance", "inception_score", "precision_recall", "psnr", "ssim"]
