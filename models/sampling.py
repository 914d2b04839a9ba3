"""Drawing images: guidance over the scales, and the walk over them.

Legend: B batch, L tokens of a schedule, V codebook rows, s side of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from models.scales import Pathway, ScaleSchedule
from models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from models.flexvar import FlexVAR

# Sides that released models were tuned to sample at; any other is taken greedily.
SAMPLED_SIDES = frozenset({1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32})

TOP_K, TOP_P = 900, 0.95  # of the paper's evaluation and rollouts

Kind = Literal["ramp", "half_ramp", "constant", "none"]
Edit = Callable[[int, Tensor], Tensor]  # side, sampled codes (B, s²) → codes that go on
Soften = Callable[[int, Tensor], Tensor]  # number of a scale, its guided logits (B, s², V) → embeddings (B, s², D)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = cond + w·(cond − uncond), with w growing over the scales, or not.

    | kind      | w at scale i of K (from 0)              | used by                         |
    |-----------|------------------------------------------|---------------------------------|
    | ramp      | scale · i / min(K−1, 9), of VAR i / (K−1)| evaluation                      |
    | half_ramp | scale · 0.5·(1 + i/(K−1)), if scale > 1  | rollouts in training; of a      |
    |           |                                          | flow-matching head as "ramp"    |
    | constant  | scale − 1                                | the released notebook           |
    | none      | 0                                        |                                 |
    """

    kind: Kind = "ramp"
    scale: float = 0.0

    def __post_init__(self):
        if self.kind not in ("ramp", "half_ramp", "constant", "none"):
            raise ValueError(f"guidance {self.kind!r} is none of ramp, half_ramp, constant, none")

    def weight(self, i: int, sides: Sequence[int], max_pn: int | None = None, ramp_end: int = 9) -> float:
        """w at scale i of a schedule. Ramp guidance is full at sides above max_pn, and at scale `ramp_end`."""
        last = len(sides) - 1
        if self.kind == "ramp":
            if max_pn is not None and sides[i] > max_pn:
                return self.scale
            return self.scale * i / min(last, ramp_end) if last else 0.0
        if self.kind == "half_ramp":
            return self.half_ramp(i / last if last else 0.0)
        return self.scale - 1 if self.kind == "constant" else 0.0

    def half_ramp(self, progress: float) -> float:
        """w of half-ramp guidance of this scale, whatever the kind; 0 where there is no guidance."""
        return self.scale * 0.5 * (1 + progress) if self.scale > 1 and self.kind != "none" else 0.0

    def weights(self, sides: Sequence[int], max_pn: int | None = None, ramp_end: int = 9) -> list[float]:
        """w at every scale."""
        return [self.weight(i, sides, max_pn, ramp_end) for i in range(len(sides))]


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling.

    `max_pn` is the released models' rule: sides above it, and those that they were not tuned to sample at, are taken
    greedily, and those above it at the full guidance scale. With None every side is drawn alike.
    """

    guidance: Guidance = Guidance()
    top_k: int = 0
    top_p: float = 0.0
    max_pn: int | None = None
    fill_steps: int = 8  # of a model that fills its first side step by step
    flow_steps: int = 25  # of Euler's method, of a flow-matching head
    guidance_interval: float = 0.9  # of a flow-matching head: guidance acts at times up to this one
    more_smooth: bool = False  # of a residual pathway: mixed embeddings instead of drawn ones, for pictures

    def greedy(self, s: int) -> bool:
        """True where the released models' rule takes side s greedily."""
        return self.max_pn is not None and (s > self.max_pn or s not in SAMPLED_SIDES)


def image_uniforms(seeds: Sequence[int], total: int, device: torch.device) -> Tensor:
    """Uniform numbers (B, total), one row from each image's own seed."""
    rows = [torch.rand(total, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device, non_blocking=True)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Class ids a user named; the unconditional class is not one of them."""
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be a non-empty list of class ids, got shape {tuple(labels.shape)}")
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        raise ValueError(f"class id {bad[0].item()} is out of range: this model knows 0…{num_classes - 1}")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode again outside, whatever happens."""
    modes = [m.training for m in modules]
    try:
        for m in modules:
            m.eval()
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.train(mode)


def generate_scales(
    model: FlexVAR,
    pathway: Pathway,
    labels: Tensor,
    schedule: ScaleSchedule,
    draw: SamplingConfig,
    noise: Tensor,
    edit: Edit | None = None,
    soften: Soften | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Sample scale by scale: cached forward → guidance → draw → canvas.

    Yields (side, codes (B, s²)) coarse to fine. `edit` may replace the codes of a scale before they are yielded and
    put on the canvas. The caller sees to evaluation mode and to `no_grad`, and supplies the noise that the model's
    `draw_noise` gives: for codes uniform numbers (B, L), or more. `soften` makes embeddings (B, s², D), which take the
    place of codes.
    """
    guided = model.guided(draw, schedule.sides)
    if guided:  # conditional half, then unconditional half
        labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    state, canvas = model.init_cache(labels, schedule.total), pathway.canvas(schedule)
    inputs = None
    for i, s in enumerate(schedule.sides):
        codes = model.draw_scale(state, pathway, inputs, i, schedule, draw, noise, soften)
        if edit is not None:
            codes = edit(s, codes)
        yield s, codes
        inputs = canvas.add(i, codes)  # (B, s'², D)
        if guided and inputs is not None:
            inputs = inputs.repeat(2, 1, 1)


@torch.no_grad()
def sample_codes(
    model: FlexVAR,
    pathway: Pathway,
    labels: Tensor,
    schedule: ScaleSchedule,
    draw: SamplingConfig,
    seeds: Sequence[int],
    edit: Edit | None = None,
    until: int = 0,
) -> dict[int, Tensor]:
    """`generate` without the decoder: {side: codes (B, s²)}. It stops after side `until`, if that is named."""
    check_labels(labels, model.config.num_classes)
    if len(seeds) != len(labels):
        raise ValueError(f"each image needs a seed of its own: {len(labels)} labels, {len(seeds)} seeds")
    device, schedule = model.device, model.trim(schedule)
    noise = model.draw_noise(seeds, schedule, device)
    codes: dict[int, Tensor] = {}
    soften = pathway.soften(schedule, draw, seeds) if draw.more_smooth else None
    with evaluating(model):
        for s, codes[s] in generate_scales(model, pathway, labels.to(device), schedule, draw, noise, edit, soften):
            if s == until:
                break
    return codes


@torch.no_grad()
def generate(
    model: FlexVAR,
    vae: Tokenizer,
    labels: Tensor,
    schedule: ScaleSchedule,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    edit: Edit | None = None,
) -> Tensor:
    """Images of the classes `labels`.

    Args:
        labels: (B,) class ids.
        schedule: sides to walk, any that the weights make sense of; the last one sets the resolution.
        sampling: guidance, top-k, top-p.
        seeds: one an image; an image depends on its own seed, not on its batch.
        edit: (side, codes (B, s²)) → codes, to hold some of them.

    Returns: (B, 3, factor·s_N, factor·s_N), in [-1, 1] but not clamped.
    """
    codes = sample_codes(model, vae.pathway, labels, schedule, sampling, seeds, edit)
    with evaluating(vae):
        return vae.decode_at(codes, schedule.sides[-1], model.trim(schedule))
