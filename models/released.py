"""The released code's ways in: `build_vae_var` and `autoregressive_infer_cfg`, thin faces over `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.flexvar import FlexVAR, FlexVARConfig
from models.residual_vqvae import ResidualVQVAE, ResidualVQVAEConfig
from models.sampling import Guidance, SamplingConfig, generate
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from models.tokenizer import Tokenizer
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

Labels = int | Sequence[int] | Tensor | None


def requested(B: int, label_B: Labels, g_seed: int | None, classes: int) -> tuple[Tensor, range]:
    """Class ids (B,) and seeds: one id for all, or None for random ones; no seed takes one from torch's generator."""
    seed = int(torch.randint(2**31, ())) if g_seed is None else g_seed
    if label_B is None:
        label_B = torch.randint(classes, (B,), generator=torch.Generator().manual_seed(seed))
    elif isinstance(label_B, int):
        label_B = torch.full((B,), label_B)
    labels = torch.as_tensor(label_B, dtype=torch.long)
    if len(labels) != B:
        raise ValueError(f"B is {B}, but label_B holds {len(labels)} labels")
    return labels, range(seed, seed + B)


class ReleasedFlexVAR(FlexVAR):
    """FlexVAR with the released sampling call."""

    def autoregressive_infer_cfg(
        self,
        vqvae: Tokenizer,
        B: int,
        label_B: Labels = None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        infer_patch_nums: Sequence[int] = DEFAULT_SCHEDULE.sides,
        max_pn: int = 16,
        used_llamagen_cfg: bool = False,
        more_smooth: bool = False,
    ) -> Tensor:
        """Sample B images.

        Args:
            label_B: class ids (B,), one id for all, or None for random classes.
            g_seed: image i is drawn from seed g_seed + i; None takes a seed from torch's global generator.
            cfg: guidance scale: a ramp over the scales, or constant with `used_llamagen_cfg`.
            infer_patch_nums: sides to walk.
            max_pn: sides above it are taken greedily.
            more_smooth: VAR's; True raises ValueError.

        Returns: (B, 3, H, W) in [-1, 1], not clamped.
        """
        labels, seeds = requested(B, label_B, g_seed, self.config.num_classes)
        guidance = Guidance("constant" if used_llamagen_cfg else "ramp", cfg)
        schedule = ScaleSchedule(tuple(infer_patch_nums))
        sampling = SamplingConfig(guidance, top_k, top_p, max_pn, more_smooth=more_smooth)
        return generate(self, vqvae, labels, schedule, sampling, seeds)


class ReleasedVAR(VAR):
    """VAR with the released sampling call; it remembers its tokenizer, and loads released files as they are."""

    def __init__(self, config: VARConfig, vae: ResidualVQVAE):
        super().__init__(config)
        self.tokenizer = (vae,)  # in a tuple: no part of this module
        self.register_load_state_dict_pre_hook(without_mask)

    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: Labels,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """Sample B images (B, 3, H, W) in [0, 1]. For the arguments see `ReleasedFlexVAR` and `SamplingConfig`."""
        labels, seeds = requested(B, label_B, g_seed, self.config.num_classes)
        sampling = SamplingConfig(Guidance("ramp", cfg), top_k, top_p, more_smooth=more_smooth)
        return generate(self, self.tokenizer[0], labels, self.schedule, sampling, seeds).clamp(-1, 1).add(1).mul(0.5)


def without_mask(module: VAR, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Take the mask, which is rebuilt for each pass, out of a state dict that is being loaded."""
    weights.pop(f"{prefix}attn_bias_for_masking", None)


def build_vae_var(
    V: int = 0,
    Cvae: int = 32,
    device: str | torch.device = "cpu",
    num_classes: int = 1000,
    depth: int = 16,
    vae_ckpt: str | Path | None = None,
    patch_nums: Sequence[int] = (),
    ch: int = 160,
    share_quant_resi: int = 4,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    **unread: Any,
) -> tuple[Tokenizer, ReleasedFlexVAR | ReleasedVAR]:
    """A tokenizer and a transformer with initial weights: VAR's, when `patch_nums` are named and no FlexVAR's tokenizer
    is, else FlexVAR's.

    Args:
        V, Cvae: rows and width of the codebook; 0 rows: 4096 for VAR, 8912 for FlexVAR.
        vae_ckpt: FlexVAR's tokenizer file; its other sizes are read off it.
        patch_nums, ch, share_quant_resi, shared_aln: VAR's scales, base width of its tokenizer, φ of it (4), and one
            AdaLN for all blocks.
        unread: `flash_if_available`, `fused_if_available`, `init_…` of released code: of speed and initial values.
    """
    for name in unread:
        if name not in ("flash_if_available", "fused_if_available") and not name.startswith("init_"):
            raise TypeError(f"build_vae_var() got an unexpected keyword argument {name!r}")
    if not attn_l2_norm:
        raise ValueError("attn_l2_norm must be True: keys and queries of all released weights are normalised")
    flexvar_codebook = VQVAEConfig().codebook_size
    if patch_nums and vae_ckpt is None and flexvar_codebook != V:
        if share_quant_resi != 4:
            raise ValueError(f"share_quant_resi must be 4, got {share_quant_resi}")
        residual = ResidualVQVAE(ResidualVQVAEConfig(ch, z_channels=Cvae, codebook_size=V or 4096, codebook_dim=Cvae))
        sizes = {"depth": depth, "num_classes": num_classes, "codebook_size": V or 4096, "codebook_dim": Cvae}
        var = ReleasedVAR(VARConfig(**sizes, sides=tuple(patch_nums), shared_aln=shared_aln), residual)
        return residual.eval().to(device), var.eval().to(device)
    from models.weights import load_tokenizer  # here, since that module builds these models too

    V = V or flexvar_codebook
    vae = load_tokenizer(vae_ckpt) if vae_ckpt else VQVAE(VQVAEConfig(codebook_size=V, codebook_dim=Cvae)).eval()
    found = (vae.config.codebook_size, vae.config.codebook_dim)
    if found != (V, Cvae):
        raise ValueError(f"{vae_ckpt} has a codebook of {found[0]} × {found[1]}, not V × Cvae = {V} × {Cvae}")
    config = FlexVARConfig(depth=depth, num_classes=num_classes, codebook_size=V, codebook_dim=Cvae)
    return vae.to(device), ReleasedFlexVAR(config).to(device)
