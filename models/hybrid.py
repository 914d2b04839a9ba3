"""The hybrid model of Sec. 3.3: masked-token prediction at the first side, scale-wise autoregression at the finer ones.

Two sequences, of one class token each, run side by side through FlexVAR's blocks: [class, first side], in which every
token sees every other, and [class, finer sides], in which a side sees the class token and itself. As neither sees the
other, nothing of the first side reaches a finer one but through the inputs that are made of its codes.

Legend: B batch, n tokens of the first side, L tokens of a schedule, V codebook rows, D codebook width, C width, s side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flexvar import DecodingState, FlexVAR, FlexVARConfig
from models.head import Prediction, Sampler, guide, sample_tokens
from models.layers import attend
from models.sampling import SamplingConfig, Soften
from models.scales import Pathway, ScaleSchedule

SHARE_MEAN, SHARE_DEVIATION, SHARE_LEAST = 1.0, 0.25, 0.7  # of the hidden positions: a normal cut to [least, 1]


class MaskedInputs(NamedTuple):
    """Inputs of a parallel pass."""

    shifted: Tensor  # (B, L - n, D) of the finer sides
    codes: Tensor  # (B, n, D) embeddings of the first side's codes
    hidden: Tensor  # (B, n) where the mask token stands in their place


@dataclass(frozen=True)
class HybridFlags:
    """Flags of train.py."""

    first_side: int = 4  # hybrid: the side that is predicted by masked tokens; coarser ones are left out of --pn
    hybrid_shared_positions: bool = False  # hybrid: positions of the first side from the finer sides' map
    hybrid_cross_scale: bool = False  # hybrid: a finer side sees the finer sides before it, too


@dataclass(frozen=True)
class HybridConfig(FlexVARConfig):
    """A FlexVAR, and what the first side needs beside it."""

    first_side: int = 4
    shared_positions: bool = False  # the first side's positions from pos_1LC, instead of a map of its own
    cross_scale: bool = False  # a finer side sees the finer sides before it, too

    def build(self) -> HybridVAR:
        return HybridVAR(self)

    flags = (HybridFlags,)
    goes_with: ClassVar[dict[str, tuple[Any, ...]]] = {
        **FlexVARConfig.goes_with,
        "schedule": ("fixed",),
        "training_mode": ("teacher_forcing", "csfl"),
        "ssr": ("all",),
        "parallel": ("ddp",),
        "scale_weights": ("tokens",),
    }

    @classmethod
    def from_flags(cls, flags: HybridFlags, **sizes: Any) -> HybridConfig:
        own = {"shared_positions": flags.hybrid_shared_positions, "cross_scale": flags.hybrid_cross_scale}
        return cls(**sizes, first_side=flags.first_side, **own)

    @classmethod
    def scales(cls, flags: HybridFlags, schedule: ScaleSchedule) -> ScaleSchedule:
        if flags.first_side < 1:
            raise ValueError(f"--first_side must be at least 1, got {flags.first_side}")
        found = schedule.starting(flags.first_side)
        if len(found) < 2:
            raise ValueError(f"--model hybrid needs finer sides than --first_side {flags.first_side} in --pn")
        return found

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        return "mask_token" in weights

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, int]:
        side, cross_scale = weights["layout"].tolist()
        own = {"first_side": side, "cross_scale": bool(cross_scale), "shared_positions": "pos_first" not in weights}
        return {**super().sizes_of(weights), **own}


class HybridVAR(FlexVAR):
    """The transformer. Its schedules start at `first_side`."""

    config: HybridConfig
    no_decay = (*FlexVAR.no_decay, "pos_first", "mask_token")
    reads = (*FlexVAR.reads, "fill_steps")

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        n, std = config.first_side**2, math.sqrt(1 / config.width / 3)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        nn.init.trunc_normal_(self.mask_token, std=std)
        if not config.shared_positions:
            self.pos_first = nn.Parameter(torch.empty(n, config.width))
            nn.init.trunc_normal_(self.pos_first, std=std)
        # What no other tensor's shape tells whoever loads the weights.
        self.register_buffer("layout", torch.tensor([config.first_side, int(config.cross_scale)]))

    def trim(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """The sides of a schedule from this model's first one on. Raises ValueError when that is not among them."""
        return schedule.starting(self.config.first_side)

    # ------------------------------------------------------------------------------------------ training

    def inputs(
        self,
        tokens: Tensor,
        pathway: Pathway,
        schedule: ScaleSchedule,
        truth: Tensor | None = None,
        first: int = 1,
    ) -> MaskedInputs:
        """Tokens (B, L) → inputs of the finer sides, and the first side's codes with some positions hidden.

        In training the share that is hidden is drawn anew, the same for all images; in evaluation all are. Which
        positions those are differs from image to image.
        """
        share = draw_share() if self.training else 1.0
        return self.mask(tokens, pathway, schedule, share)

    def mask(self, tokens: Tensor, pathway: Pathway, schedule: ScaleSchedule, share: float) -> MaskedInputs:
        """`inputs` with a share of the first side's positions, rounded up, hidden."""
        n, m = schedule.lengths[0], math.ceil(share * schedule.lengths[0])
        positions = torch.rand(len(tokens), n, device=tokens.device).argsort(1)[:, :m]  # (B, m)
        hidden = torch.zeros(len(tokens), n, dtype=torch.bool, device=tokens.device).scatter_(1, positions, True)
        codes = pathway.embed(tokens[:, :n])
        return MaskedInputs(pathway.inputs(tokens, schedule), codes, hidden)

    def forward(
        self,
        labels: Tensor,
        inputs: MaskedInputs,
        schedule: ScaleSchedule,
        targets: Tensor | None = None,
        first: int = 0,
        sampler: Sampler | None = None,
        start: bool = True,
        features: bool = False,
    ) -> Tensor | Prediction:
        """See `FlexVAR.forward`. Of the first side, the hidden positions alone count in a `Prediction`."""
        assert start, "both sequences begin with a class token"
        condition = self.class_emb(labels)  # (B, C)
        token = self.first_scale(condition, 1, start)
        parts, groups, token_weights = [], [], None
        if first == 0:
            parts += [token, self.first_inputs(len(labels), inputs.codes, inputs.hidden)]
            groups.append(1 + schedule.lengths[0])
            token_weights = F.pad(inputs.hidden, (0, schedule.total - schedule.lengths[0]), value=True).float()
        finer = schedule.sides[1:]
        if finer:
            shifted = inputs.shifted[:, : schedule.total - schedule.lengths[0]]
            parts += [token, self.word_embed(shifted.to(self.word_embed.weight.dtype)) + self.positions(finer)]
        attention = HybridAttention(groups, schedule.lengths[1:], self.config.cross_scale)
        x = self.through_blocks(torch.cat(parts, dim=1), self.modulations(condition), [attention] * len(self.blocks))
        if first == 0:
            x = torch.cat([x[:, 1 : groups[0]], x[:, groups[0] + 1 :]], dim=1)  # (B, L, C)
        else:
            x = x[:, 1 + schedule.offsets[first] - schedule.lengths[0] :]
        return self.answer(self.head_nm(x, self.head_nm.ada_lin(condition)), targets, sampler, features, token_weights)

    def first_inputs(self, batch: int, codes: Tensor, hidden: Tensor) -> Tensor:
        """The first side's tokens (B, n, C): the mask token where hidden, else the code, and the position."""
        x = self.mask_token.expand(batch, self.config.first_side**2, -1)
        x = torch.where(hidden.unsqueeze(-1), x, self.word_embed(codes.to(self.word_embed.weight.dtype)))
        return x + (self.positions((self.config.first_side,)) if self.config.shared_positions else self.pos_first)

    # ------------------------------------------------------------------------------------------ sampling

    def init_cache(self, labels: Tensor, capacity: int) -> DecodingState:
        """As FlexVAR's; the finer sides' class token is remembered at once."""
        state = super().init_cache(labels, capacity)
        state.caches = [CachedHybridAttention(self.config.cross_scale) for _ in self.blocks]
        self.through_blocks(self.first_scale(state.condition, 1, start=True), state.modulations, state.caches)
        return state

    def guided(self, draw: SamplingConfig, sides: Sequence[int]) -> bool:
        return super().guided(draw, sides) or draw.guidance.half_ramp(1.0) > 0

    def draw_scale(
        self,
        state: DecodingState,
        pathway: Pathway,
        inputs: Tensor | None,
        i: int,
        schedule: ScaleSchedule,
        draw: SamplingConfig,
        noise: Tensor,
        soften: Soften | None = None,
    ) -> Tensor:
        """As FlexVAR's; the first side is filled step by step."""
        if i:
            return super().draw_scale(state, pathway, inputs, i, schedule, draw, noise, soften)
        order = noise[:, schedule.total :]
        return self.unmask_first_scale(state, pathway, draw, noise[:, schedule.span(0)], order)

    def uniforms_needed(self, schedule: ScaleSchedule) -> int:
        """One more for each position of the first side: for the order in which they are revealed."""
        return schedule.total + schedule.lengths[0]

    def unmask_first_scale(
        self, state: DecodingState, pathway: Pathway, draw: SamplingConfig, uniforms: Tensor, order: Tensor
    ) -> Tensor:
        """Codes of the first side (B, n), revealed in `draw.fill_steps` steps, in each image's own random order.

        After step j of K the share 1 - ½(1 + cos(πj/K)) is revealed. Guidance is a half-ramp over the steps, with j/K,
        whatever it is at the finer sides; as everywhere, that is none up to a scale of 1.

        Args:
            state: of B images, or of 2B with the unconditional half behind.
            uniforms: (B, n) what to draw the codes with.
            order: (B, n) numbers in whose order positions are revealed.
        """
        n, rank = uniforms.shape[1], order.argsort(1).argsort(1)
        codes, revealed = torch.zeros_like(rank), 0
        for j in range(1, draw.fill_steps + 1):
            upto = round(n * (0.5 - 0.5 * math.cos(math.pi * j / draw.fill_steps)))
            if upto == revealed:
                continue
            hidden = rank >= revealed
            weight = draw.guidance.half_ramp(j / draw.fill_steps)
            halves = self.first_logits(state, pathway.embed(codes), hidden, 2 if weight else 1)
            logits = guide(halves[0], halves[1], weight) if weight else halves[0]
            drawn = sample_tokens(logits, draw.top_k, draw.top_p, uniforms)
            codes, revealed = torch.where(hidden & (rank < upto), drawn, codes), upto
        return codes

    def first_logits(self, state: DecodingState, codes: Tensor, hidden: Tensor, halves: int) -> Sequence[Tensor]:
        """Logits of the first side (B, n, V) of the conditional half, or of both, from the same codes (B, n, D)."""
        rows = halves * len(codes)
        x = self.first_inputs(len(codes), codes, hidden).repeat(halves, 1, 1)
        x = torch.cat([self.first_scale(state.condition[:rows], 1, start=True), x], dim=1)
        x = self.through_blocks(x, [m[:rows] for m in state.modulations], [attend] * len(self.blocks))
        return self.head(self.head_nm(x[:, 1:], state.head_modulation[:rows])).chunk(halves)


