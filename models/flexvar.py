"""FlexVAR: a class-conditional transformer that predicts the codes of each scale from the scale before it.

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width, C width, s side of a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.head import CategoricalHead, Prediction, Sampler, guide, sample_tokens
from models.layers import Attend, Block, CachedAttention, HeadNorm, ScaleCausalAttention
from models.sampling import SamplingConfig, Soften, image_uniforms
from models.scales import Pathway, ScaleSchedule
from models.vqvae import VQVAEConfig

POSITION_SIDE = 32  # side of the learned position map, resized to each scale


@dataclass(frozen=True)
class FlexVARConfig:
    """Sizes and initial scales. Width defaults to 64·depth and drop path to 0.1·depth/24, as in released models."""

    depth: int = 16
    width: int = 0
    num_classes: int = 1000
    codebook_size: int = 8912
    codebook_dim: int = 32
    drop_path: float | None = None
    aln: float = 0.5
    alng: float = 1e-3

    def __post_init__(self):
        object.__setattr__(self, "width", self.width or 64 * self.depth)
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", 0.1 * self.depth / 24)
        if self.depth < 1 or self.width < 64 or self.width % 64:
            raise ValueError(f"need depth ≥ 1 and a width of 64·heads, got {self.depth} and {self.width}")

    @property
    def heads(self) -> int:
        return self.width // 64

    def build(self) -> FlexVAR:
        """A model of these sizes."""
        return FlexVAR(self)

    # What the other files ask of a generator: see `models/generators.py`.
    flags: ClassVar[tuple[type, ...]] = ()  # dataclasses of the flags of train.py that only this generator reads
    goes_with: ClassVar[dict[str, tuple[Any, ...]]] = {
        "supervision": ("latent", "image"),
        "rollout_canvas": ("accumulated",),
        "csf_target": ("teacher", "ground_truth", "teacher_soft"),
        "rollout_steps": (25,),
    }  # flag of train.py → the values that it goes with

    pathway: ClassVar[str] = "upsampling"  # of the tokenizers that it goes with
    released_tokenizer: ClassVar[str] = "pretrained/FlexVAE.pth"
    released_max_pn: ClassVar[int | None] = 16  # sides that released models are sampled at: see `SamplingConfig`

    ramp_end: ClassVar[int] = 9  # number of the scale at which ramp guidance reaches its scale, at the latest

    @property
    def only_schedule(self) -> ScaleSchedule | None:
        """The schedule that the weights belong to; None: any."""
        return None

    def check_tokenizer(self, vae: VQVAEConfig, ckpt: str | Path, vae_ckpt: str | Path) -> None:
        """Raises ValueError when the model of `ckpt` cannot go with the tokenizer of `vae_ckpt`."""
        if vae.pathway != self.pathway:
            raise ValueError(
                f"{ckpt} needs a tokenizer of the {self.pathway} pathway, like {self.released_tokenizer}; "
                f"{vae_ckpt} is of the {vae.pathway} one"
            )
        if (vae.codebook_size, vae.codebook_dim) != (self.codebook_size, self.codebook_dim):
            raise ValueError(
                f"{ckpt} predicts codes of a {self.codebook_size} × {self.codebook_dim} codebook, "
                f"{vae_ckpt} has one of {vae.codebook_size} × {vae.codebook_dim}"
            )

    @classmethod
    def tokenizer_options(cls, flags: Any) -> dict[str, float]:
        """Options of `load_tokenizer` that train.py's flags name."""
        return {}

    @classmethod
    def from_flags(cls, flags: object, **sizes: Any) -> FlexVARConfig:
        """The config that train.py's flags name; `sizes` are what tokenizer, data and common flags decide."""
        return cls(**sizes)

    @classmethod
    def scales(cls, flags: object, schedule: ScaleSchedule) -> ScaleSchedule:
        """The scales of --pn that a model of these flags has. Raises ValueError when it can have none of them."""
        return schedule

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        """True for the state dict of such a model."""
        return "word_embed.weight" in weights

    @classmethod
    def adapted(cls, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of such a file, under the names that are used here."""
        return weights

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Sizes, read off the tensors of a state dict. Raises KeyError for what is missing."""
        width, dim = weights["word_embed.weight"].shape
        depth = 0
        while f"blocks.{depth}.attn.mat_qkv.weight" in weights:
            depth += 1
        return {
            "depth": depth,
            "width": width,
            "num_classes": weights["class_emb.weight"].shape[0] - 1,
            "codebook_size": weights["head.weight"].shape[0],
            "codebook_dim": dim,
        }


@dataclass
class DecodingState:
    """State of a cached forward, carried from scale to scale; it belongs to the caller, not to the module."""

    condition: Tensor  # (B, C)
    modulations: list[Tensor]  # (B, 1, 6, C) a block
    head_modulation: Tensor  # (B, 1, 2, C)
    caches: list[Any]  # of keys and values, one a block


class FlexVAR(nn.Module):
    """The transformer. Nothing in it depends on a schedule: any sides the caller names will do."""

    config: FlexVARConfig
    no_decay: tuple[str, ...] = ("pos_1LC", "pos_start", "scale_mul_1H11")  # parameters that weight decay leaves alone
    scale_weights = "tokens"  # in the loss: "equal" gives each scale the same, not each token
    reads: tuple[str, ...] = ("top_k", "top_p", "max_pn")  # settings of sampling, of those that some models read

    def __init__(self, config: FlexVARConfig | None = None):
        super().__init__()
        self.config = config = config or FlexVARConfig()
        width = config.width
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # the last row is the unconditional class
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.word_embed = nn.Linear(config.codebook_dim, width)
        self.make_parts()
        self.head_nm = HeadNorm(width)
        self.head = CategoricalHead(width, config.codebook_size)
        self.checkpoint_activations = False  # keep only the blocks' inputs for backward, and compute the rest again
        self.init_weights()

    def make_parts(self) -> None:
        """The map of positions, and the blocks."""
        width, heads = self.config.width, self.config.heads
        self.pos_1LC = nn.Parameter(torch.empty(1, width, POSITION_SIDE, POSITION_SIDE))
        self.make_blocks(lambda drop_path: Block(width, heads, drop_path))

    def make_blocks(self, block: Callable[[float], Block]) -> None:
        """Blocks, from the drop path of each."""
        drop_paths = torch.linspace(0, self.config.drop_path, self.config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(block(p) for p in drop_paths)

    def shard_units(self) -> list[nn.Module]:
        """The parts that fully sharded training gathers one at a time, inner ones first."""
        # A block's modulation is computed before the block runs.
        return [part for block in self.blocks for part in (block.get_submodule("ada_lin"), block)]

    def compile_parts(self) -> None:
        """Compile the blocks, all but their attention."""
        for block in self.blocks:
            block.compile_parts()

    @property
    def device(self) -> torch.device:
        return self.pos_start.device

    @property
    def null_class(self) -> int:
        """The unconditional class. Whoever calls the model chooses it; the model never does."""
        return self.config.num_classes

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values, with C the width and N(σ) a normal cut at ±2.

        | parameter                                        | value                                   |
        |--------------------------------------------------|-----------------------------------------|
        | Linear and Embedding weights, pos_start          | N(√(1/3C))                              |
        | all biases, q_bias, v_bias                       | 0                                       |
        | attn.proj.weight, ffn.fc2.weight                 | N(√(1/3C)) / √(2·depth)                 |
        | head.weight                                      | N(√(1/3C)) · 0.02                       |
        | ada_lin weights: rows of the two gates γ         | N(√(1/3C)) · alng                       |
        | ada_lin weights: other rows, head_nm's included  | N(√(1/3C)) · aln                        |
        | scale_mul_1H11                                   | ln 4                                    |
        | pos_1LC                                          | sines of rows, cosines of columns       |
        """
        config = self.config
        std = math.sqrt(1 / config.width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_start, std=std)
        self.init_positions(std)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].weight.mul_(config.aln)
        for block in cast(Iterable[Block], self.blocks):
            block.attn.proj.weight.div_(math.sqrt(2 * config.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * config.depth))
            self.init_modulation(block)

    def init_positions(self, std: float) -> None:
        self.pos_1LC.copy_(sinusoids(self.config.width, POSITION_SIDE))

    def init_modulation(self, block: Block) -> None:
        gates, weight = 2 * self.config.width, block.ada_lin[1].weight
        weight[:gates].mul_(self.config.alng)
        weight[gates:].mul_(self.config.aln)

    def inputs(
        self, tokens: Tensor, pathway: Pathway, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1
    ) -> Any:
        """Tokens of all scales (B, L), true or sampled → inputs of a parallel pass (Eq. 2 and 6): see the pathway."""
        return pathway.inputs(tokens, schedule, truth, first)

    def trim(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """The part of a schedule that this model knows: all of it."""
        return schedule

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        schedule: ScaleSchedule,
        targets: Tensor | None = None,
        first: int = 0,
        sampler: Sampler | None = None,
        start: bool = True,
        features: bool = False,
    ) -> Tensor | Prediction:
        """One scale-causal pass over all scales.

        Args:
            labels: (B,) class ids, `null_class` for unconditional.
            inputs: (B, L - s₁², D) embeddings of scales 2…N, each shifted up from the scale before; those of more
                scales than the schedule has are left out.
            schedule: the sides s₁…s_N.
            targets: of the scales from number `first` on, tokens (B, n) or the logits to match (B, n, V).
            first: number of the first scale that is asked for.
            sampler: with targets, sample tokens from the same logits.
            start: add pos_start to the first scale (the released second pass leaves it out).
            features: return what the head reads, (B, n, C).

        Returns: logits (B, n, V) of the scales from number `first` on; with targets their `Prediction`.
        """
        condition = self.class_emb(labels)  # (B, C)
        begin = self.first_scale(condition, schedule.lengths[0], start)
        inputs = inputs[:, : schedule.total - schedule.lengths[0]]
        x = torch.cat([begin, self.word_embed(inputs.to(self.word_embed.weight.dtype))], dim=1)  # (B, L, C)
        x = x + self.positions(schedule.sides)
        attention = ScaleCausalAttention(schedule, x.device)
        x = self.through_blocks(x, self.modulations(condition), [attention] * len(self.blocks))
        x = self.head_nm(x[:, schedule.offsets[first] :], self.head_nm.ada_lin(condition))
        token_weights = None
        if self.scale_weights == "equal" and targets is not None and self.training:  # held-out losses compare
            each = torch.tensor([1 / n for n in schedule.lengths[first:] for _ in range(n)])
            token_weights = each.to(x.device, non_blocking=True).expand(len(x), -1)
        return self.answer(x, targets, sampler, features, token_weights)

    def answer(
        self,
        x: Tensor,
        targets: Tensor | None,
        sampler: Sampler | None,
        features: bool,
        token_weights: Tensor | None = None,
    ) -> Tensor | Prediction:
        """Normalised features (B, n, C) → what `forward` returns; `token_weights` (B, n) are in the loss."""
        if features:
            return x
        return self.head(x) if targets is None else self.head.predict(x, targets, sampler, token_weights)

    def init_cache(self, labels: Tensor, capacity: int) -> DecodingState:
        """Start a cached forward of up to `capacity` tokens: the class's modulations are computed once."""
        condition = self.class_emb(labels)
        return DecodingState(
            condition,
            self.modulations(condition),
            self.head_nm.ada_lin(condition),
            [CachedAttention(capacity) for _ in self.blocks],
        )

    def decode_scale(self, state: DecodingState, inputs: Tensor | None, s: int, rows: int | None = None) -> Tensor:
        """Logits (B, s², V) of the next scale from its shifted inputs (B, s², D); None stands for the first scale.

        With `rows`, those of the first `rows` images only.
        """
        if inputs is None:
            x = self.first_scale(state.condition, s * s, start=True)
        else:
            x = self.word_embed(inputs.to(self.word_embed.weight.dtype))
        x = self.through_blocks(x + self.positions((s,)), state.modulations, state.caches)
        return self.head(self.head_nm(x, state.head_modulation)[:rows])

    def guidance_weights(self, draw: SamplingConfig, sides: Sequence[int]) -> list[float]:
        """w at every scale."""
        return draw.guidance.weights(sides, draw.max_pn, self.config.ramp_end)

    def guided(self, draw: SamplingConfig, sides: Sequence[int]) -> bool:
        """True when sampling needs the unconditional class."""
        return any(self.guidance_weights(draw, sides))

    def draw_noise(self, seeds: Sequence[int], schedule: ScaleSchedule, device: torch.device) -> Tensor:
        """Uniform numbers (B, n) that sampling images takes, from each one's own seed."""
        return image_uniforms(seeds, self.uniforms_needed(schedule), device)

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
        """Codes (B, s²) of scale i: cached forward → guidance → top-k, top-p → draw.

        Args:
            state: of B images, or of 2B with the unconditional half behind.
            inputs: (B, s², D), or of 2B images; None for the first scale.
            noise: see `draw_noise`.
            soften: makes embeddings (B, s², D) of the logits, in place of codes.
        """
        s, batch = schedule.sides[i], len(noise)
        weight = self.guidance_weights(draw, schedule.sides)[i]
        if weight:
            conditional, unconditional = self.decode_scale(state, inputs, s).chunk(2)
            logits = guide(conditional, unconditional, weight)
        else:
            logits = self.decode_scale(state, inputs, s, rows=batch)  # the unconditional half is remembered, not read
        if soften is not None:
            return soften(i, logits)
        return sample_tokens(logits, 1 if draw.greedy(s) else draw.top_k, draw.top_p, noise[:, schedule.span(i)])

    def uniforms_needed(self, schedule: ScaleSchedule) -> int:
        """Uniform numbers that sampling an image takes."""
        return schedule.total

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """The class embedding (B, C) → what modulates each block (B, 1, 6, C)."""
        return [block.ada_lin(condition) for block in self.blocks]

    def first_scale(self, condition: Tensor, length: int, start: bool) -> Tensor:
        """The class embedding (B, C) at every token of the first scale (B, length, C)."""
        x = condition.unsqueeze(1).expand(-1, length, -1)
        return x + self.pos_start if start else x

    def positions(self, sides: Sequence[int]) -> Tensor:
        """The position map at each side, by area: (L, C)."""
        maps = self.pos_1LC.flatten(2).squeeze(0).T  # (32², C)
        with torch.autocast(maps.device.type, enabled=False):
            return torch.cat([area_weights(s, POSITION_SIDE, maps.device) for s in sides]) @ maps

    def through_blocks(self, x: Tensor, modulations: list[Tensor], attentions: Sequence[Attend]) -> Tensor:
        """Embedded tokens (B, L, C) → features (B, L, C), which the head reads after its norm."""
        for block, modulation, attention in zip(self.blocks, modulations, attentions, strict=True):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, attention, use_reentrant=False)
            else:
                x = block(x, modulation, attention)
        return x


def area_weights(s: int, side: int, device: torch.device) -> Tensor:
    """Resizing a side × side map to s × s by area, as a matrix (s², side²).

    One product for all scales; its gradient, unlike that of the pooling operator on a GPU, is deterministic.
    """
    rows = F.adaptive_avg_pool1d(torch.eye(side, device=device), s).T  # (s, side)
    return torch.kron(rows, rows)


def sinusoids(width: int, side: int) -> Tensor:
    """The initial position map (1, C, side, side): channel 2k is sin(row·ω), 2k+1 is cos(column·ω)."""
    omega = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))  # (C/2,)
    angles = omega[:, None] * torch.arange(side).float()  # (C/2, side)
    rows = angles.sin()[:, :, None].expand(-1, -1, side)
    columns = angles.cos()[:, None, :].expand(-1, side, -1)
    return torch.stack([rows, columns], dim=1).flatten(0, 1).unsqueeze(0)
