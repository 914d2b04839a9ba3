"""The residual pathway (paper, Sec. 3.1), VAR's: each scale codes what the coarser ones left, and adds to a canvas.

Legend: B batch, D codebook width, K scales, V codebook rows, s side of a scale, S side of the latent, E codebook.

R_k(c) = φ_k(U(E[c])) is the residual that scale k adds to the canvas F_k = R_1(c_1) + … + R_k(c_k), a map of side S; U
is the bicubic resize to it. The codes of scale k are those of the latent less F_(k-1), resized to the scale by area.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head import kept_weights
from models.sampling import SamplingConfig, Soften
from models.scales import ScaleSchedule
from models.tokenizer import KnownCodes, area, exact_convolutions, nearest_rows
from utils.runtime.numerics import derive_seed

PHIS = 4  # convolutions that all scales share


class Phi(nn.Conv2d):
    """φ(h) = h/2 + conv(h)/2 of maps (B, D, S, S)."""

    def forward(self, h: Tensor) -> Tensor:
        return 0.5 * h + 0.5 * super().forward(h)


def phi_of(i: int, scales: int) -> int:
    """Number of the φ of scale i (from 0): the one whose tick is nearest to i / (K-1), the first on a tie.

    In float64: several ties of exact arithmetic are decided by how these numbers are rounded, and released weights were
    trained with that.
    """
    first, last = 1 / 12, 11 / 12
    ticks = [first + j * ((last - first) / (PHIS - 1)) for j in range(PHIS)]
    place = i / (scales - 1) if scales > 1 else 0.0
    return min(range(PHIS), key=lambda j: abs(ticks[j] - place))


class ResidualQuantizer(nn.Module):
    """The codebook, whose rows are used as they are, and the four φ."""

    def __init__(self, rows: int, dim: int, counted_scales: int):
        """`counted_scales`: of a buffer in released files, of usage statistics, that nothing reads."""
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        bound = 1 / rows
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        convolutions = [Phi(dim, dim, 3, padding=1) for _ in range(PHIS)]
        self.quant_resi = nn.ModuleDict({"qresi_ls": nn.ModuleList(convolutions)})
        if counted_scales:
            self.register_buffer("ema_vocab_hit_SV", torch.zeros(counted_scales, rows))
        self.register_load_state_dict_pre_hook(any_count)

    def nearest(self, z: Tensor) -> Tensor:
        """Vectors (…, D) → index of the nearest row (…,) by squared distance, the first on a tie."""
        return nearest_rows(z, self.embedding.weight)

    def phi(self, i: int, scales: int) -> nn.Module:
        """The φ of scale i of so many."""
        return self.quant_resi["qresi_ls"][phi_of(i, scales)]  # type: ignore[index]


def any_count(module: nn.Module, weights: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a state dict that is being loaded have usage statistics of any number of scales, or none."""
    own, name = module.state_dict().get("ema_vocab_hit_SV"), f"{prefix}ema_vocab_hit_SV"
    if own is None:
        weights.pop(name, None)
    elif name not in weights or weights[name].shape != own.shape:
        weights[name] = own


