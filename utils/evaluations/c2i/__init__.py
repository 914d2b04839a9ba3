"""Metrics of class-conditional images."""

from utils.evaluations.c2i.metrics import Statistics, frechet_distance

__all__ = ["Statistics", "frechet_distance"]
