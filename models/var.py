"""VAR: predicts at each scale the residual that is added to the canvas of all coarser ones; one schedule a model.

Legend: B batch, L tokens of the schedule, K scales, C width, D codebook width, s side of a scale.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.flexvar import FlexVAR, FlexVARConfig
from models.layers import AdaLinear, Block
from models.scales import DEFAULT_SCHEDULE, Pathway, ScaleSchedule


@dataclass(frozen=True)
class VARFlags:
    """Flags of train.py."""

    shared_aln: bool = False  # var: one AdaLN for all blocks (the released d36), instead of one each


@dataclass(frozen=True)
class VARConfig(FlexVARConfig):
    """A FlexVAR's sizes, and the scales that the weights belong to."""

    codebook_size: int = 4096
    sides: tuple[int, ...] = DEFAULT_SCHEDULE.sides
    shared_aln: bool = False

    flags = (VARFlags,)
    goes_with: ClassVar[dict[str, tuple[Any, ...]]] = {
        "schedule": ("fixed",),
        "supervision": ("latent",),
        "csf_target": ("teacher", "ground_truth", "teacher_soft", "requantised"),
        "rollout_steps": (25,),
        "ssr_share": (1.0,),
    }
    pathway = "residual"
    released_tokenizer = "pretrained/vae_ch160v4096z32.pth"
    released_max_pn = None
    ramp_end = sys.maxsize  # the last scale

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "sides", ScaleSchedule(tuple(self.sides)).sides)

    @property
    def only_schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.sides)

    def build(self) -> VAR:
        return VAR(self)

    @classmethod
    def from_flags(cls, flags: Any, **sizes: Any) -> VARConfig:
        return cls(**sizes, sides=flags.scales.sides, shared_aln=flags.shared_aln)

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        return "lvl_embed.weight" in weights

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        if "blocks.0.attn.scale_mul_1H11" not in weights:
            raise ValueError(
                "its attention does not normalise queries and keys (attn_l2_norm), which is not known here"
            )
        sides = tuple(math.isqrt(n) for n in weights["lvl_1L"].flatten().bincount().tolist())
        return {**super().sizes_of(weights), "sides": sides, "shared_aln": "shared_ada_lin.1.weight" in weights}


class VAR(FlexVAR):
    """The transformer: FlexVAR's, with a position a token and an embedding a scale in place of a map of positions."""

    config: VARConfig
    no_decay = (*FlexVAR.no_decay, "lvl_embed.weight", "ada_gss")

    def __init__(self, config: VARConfig | None = None):
        config = config or VARConfig()
        self.schedule = ScaleSchedule(config.sides)
        super().__init__(config)

    def make_parts(self) -> None:
        """The position of each token, the embedding of each scale, and blocks, with AdaLN of their own or shared."""
        config, width = self.config, self.config.width
        self.pos_1LC = nn.Parameter(torch.empty(1, self.schedule.total, width))
        self.lvl_embed = nn.Embedding(len(self.schedule), width)
        levels = [torch.full((n,), i) for i, n in enumerate(self.schedule.lengths)]
        self.register_buffer("lvl_1L", torch.cat(levels).unsqueeze(0))  # in released files; says what the scales are
        if config.shared_aln:
            self.shared_ada_lin = AdaLinear(width, 6)
        self.make_blocks(lambda drop_path: Block(width, config.heads, drop_path, own_modulation=not config.shared_aln))

    def shard_units(self) -> list[nn.Module]:
        return [self.shared_ada_lin, *self.blocks] if self.config.shared_aln else super().shard_units()

    def init_positions(self, std: float) -> None:
        """N(√(1/3C)), as other embeddings."""
        nn.init.trunc_normal_(self.pos_1LC, std=std)

    def init_modulation(self, block: Block) -> None:
        """Of shared AdaLN, what each block adds: N(√(1/C)) times alng for the gates and aln for the rest."""
        if not self.config.shared_aln:
            return super().init_modulation(block)
        nn.init.normal_(block.ada_gss, std=math.sqrt(1 / self.config.width))
        block.ada_gss[:, :, :2].mul_(self.config.alng)
        block.ada_gss[:, :, 2:].mul_(self.config.aln)
        return None

    def trim(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """The schedule itself. Raises ValueError when it is not the one that the weights belong to."""
        return self.schedule.required("VAR", schedule)

    def inputs(
        self, tokens: Tensor, pathway: Pathway, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1
    ) -> Tensor:
        return pathway.inputs(tokens, self.trim(schedule), truth, first)

    def modulations(self, condition: Tensor) -> list[Tensor]:
        if not self.config.shared_aln:
            return super().modulations(condition)
        return [self.shared_ada_lin(condition)] * len(self.blocks)

    def positions(self, sides: Sequence[int]) -> Tensor:
        """Position and scale of each token of these sides (n, C), which are some of the schedule's."""
        numbers = [self.schedule.sides.index(s) for s in sides]
        return torch.cat([self.pos_1LC[0, self.schedule.span(i)] + self.lvl_embed.weight[i] for i in numbers])
