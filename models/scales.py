"""Scales: how a pyramid of token maps is laid out, drawn for a training step, and shifted up.

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width, s side of a scale.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ScaleSchedule:
    """The sides of the token maps, coarse to fine. Tokens of a scale are row-major, scales follow each other."""

    sides: tuple[int, ...]

    def __post_init__(self):
        if not self.sides or any(s < 1 for s in self.sides):
            raise ValueError(f"a schedule needs one or more positive sides, got {self.sides}")
        if any(a >= b for a, b in zip(self.sides, self.sides[1:], strict=False)):
            raise ValueError(f"the sides of a schedule must grow, got {self.sides}")

    @classmethod
    def parse(cls, text: str) -> ScaleSchedule:
        """`"1_2_3"`, `"1,2,3"` or `"1-2-3"` → ScaleSchedule((1, 2, 3))."""
        fields = text.replace(",", "_").replace("-", "_").split("_")
        if not all(f.strip().isdigit() for f in fields):
            raise ValueError(f"a schedule is written like 1_2_3_4_5_6_8_10_13_16, got {text!r}")
        return cls(tuple(int(f) for f in fields))

    def __len__(self) -> int:
        return len(self.sides)

    def __str__(self) -> str:
        """As `parse` takes it."""
        return "_".join(map(str, self.sides))

    def starting(self, side: int) -> ScaleSchedule:
        """The sides from one of them on. Raises ValueError when that is not among them."""
        if side not in self.sides:
            raise ValueError(f"the first side {side} is none of the scales {self.sides}")
        return ScaleSchedule(tuple(s for s in self.sides if s >= side))

    def required(self, model: str, asked: ScaleSchedule) -> ScaleSchedule:
        """This schedule, of a model that knows no other one. Raises ValueError when another one is asked for."""
        if asked != self:
            raise ValueError(f"this {model} knows the scales {self} and no others, such as {asked}")
        return self

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(s * s for s in self.sides)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each scale, and one more: the total."""
        return (0, *accumulate(self.lengths))

    @property
    def total(self) -> int:
        return self.offsets[-1]

    def span(self, i: int) -> slice:
        """The tokens of scale i (negative i counts from the finest)."""
        i %= len(self)
        return slice(self.offsets[i], self.offsets[i + 1])

    def split(self, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """(…, L, …) → one tensor a scale."""
        return x.split(self.lengths, dim)

    def by_side(self, tokens: Tensor) -> dict[int, Tensor]:
        """Tokens (B, L) → {side: (B, side²)}."""
        return dict(zip(self.sides, self.split(tokens), strict=True))


def to_tokens_of(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """A value for each scale (B, K, …) → for each of their tokens (B, L, …).

    Unlike `repeat_interleave` by a tensor, it makes no GPU's host wait for how many those are.
    """
    parts = [part.expand(-1, n, *part.shape[2:]) for part, n in zip(values.split(1, dim=1), lengths, strict=True)]
    return torch.cat(parts, dim=1)


DEFAULT_SCHEDULE = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
MAX_TOKENS = DEFAULT_SCHEDULE.total  # 680: a drawn schedule never costs more than the default one


def draw_schedule(seed: int, step: int) -> ScaleSchedule:
    """FlexVAR's schedule of one training step: a pure function of seed and step, so equal on every rank.

    With probability 0.05 the default schedule; else 1, 2, five distinct sides of 3…10, two of 11…15, and 16, of
    which up to four inner ones are dropped, and one of the last four as long as there are over 680 tokens.
    """
    rng = random.Random(f"schedule/{seed}/{step}")  # seeding with a string hashes it: the same on every platform
    if rng.random() < 0.05:
        return DEFAULT_SCHEDULE
    sides = [1, 2, *sorted(rng.sample(range(3, 11), 5)), *sorted(rng.sample(range(11, 16), 2)), 16]
    luck = rng.random()
    for _ in range(sum(luck < p for p in (0.10, 0.05, 0.02, 0.01))):
        del sides[rng.randrange(2, len(sides) - 1)]
    while sum(s * s for s in sides) > MAX_TOKENS:
        del sides[rng.randrange(len(sides) - 4, len(sides))]
    return ScaleSchedule(tuple(sides))


def shift_up(codes: Tensor, codebook_VD: Tensor, s_from: int, s_to: int) -> Tensor:
    """Codes of one scale (B, s_from²) → inputs of the next (B, s_to², D).

    The embedding map is resized bicubically. Teacher forcing, the stagger-scale rollout and sampling all build
    their inputs here (paper Eq. 2 and 6).
    """
    rows = F.embedding(codes, codebook_VD)  # (B, s_from², D)
    with torch.autocast(rows.device.type, enabled=False):
        return bicubic_weights(s_from, s_to, rows.device) @ rows  # (B, s_to², D)


def bicubic_weights(s_from: int, s_to: int, device: torch.device) -> Tensor:
    """Resizing an s_from × s_from map to s_to × s_to bicubically, as a matrix (s_to², s_from²).

    As a product it takes a tenth of the time of PyTorch's operator on a GPU.
    """
    lines = torch.eye(s_from, device=device)[None, :, :, None]  # a channel for each place, s_from high and 1 wide
    rows = F.interpolate(lines, (s_to, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T  # (s_to, s_from)
    return torch.kron(rows.contiguous(), rows.contiguous())


def shift_all(codes: Tensor, codebook_VD: Tensor, schedule: ScaleSchedule, first: int = 1) -> Tensor:
    """Codes of all scales (B, L) → inputs (B, n, D) of the scales from number `first` on, each from the one before it.

    The codes of the last scale are not used.
    """
    return UpsamplingPathway(codebook_VD).inputs(codes, schedule, None, first)


class Pathway(Protocol):
    """Meaning of a tokenizer's tokens: how they feed the next scale, in a parallel pass and in sampling."""

    def embed(self, codes: Tensor) -> Tensor: ...

    def own(self, tokens: Tensor) -> Tensor: ...

    def inputs(
        self, tokens: Tensor, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1
    ) -> Tensor: ...

    def corrected(self, fed: Tensor, truth: Tensor, schedule: ScaleSchedule) -> Tensor: ...

    def feeds(self, i: int) -> int: ...

    def soften(self, schedule: ScaleSchedule, draw: Any, seeds: Sequence[int]) -> Callable[[int, Tensor], Tensor]: ...

    def canvas(self, schedule: ScaleSchedule) -> Canvas: ...


class Canvas(Protocol):
    """Scales as they are sampled, coarse to fine."""

    def add(self, i: int, codes: Tensor) -> Tensor | None: ...


class UpsamplingPathway:
    """The upsampling pathway (paper, Sec. 3.1): a scale's tokens are codes of its own, and feed the next alone."""

    def __init__(self, codebook_VD: Tensor):
        self.codebook = codebook_VD

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, n) → their embeddings (B, n, D)."""
        return F.embedding(codes, self.codebook)

    def own(self, tokens: Tensor) -> Tensor:
        """Tokens as they are: of other pathways what feeds them may follow."""
        return tokens

    def inputs(self, tokens: Tensor, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1) -> Tensor:
        """Tokens of all scales (B, L), true or sampled → inputs (B, n, D) of scales number `first` on (Eq. 2, 6).

        `truth`: the true tokens (B, L), for pathways in which a scale's input is made of more than the scale before it.
        """
        parts = schedule.split(tokens)
        shifted = [self.shift(parts[i - 1], i - 1, schedule) for i in range(first, len(schedule))]
        return torch.cat(shifted, dim=1) if shifted else self.embed(tokens[:, :0])

    def shift(self, tokens: Tensor, i: int, schedule: ScaleSchedule) -> Tensor:
        """Tokens (B, s²) of scale i → inputs (B, s'², D) of the next."""
        return shift_up(tokens, self.codebook, *schedule.sides[i : i + 2])

    def corrected(self, fed: Tensor, truth: Tensor, schedule: ScaleSchedule) -> Tensor:
        """The truth: codes of a scale do not depend on those before it. See the residual pathway."""
        return truth

    def feeds(self, i: int) -> int:
        """Number of the first scale whose tokens the inputs of scale i are made of."""
        return i - 1

    def soften(self, schedule: ScaleSchedule, draw: Any, seeds: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
        """Raises ValueError: see the residual pathway."""
        raise ValueError("more_smooth mixes embeddings, which a residual pathway takes and this one does not")

    def canvas(self, schedule: ScaleSchedule) -> UpsamplingCanvas:
        """An empty canvas, for sampling to fill."""
        return UpsamplingCanvas(self, schedule)


class UpsamplingCanvas:
    """Scales as they are sampled, coarse to fine."""

    def __init__(self, pathway: UpsamplingPathway, schedule: ScaleSchedule):
        self.pathway, self.schedule = pathway, schedule

    def add(self, i: int, codes: Tensor) -> Tensor | None:
        """Add the codes (B, s²) of scale i. Returns the inputs (B, s'², D) of the next scale; None after the last."""
        return None if i + 1 == len(self.schedule) else self.pathway.shift(codes, i, self.schedule)
