"""The released code's way in: `build_vae_var` and `autoregressive_infer_cfg`, thin faces over `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.flexvar import FlexVAR, FlexVARConfig
from models.sampling import Guidance, SamplingConfig, generate
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from models.tokenizer import Tokenizer
from models.vqvae import VQVAE, VQVAEConfig


class ReleasedFlexVAR(FlexVAR):
    """FlexVAR with the released sampling call."""

    def autoregressive_infer_cfg(
        self,
        vqvae: Tokenizer,
        B: int,
        label_B: int | Sequence[int] | Tensor | None = None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        infer_patch_nums: Sequence[int] = DEFAULT_SCHEDULE.sides,
        max_pn: int = 16,
        used_llamagen_cfg: bool = False,
    ) -> Tensor:
        """Sample B images.

        Args:
            label_B: class ids (B,), one id for all, or None for random classes.
            g_seed: image i is drawn from seed g_seed + i; None takes a seed from torch's global generator.
            cfg: guidance scale: a ramp over the scales, or constant with `used_llamagen_cfg`.
            infer_patch_nums: sides to walk.
            max_pn: sides above it are taken greedily.

        Returns: (B, 3, H, W) in [-1, 1], not clamped.
        """
        seed = int(torch.randint(2**31, ())) if g_seed is None else g_seed
        if label_B is None:
            generator = torch.Generator().manual_seed(seed)
            label_B = torch.randint(self.config.num_classes, (B,), generator=generator)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), label_B)
        labels = torch.as_tensor(label_B, dtype=torch.long)
        if len(labels) != B:
            raise ValueError(f"B is {B}, but label_B holds {len(labels)} labels")
        guidance = Guidance("constant" if used_llamagen_cfg else "ramp", cfg)
        schedule, sampling = ScaleSchedule(tuple(infer_patch_nums)), SamplingConfig(guidance, top_k, top_p, max_pn)
        return generate(self, vqvae, labels, schedule, sampling, range(seed, seed + B))


def build_vae_var(
    V: int = 8912,
    Cvae: int = 32,
    device: str | torch.device = "cpu",
    num_classes: int = 1000,
    depth: int = 16,
    vae_ckpt: str | Path | None = None,
) -> tuple[Tokenizer, ReleasedFlexVAR]:
    """A tokenizer (with the weights of `vae_ckpt`, if given) and a transformer with initial weights.

    Args:
        V, Cvae: rows and width of the codebook.
        vae_ckpt: tokenizer file; its other sizes are read off it.
    """
    from models.weights import load_tokenizer  # here, since that module builds these models too

    vae = load_tokenizer(vae_ckpt) if vae_ckpt else VQVAE(VQVAEConfig(codebook_size=V, codebook_dim=Cvae)).eval()
    found = (vae.config.codebook_size, vae.config.codebook_dim)
    if found != (V, Cvae):
        raise ValueError(f"{vae_ckpt} has a codebook of {found[0]} × {found[1]}, not V × Cvae = {V} × {Cvae}")
    config = FlexVARConfig(depth=depth, num_classes=num_classes, codebook_size=V, codebook_dim=Cvae)
    return vae.to(device), ReleasedFlexVAR(config).to(device)
