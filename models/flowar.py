"""FlowAR: scale-wise autoregression on continuous latents; a flow-matching head draws the tokens of a scale.

Legend: B batch, L tokens of the schedule, C width, D width of a token, s side of a scale.

Two stacks of scale-causal blocks, called encoder and decoder in the released files; what they say of a token conditions
the head (`models/flow_head.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.flexvar import DecodingState, FlexVARConfig
from models.flow_head import FlowHead, FlowPrediction, FlowSampler, FlowTarget, euler_times
from models.flow_layers import GatedFFN, RMSNorm, RotarySelfAttention, rms_norm, rope_tables
from models.layers import AdaLinear, Attend, CachedAttention, ScaleCausalAttention
from models.sampling import SamplingConfig
from models.scales import Pathway, ScaleSchedule

RELEASED_SIDES = (1, 2, 4, 8, 16)
HEADS = {768: 12, 1024: 16, 1536: 16}  # of released files, by their width


@dataclass(frozen=True)
class FlowARFlags:
    """Flags of train.py."""

    heads: int = 0  # flowar: attention heads; 0: of size 64
    flow_depth: int = 2  # flowar: blocks of the flow-matching head
    flow_width: int = 1024  # flowar: width of the flow-matching head
    flow_cross: bool = False  # flowar: the head attends to its conditions (released L, H), beside being modulated
    dropout: float = 0.1  # flowar: in attention and FFN of the two stacks
    latent_scaling: float = 0.0  # flowar: factor of the autoencoder's latents; 0: what is published for such a file
    latent_patch: int = 0  # flowar: side of a token in latents; 0: 2 for 8× down-sampling, else 1


@dataclass(frozen=True)
class FlowARConfig(FlexVARConfig):
    """Sizes; `depth` is of each of the two stacks. S: 6, 768; B (our reading): 12, 768; L: 8, 1024; H: 15, 1536."""

    codebook_size: int = 0
    codebook_dim: int = 16  # width of a token
    sides: tuple[int, ...] = RELEASED_SIDES
    attention_heads: int = 0  # 0: of size 64
    flow_depth: int = 2
    flow_width: int = 1024
    flow_cross: bool = False
    dropout: float = 0.1

    flags = (FlowARFlags,)
    goes_with: ClassVar[dict[str, tuple[Any, ...]]] = {
        "schedule": ("fixed",),
        "aln": (0.5,),
        "alng": (1e-3,),
        "label_smoothing": (0.0,),
        "parallel": ("ddp",),
        "training_mode": ("teacher_forcing", "csfl"),
        "ssr": ("all",),
        "csf_target": ("teacher", "ground_truth", "velocity"),
        "rollout_canvas": ("accumulated",),
        "sf_top_k": (900,),
        "sf_top_p": (0.95,),
        "compile": (False,),
        "scale_weights": ("tokens",),
    }
    pathway = "latent"
    released_tokenizer = "pretrained/kl16.ckpt"
    released_max_pn = None
    ramp_end = sys.maxsize

    def __post_init__(self):
        object.__setattr__(self, "width", self.width or 64 * self.depth)
        object.__setattr__(self, "drop_path", 0.0)
        object.__setattr__(self, "codebook_size", 0)
        object.__setattr__(self, "attention_heads", self.attention_heads or max(1, self.width // 64))
        object.__setattr__(self, "sides", ScaleSchedule(tuple(self.sides)).sides)
        if (
            self.depth < 1
            or self.attention_heads < 1
            or self.width % self.attention_heads
            or self.width // self.attention_heads % 4
            or self.flow_depth < 1
            or self.flow_width < 64
            or self.flow_width % 64
        ):
            raise ValueError(
                f"no such sizes: depth {self.depth}, width {self.width}, {self.attention_heads} heads, head of depth "
                f"{self.flow_depth} and width {self.flow_width}"
            )
        if self.flow_cross and self.flow_width != self.width:
            raise ValueError(f"--flow_cross needs a head as wide as the blocks: {self.flow_width} is not {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def heads(self) -> int:
        return self.attention_heads

    @property
    def only_schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.sides)

    def build(self) -> FlowAR:  # type: ignore[override]
        return FlowAR(self)

    @classmethod
    def from_flags(cls, flags: Any, **sizes: Any) -> FlowARConfig:
        own = {name: getattr(flags, name) for name in ("flow_depth", "flow_width", "flow_cross", "dropout")}
        sizes = {name: value for name, value in sizes.items() if name not in ("aln", "alng")}
        return cls(**sizes, **own, attention_heads=flags.heads, sides=flags.scales.sides)

    @classmethod
    def tokenizer_options(cls, flags: Any) -> dict[str, float]:
        through_pixels = flags.supervision == "image_pixels"
        return {"scaling": flags.latent_scaling, "patch": flags.latent_patch, "through_pixels": through_pixels}

    def check_tokenizer(self, vae: Any, ckpt: str | Path, vae_ckpt: str | Path) -> None:
        super().check_tokenizer(vae, ckpt, vae_ckpt)
        if vae.scaling <= 0:
            raise ValueError(
                f"no scaling of the latents of {vae_ckpt} is known: python -m utils.tokenizer.scaling measures it, "
                "train.py takes it as --latent_scaling, and a run or a pipeline brings it along"
            )

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        return "flownet.input_proj.weight" in weights

    @classmethod
    def adapted(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the buffers that are rebuilt; with what released files leave to the reader: heads and scales."""
        freqs = weights.get("encoder_blocks.0.attn.rope.freqs")
        found = {n: t.detach() for n, t in weights.items() if n != "mask" and not n.endswith("rope.freqs")}
        if "layout" not in found:
            tokens, width = weights["encoder_pos_embed_learned"].shape[1:]
            if tokens != ScaleSchedule(RELEASED_SIDES).total:
                raise ValueError(f"it has {tokens} tokens, and does not say of which scales")
            heads = width // (4 * len(freqs)) if freqs is not None else HEADS.get(width, width // 64)
            found["layout"] = torch.tensor([heads, *RELEASED_SIDES])
        return found

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        heads, *sides = weights["layout"].tolist()
        depth = sum(f"encoder_blocks.{i}.attn.qkv.weight" in weights for i in range(1000))
        width, dim = weights["z_proj.weight"].shape
        return {
            "depth": depth,
            "width": width,
            "attention_heads": heads,
            "sides": tuple(sides),
            "num_classes": weights["class_emb.weight"].shape[0] - 1,
            "codebook_dim": dim,
            "flow_depth": sum(f"flownet.res_blocks.{i}.attn.qkv.weight" in weights for i in range(1000)),
            "flow_width": weights["flownet.input_proj.weight"].shape[0],
            "flow_cross": "flownet.res_blocks.0.crossattn.q.weight" in weights,
        }


