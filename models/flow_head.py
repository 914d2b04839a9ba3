"""The flow-matching head: a transformer over the tokens of one scale that predicts the velocity from data to noise.

Legend: B batch, L tokens of some scales, K those scales, D width of a token, C width of a condition, w the head's.

On the path x_t = (1 - t)·x + t·ε, t = 1 is noise ε and t = 0 is data x; the velocity is ε - x. Time and the state of
the ODE stay in full precision, whatever the caller works in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.flow_layers import CrossBlock, FinalLayer, PlainBlock, TimeEmbedding, WithinScales, rope_tables
from models.sampling import SamplingConfig
from models.scales import ScaleSchedule, to_tokens_of

UNIFORM = 50  # number of steps whose grid is uniform


def euler_times(steps: int) -> list[float]:
    """Times of Euler's method, from 1 to 0, as published: uniform for 50 steps, else half of them from 1 to 0.3, and
    half from 0.25 to 0. Of an odd number one step less is taken."""
    if steps < 2:
        raise ValueError(f"Euler's method needs 2 steps at least, got {steps}")
    if steps == UNIFORM:
        return np.linspace(1, 0, steps + 1).tolist()
    half = steps // 2
    return [*np.linspace(1, 0.3, half).tolist(), *np.linspace(0.25, 0, half + 1).tolist()]


@dataclass(frozen=True)
class FlowSampler:
    """Settings to sample the tokens start…end of a parallel pass from its conditions, all scales at once (Eq. 5)."""

    start: int
    end: int
    noise: Tensor  # (B, L, D)
    steps: int = 25  # of Euler's method; 1: a single one, from noise to an estimate of the mean
    interval: float = 1.0  # guidance acts at times up to this one
    unconditional: Tensor | None = None  # (B, end, C) conditions of the unconditional class, to guide by
    weights: Tensor | None = None  # (end, 1) guidance weight of each token

    def guided(self, unconditional: Tensor, weights: Tensor) -> FlowSampler:
        """A copy with guidance by the unconditional class."""
        return replace(self, unconditional=unconditional, weights=weights)


class FlowTarget(NamedTuple):
    """Target of a pass that is more than data: a point on the path, and the velocity there."""

    tokens: Tensor  # (B, L, D)
    time: Tensor  # (B, K)
    noise: Tensor  # (B, L, D)
    velocity: Tensor | None = None  # (B, L, D); None: that of the path


class FlowPrediction(NamedTuple):
    """Result of a parallel pass at the tokens (B, L) that it was asked for. Only `loss` carries a gradient."""

    loss: Tensor  # Σ over scales of (s²/S²)·mean squared error
    losses: Tensor  # (B, L) mean squared errors of the velocity
    time: Tensor  # (B, K)
    noise: Tensor  # (B, L, D)
    velocity: Tensor  # (B, L, D)
    sampled: Tensor | None = None  # (B, L, D); zeros where nothing was sampled

    def shares(self) -> dict[str, Tensor]:
        """Nothing: continuous samples agree with nothing exactly."""
        return {}

    def metrics(self, schedule: ScaleSchedule, first: int = 0) -> dict[str, Tensor]:
        """Mean squared error of each scale from number `first` on."""
        parts = self.losses.split(schedule.lengths[first:], dim=1)
        return {f"loss_side/{s}": part.mean() for s, part in zip(schedule.sides[first:], parts, strict=True)}

    def targets(self, kind: str, truth: Tensor, schedule: ScaleSchedule, first: int) -> Tensor | FlowTarget:
        """Targets of a second pass at the scales from number `first` on, by --csf_target.

        teacher: this pass's samples, as data; velocity: its velocities, at the points where they were predicted;
        ground_truth: the true velocities, at the same points.
        """
        start = schedule.offsets[first]
        if kind == "teacher":
            return self.sampled[:, start:]
        velocity = self.velocity[:, start:] if kind == "velocity" else None
        return FlowTarget(truth[:, start:], self.time[:, first:], self.noise[:, start:], velocity)


class FlowHead(nn.Module):
    """Tokens on the path, times and conditions → velocities."""

    def __init__(self, dim: int, condition: int, width: int, depth: int, cross: bool):
        super().__init__()
        self.dim, self.width = dim, width
        self.time_embed = TimeEmbedding(width)
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(dim, width)
        self.res_blocks = nn.ModuleList(CrossBlock(width) if cross else PlainBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, dim)

    def forward(self, x: Tensor, t: Tensor, z: Tensor, sides: Sequence[int], full: int) -> Tensor:
        """x (B, L, D) on the path, t (B, K), z (B, L, C), of K scales of these sides → velocities (B, L, D) in fp32.

        `full`: the finest side of the model.
        """
        lengths = [s * s for s in sides]
        tau = to_tokens_of(self.time_embed(t), lengths)  # (B, L, w)
        c, x = self.cond_embed(z), self.input_proj(x.to(self.input_proj.weight.dtype))
        rope, attention = rope_tables(sides, full, 64, x.device), WithinScales(lengths)
        for block in self.res_blocks:
            x = block(x, z, c, tau, rope, attention)
        return self.final_layer(x, c + tau).float()

    def sampler(
        self, draw: SamplingConfig, start: int, end: int, shape: tuple[int, int], device: torch.device
    ) -> FlowSampler:
        """Settings by which the tokens start…end of a pass (B, L) = `shape` are sampled, without guidance."""
        noise = torch.randn(*shape, self.dim, device=device)
        return FlowSampler(start, end, noise, draw.flow_steps, draw.guidance_interval)

    def predict(
        self,
        z: Tensor,
        targets: Tensor | FlowTarget,
        schedule: ScaleSchedule,
        first: int = 0,
        sampler: FlowSampler | None = None,
    ) -> FlowPrediction:
        """Flow loss at the scales from number `first` on, z (B, L, C) being their conditions.

        Times and noise are drawn, one time an image and scale, unless the targets name them.
        """
        sides, full = schedule.sides[first:], schedule.sides[-1]
        if not isinstance(targets, FlowTarget):
            time = torch.rand(len(z), len(sides), device=z.device)
            targets = FlowTarget(targets, time, torch.randn(*targets.shape[:2], self.dim, device=z.device))
        tokens, time, noise, velocity = targets
        tokens = tokens[..., : self.dim]  # those of image_pixels go on with their own inputs
        t = to_tokens_of(time, schedule.lengths[first:]).unsqueeze(-1)
        found = self((1 - t) * tokens + t * noise, time, z, sides, full)
        losses = (found - (noise - tokens if velocity is None else velocity)).square().mean(-1)  # (B, L)
        sampled = None
        if sampler is not None:
            with torch.no_grad():
                sampled = self.sample(z, sampler, schedule, first)
        return FlowPrediction(losses.mean(0).sum() / full**2, losses.detach(), time, noise, found.detach(), sampled)

    def sample(self, z: Tensor, sampler: FlowSampler, schedule: ScaleSchedule, first: int) -> Tensor:
        """Samples (B, L, D) of the tokens that a sampler names, from their conditions z (B, L, C); zeros elsewhere."""
        span = slice(sampler.start, sampler.end)
        ends = [end - schedule.offsets[first] for end in schedule.offsets[first:]]
        sides = schedule.sides[first + ends.index(sampler.start) : first + ends.index(sampler.end)]
        unconditional = None if sampler.unconditional is None else sampler.unconditional[:, span]
        weights = None if sampler.weights is None else sampler.weights[span]
        times = [1.0, 0.0] if sampler.steps == 1 else euler_times(sampler.steps)
        found = torch.zeros_like(sampler.noise)
        found[:, span] = self.integrate(
            sampler.noise[:, span],
            times,
            z[:, span],
            unconditional,
            weights,
            sampler.interval,
            sides,
            schedule.sides[-1],
        )
        return found

    def integrate(
        self,
        noise: Tensor,
        times: Sequence[float],
        z: Tensor,
        unconditional: Tensor | None,
        weights: Tensor | float | None,
        interval: float,
        sides: Sequence[int],
        full: int,
    ) -> Tensor:
        """Euler's method from noise (B, n, D) at times[0] to times[-1], in float64.

        Where weights are given, v = v_c + w·(v_c - v_u) at times up to `interval`; the unconditional half is not
        computed elsewhere.
        """
        x = noise.double()
        for t, after in pairwise(times):
            guided = unconditional is not None and t <= interval
            time = torch.full((len(x), len(sides)), t, dtype=torch.float32, device=x.device)
            if guided:
                halves = torch.cat([x, x]).float(), torch.cat([time, time]), torch.cat([z, unconditional])
                v, v_u = self(*halves, sides, full).chunk(2)
                v = v + weights * (v - v_u)
            else:
                v = self(x.float(), time, z, sides, full)
            x = x + (after - t) * v.double()
        return x.float()