class ResidualPathway:
    """A scale's tokens are added to a canvas, which the next scale is fed with.

    In fp32, whatever precision the caller works in. The schedule decides which φ a scale gets, so it is always the
    whole one.
    """

    def __init__(self, quantizer: ResidualQuantizer):
        self.quantizer = quantizer

    def soften(self, schedule: ScaleSchedule, draw: SamplingConfig, seeds: Sequence[int]) -> Soften:
        """`more_smooth`: in place of a drawn code, a mean of rows, with Gumbel noise from each image's own seed."""

        def soften(i: int, logits: Tensor) -> Tensor:
            generators = [torch.Generator().manual_seed(derive_seed("more_smooth", seed, i)) for seed in seeds]
            noise = [torch.empty(logits.shape[1:]).exponential_(generator=g) for g in generators]
            gumbel = -torch.stack(noise).log().to(logits.device)  # (B, s², V)
            weights, progress = kept_weights(logits, draw.top_k, draw.top_p), i / max(len(schedule) - 1, 1)
            with torch.autocast(logits.device.type, enabled=False):
                return soft_embeddings(weights.log(), self.quantizer.embedding.weight, progress, gumbel)

        return soften

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, n) → their rows (B, n, D). Rows (B, n, D), mixed ones for instance, stay as they are."""
        return codes if codes.is_floating_point() else F.embedding(codes, self.quantizer.embedding.weight)

    def own(self, tokens: Tensor) -> Tensor:
        """Tokens as they are."""
        return tokens

    def residual(self, i: int, codes: Tensor, schedule: ScaleSchedule) -> Tensor:
        """R_i: codes (B, s²) of scale i, or rows, → what they add to the canvas (B, D, S, S)."""
        s, side = schedule.sides[i], schedule.sides[-1]
        with torch.autocast(codes.device.type, enabled=False), exact_convolutions():
            maps = self.embed(codes).float().transpose(1, 2).unflatten(2, (s, s))  # (B, D, s, s)
            if i + 1 < len(schedule):
                maps = F.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
            return self.quantizer.phi(i, len(schedule))(maps)

    def feeds(self, i: int) -> int:
        """0: the inputs of every scale are made of all coarser ones."""
        return 0

    def canvases(self, tokens: Tensor, schedule: ScaleSchedule, truth: Tensor | None) -> Iterator[Tensor]:
        """Canvas (B, D, S, S) before each scale but the first: the sum of the tokens' residuals at all coarser scales;
        with `truth`, of the true ones, but for the tokens' own at the scale right before."""
        parts, canvas = schedule.split(tokens), torch.zeros((), device=tokens.device)
        true_parts = parts if truth is None else schedule.split(truth)
        for i in range(len(schedule) - 1):
            residual = self.residual(i, parts[i], schedule)
            yield canvas + residual
            canvas = canvas + (residual if truth is None else self.residual(i, true_parts[i], schedule))

    @torch.no_grad()
    def inputs(self, tokens: Tensor, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1) -> Tensor:
        """Tokens of all scales (B, L) → inputs (B, n, D) of the scales from number `first` on: the canvas, by area.

        With `truth` (B, L) it is the one-step reading of Eq. 6: see `canvases`.
        """
        canvases = enumerate(self.canvases(tokens, schedule, truth), start=1)
        parts = [as_vectors(area(canvas, schedule.sides[i])) for i, canvas in canvases if i >= first]
        width = self.quantizer.embedding.embedding_dim
        return torch.cat(parts, dim=1) if parts else self.quantizer.embedding.weight.new_empty(len(tokens), 0, width)

    @torch.no_grad()
    def requantised(self, drawn: Tensor, truth: Tensor, schedule: ScaleSchedule, one_step: bool) -> Tensor:
        """Targets (B, L) of a pass on drawn tokens (B, L) that bring its canvas to where those meant to go.

        Of scale k: the code nearest to A_k(F_(k-1)(truth) + R_k(drawn) - F̃), F̃ the canvas that the pass is fed with.
        """
        before, fed = self.canvases(truth, schedule, None), self.canvases(drawn, schedule, truth if one_step else None)
        found = [drawn[:, schedule.span(0)]]
        for i, (true, own) in enumerate(zip(before, fed, strict=True), start=1):
            wanted = true + self.residual(i, drawn[:, schedule.span(i)], schedule) - own
            found.append(self.quantizer.nearest(as_vectors(area(wanted, schedule.sides[i]))))
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def corrected(self, fed: Tensor, truth: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Targets (B, L) of a pass on corrupted tokens (B, L), which make up for what they did to the canvas.

        Of scale k: the code nearest to its true row + A_k(F_(k-1)(truth) - F̃). That is the true code where the canvas F̃
        is the true one. So it is when the latent's residual A_k(f - F̃) is quantised anew, as Infinity does; but no code
        cache holds f, and A_k(R_k) is not the row that R_k was made of.
        """
        found = [truth[:, schedule.span(0)]]
        canvases = zip(self.canvases(truth, schedule, None), self.canvases(fed, schedule, None), strict=True)
        for i, (true, own) in enumerate(canvases, start=1):
            wanted = self.embed(truth[:, schedule.span(i)]).float() + as_vectors(area(true - own, schedule.sides[i]))
            found.append(self.quantizer.nearest(wanted))
        return torch.cat(found, dim=1)

    def canvas(self, schedule: ScaleSchedule) -> ResidualCanvas:
        """An empty canvas, for sampling to fill."""
        return ResidualCanvas(self, schedule)


class ResidualCanvas:
    """The sum of all scales so far: `maps` (B, D, S, S)."""

    maps: Tensor

    def __init__(self, pathway: ResidualPathway, schedule: ScaleSchedule):
        self.pathway, self.schedule = pathway, schedule

    def add(self, i: int, codes: Tensor) -> Tensor | None:
        """Add the codes (B, s²) of scale i. Returns the inputs (B, s'², D) of the next scale; None after the last."""
        residual = self.pathway.residual(i, codes, self.schedule)
        self.maps = residual if i == 0 else self.maps + residual
        return None if i + 1 == len(self.schedule) else as_vectors(area(self.maps, self.schedule.sides[i + 1]))


class KnownResiduals(KnownCodes):
    """Codes of images, of what is left of their latents: when other codes are held or painted, they make up for it."""

    def __init__(self, pathway: ResidualPathway, latent: Tensor, schedule: ScaleSchedule):
        self.pathway, self.rest, self.schedule = pathway, latent, schedule

    def at(self, s: int) -> Tensor:
        return self.pathway.quantizer.nearest(as_vectors(area(self.rest, s)))

    def add(self, s: int, codes: Tensor) -> None:
        self.rest = self.rest - self.pathway.residual(self.schedule.sides.index(s), codes, self.schedule)


def soft_embeddings(logits: Tensor, codebook_VD: Tensor, progress: float, gumbel: Tensor) -> Tensor:
    """Means of codebook rows (…, D), weighted by softmax((logits·(1 + progress) + gumbel) / τ), for logits (…, V).

    τ = max(0.27·(1 - 0.95·progress), 0.005); progress goes from 0 at the first scale to 1 at the last.
    """
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits * (1 + progress) + gumbel) / tau).softmax(-1) @ codebook_VD


def as_vectors(maps: Tensor) -> Tensor:
    """Maps (B, D, s, s) → vectors (B, s², D)."""
    return maps.flatten(2).transpose(1, 2)