class Block(nn.Module):
    """Attention with rotary positions and a gated FFN, each modulated by the class."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attn = RotarySelfAttention(width, heads, bias=True, dropout=dropout)
        self.mlp = GatedFFN(width, dropout)
        self.ada_lin = AdaLinear(width, 6)

    def forward(self, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], attention: Attend) -> Tensor:
        """x (B, L, C), modulation = ada_lin(condition) (B, 1, 6, C) → (B, L, C)."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)  # (B, 1, C) each
        x = x + gate1 * self.attn(rms_norm(x) * (1 + scale1) + shift1, rope, attention)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class FlowAR(nn.Module):
    """The transformer and its head. It knows one schedule."""

    config: FlowARConfig
    no_decay: tuple[str, ...] = ()
    reads = ("flow_steps", "guidance_interval")

    def __init__(self, config: FlowARConfig | None = None):
        super().__init__()
        self.config = config = config or FlowARConfig()
        self.schedule, width = ScaleSchedule(config.sides), config.width
        for name in ("encoder", "decoder", "diffusion"):
            position = nn.Parameter(torch.empty(1, self.schedule.total, width))
            self.register_parameter(f"{name}_pos_embed_learned", position)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # the last row is the unconditional class
        self.z_proj, self.z_proj_ln = nn.Linear(config.codebook_dim, width), RMSNorm(width)
        blocks = [Block(width, config.heads, config.dropout) for _ in range(2 * config.depth)]
        self.encoder_blocks = nn.ModuleList(blocks[: config.depth])
        self.encoder_norm, self.decoder_embed = RMSNorm(width), nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(blocks[config.depth :])
        self.decoder_norm = RMSNorm(width)
        self.flownet = FlowHead(config.codebook_dim, width, config.flow_width, config.flow_depth, config.flow_cross)
        self.register_buffer("layout", torch.tensor([config.heads, *config.sides]))  # what no shape tells
        self.checkpoint_activations = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform weights and zero biases of every Linear; N(0, 0.02) class embedding and positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.class_emb.weight, *(getattr(self, f"{n}_pos_embed_learned") for n in POSITIONS)):
            nn.init.normal_(parameter, std=0.02)

    @property
    def head(self) -> FlowHead:
        return self.flownet

    @property
    def blocks(self) -> list[Block]:
        return [*self.encoder_blocks, *self.decoder_blocks]  # type: ignore[list-item]

    def shard_units(self) -> list[nn.Module]:
        """See `FlexVAR.shard_units`."""
        return [*(part for block in self.blocks for part in (block.ada_lin, block)), *self.flownet.res_blocks]

    def compile_parts(self) -> None:
        """Raises ValueError: its blocks have no parts for that."""
        raise ValueError("FlowAR is not compiled: leave --compile out")

    @property
    def null_class(self) -> int:
        """The unconditional class. Whoever calls the model chooses it; the model never does."""
        return self.config.num_classes

    @property
    def device(self) -> torch.device:
        return self.class_emb.weight.device

    def trim(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """The schedule itself. Raises ValueError when it is not the one that the weights belong to."""
        return self.schedule.required("FlowAR", schedule)

    def inputs(
        self, tokens: Tensor, pathway: Pathway, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1
    ) -> Tensor:
        """Tokens of all scales (B, L, D), true or sampled → inputs of a parallel pass: see the pathway."""
        return pathway.inputs(tokens, self.trim(schedule), truth, first)

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        schedule: ScaleSchedule,
        targets: Tensor | FlowTarget | None = None,
        first: int = 0,
        sampler: FlowSampler | None = None,
        start: bool = True,
        features: bool = False,
    ) -> Tensor | FlowPrediction:
        """One scale-causal pass over all scales; see `FlexVAR.forward`.

        Without targets it gives what conditions the head, (B, n, C), as with `features`.
        """
        assert start, "the first scale is the class embedding"
        condition = self.class_emb(labels)  # (B, C)
        inputs = inputs[:, : schedule.total - schedule.lengths[0]]
        x = torch.cat([self.first_scale(condition, schedule.lengths[0]), self.embed(inputs)], dim=1)  # (B, L, C)
        attention = ScaleCausalAttention(schedule, x.device, self.config.dropout if self.training else 0.0)
        z = self.conditions(x, self.modulations(condition), [attention] * len(self.blocks), schedule.sides)
        z = z[:, schedule.offsets[first] :]
        if targets is None or features:
            return z
        return self.flownet.predict(z, targets, schedule, first, sampler)

    def first_scale(self, condition: Tensor, length: int) -> Tensor:
        """The class embedding (B, C) at every token of the first scale (B, length, C)."""
        return condition.unsqueeze(1).expand(-1, length, -1)

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs (B, n, D) → (B, n, C)."""
        return self.z_proj(inputs.to(self.z_proj.weight.dtype))

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """The class embedding (B, C) → what modulates each block (B, 1, 6, C)."""
        return [block.ada_lin(condition) for block in self.blocks]

    def conditions(
        self, x: Tensor, modulations: Sequence[Tensor], attentions: Sequence[Attend], sides: Sequence[int]
    ) -> Tensor:
        """Embedded tokens of some scales (B, L, C) through both stacks → what conditions the head (B, L, C)."""
        numbers = [self.schedule.sides.index(s) for s in sides]
        encoder, decoder, diffusion = (
            torch.cat([getattr(self, f"{name}_pos_embed_learned")[:, self.schedule.span(i)] for i in numbers], dim=1)
            for name in POSITIONS
        )
        rope = rope_tables(sides, self.config.sides[-1], self.config.width // self.config.heads, x.device)
        x, half = self.z_proj_ln(x + encoder), self.config.depth
        for i, (block, modulation, attention) in enumerate(zip(self.blocks, modulations, attentions, strict=True)):
            if i == half:
                x = self.decoder_embed(self.encoder_norm(x)) + decoder
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, rope, attention, use_reentrant=False)
            else:
                x = block(x, modulation, rope, attention)
        return self.decoder_norm(x) + diffusion

    # ------------------------------------------------------------------------------------------ sampling

    def init_cache(self, labels: Tensor, capacity: int) -> DecodingState:
        """Start a cached forward of up to `capacity` tokens."""
        condition = self.class_emb(labels)
        caches = [CachedAttention(capacity) for _ in self.blocks]
        return DecodingState(condition, self.modulations(condition), condition, caches)

    def decode_scale(self, state: DecodingState, inputs: Tensor | None, s: int, rows: int | None = None) -> Tensor:
        """Conditions of the head at the next scale (B, s², C), from its inputs (B, s², D); None: the first scale."""
        x = self.first_scale(state.condition, s * s) if inputs is None else self.embed(inputs)
        return self.conditions(x, state.modulations, state.caches, (s,))[:rows]

    def guidance_weights(self, draw: SamplingConfig, sides: Sequence[int]) -> list[float]:
        """w at every scale: a ramp to cfg - 1 at the last. With "constant" it is that everywhere."""
        excess = max(draw.guidance.scale - 1, 0.0)
        last = max(len(sides) - 1, 1)
        return [{"none": 0.0, "constant": excess}.get(draw.guidance.kind, excess * i / last) for i in range(len(sides))]

    def guided(self, draw: SamplingConfig, sides: Sequence[int]) -> bool:
        """True when sampling needs the unconditional class."""
        return any(self.guidance_weights(draw, sides))

    def draw_noise(self, seeds: Sequence[int], schedule: ScaleSchedule, device: torch.device) -> Tensor:
        """Normal numbers (B, L, D), from each image's own seed."""
        shape = schedule.total, self.config.codebook_dim
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(device, non_blocking=True)

    def draw_scale(
        self,
        state: DecodingState,
        pathway: Pathway,
        inputs: Tensor | None,
        i: int,
        schedule: ScaleSchedule,
        draw: SamplingConfig,
        noise: Tensor,
        soften: object = None,
    ) -> Tensor:
        """Tokens (B, s², D) of scale i, by Euler's method from its noise."""
        s, batch, weight = schedule.sides[i], len(noise), self.guidance_weights(draw, schedule.sides)[i]
        z = self.decode_scale(state, inputs, s, None if weight else batch)
        conditional, unconditional = (z[:batch], z[batch:]) if weight else (z, None)
        return self.flownet.integrate(
            noise[:, schedule.span(i)], euler_times(draw.flow_steps), conditional, unconditional, weight,
            draw.guidance_interval, (s,), self.config.sides[-1],
        )  # fmt: skip


POSITIONS = ("encoder", "decoder", "diffusion")