class HybridAttention:
    """Groups of tokens that see all of their own group; then a class token, and finer sides that see it and themselves.

    With `cross_scale` a finer side also sees the finer ones before it.
    """

    def __init__(self, groups: Sequence[int], finer: Sequence[int], cross_scale: bool):
        self.groups, self.finer, self.cross_scale = list(groups), [1, *finer] if finer else [], cross_scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths, out = [*self.groups, *self.finer], []
        q, k, v = (x.split(lengths, dim=2) for x in (q, k, v))
        own = len(self.groups)  # number of the class token
        for i in range(len(lengths)):
            seen = [i] if i <= own else [*range(own, i + 1)] if self.cross_scale else [own, i]
            out.append(attend(q[i], torch.cat([k[j] for j in seen], dim=2), torch.cat([v[j] for j in seen], dim=2)))
        return torch.cat(out, dim=2)


class CachedHybridAttention:
    """The finer sides one at a time: remembers the class token, and with `cross_scale` every side."""

    def __init__(self, cross_scale: bool):
        self.cross_scale = cross_scale
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = self.k is None
        k, v = (k, v) if first else (torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2))
        if first or self.cross_scale:
            self.k, self.v = k, v
        return attend(q, k, v)


def draw_share() -> float:
    """The share of the first side to hide: from a normal, drawn again until it lies within [0.7, 1]."""
    while True:
        share = SHARE_MEAN + SHARE_DEVIATION * float(torch.randn((), device="cpu"))
        if SHARE_LEAST <= share <= 1:
            return share
