"""Reconstruction metrics of a tokenizer: its reconstructions of real images at every side.

Legend: N images, S sides, V codebook rows, s side of a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.flexvar import FlexVARConfig
from models.run_record import find_run
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from models.tokenizer import Tokenizer, exact_convolutions, to_bytes
from models.weights import digest_of, load_tokenizer
from utils.config.sampling import EvalConfig
from utils.data.datasets import linspace_indices
from utils.evaluations.c2i.features import Extractor
from utils.evaluations.c2i.images import ImageSource, describe_images, open_images
from utils.evaluations.c2i.metrics import NEIGHBOURS, WINDOW, psnr, ssim
from utils.evaluations.c2i.reference import Reference
from utils.evaluations.c2i.report import score
from utils.evaluations.c2i.store import FeatureStore, chunk_size
from utils.reporting.pictures import grid, save_picture
from utils.runtime.distributed import Ranks
from utils.runtime.files import read_array, save_array
from utils.tokenizer.codebook import histogram, perplexity, usage
from utils.tokenizer.losses import resize_to

SHOWN = 8  # images in the picture


class Reconstructed:
    """A tokenizer's reconstructions of a source at its finest side; what the others are worth is written on the way."""

    def __init__(self, source: ImageSource, vae: Tokenizer, sides: tuple[int, ...], directory: Path):
        self.source, self.vae, self.sides, self.directory = source, vae, sides, directory
        self.schedule = ScaleSchedule(sides)
        self.waiting: dict[int, tuple[Tensor, list[Tensor], list[Tensor]]] = {}  # first image → what `keep` needs

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: range) -> Tensor:
        originals = self.source.batch(indices)
        codes, made = self.at_every_side(originals)
        self.waiting[indices.start] = originals, codes, made
        return made[-1]

    def keep(self, indices: range, images: Tensor) -> None:
        """Write the quality (S, 3, n) and the codes (n, sum of s²) of a batch, while the device is at the next ones."""
        originals, codes, made = self.waiting.pop(indices.start)
        device = self.vae.device
        originals = originals.to(device)
        quality = torch.stack([self.quality(images.to(device), originals) for images in made])
        save_array(self.directory / f"quality_{indices.start:06d}.npy", quality.cpu().numpy())
        save_array(self.directory / f"codes_{indices.start:06d}.npy", torch.cat(codes, 1).to(torch.int32).numpy())

    @torch.no_grad()
    def at_every_side(self, originals: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images (n, 3, H, W) uint8 → codes (n, s²) and reconstructions uint8 of each side."""
        codes = self.vae.tokenize(originals.to(self.vae.device).float() / 127.5 - 1, self.sides)
        with exact_convolutions():
            made = [to_bytes(self.vae.decode_at(codes, s, self.schedule)) for s in self.sides]
        return [c.cpu() for c in codes.values()], made

    @staticmethod
    def quality(images: Tensor, originals: Tensor) -> Tensor:
        """PSNR and SSIM against the equally resized originals, and PSNR against the originals after enlarging (3, n).

        SSIM is NaN where its window is too large.
        """
        targets = resize_to(originals.float(), images.shape[-1])
        similar = (
            ssim(targets, images)
            if images.shape[-1] >= WINDOW
            else images.new_full((len(images),), torch.nan, dtype=torch.double)
        )
        enlarged = F.interpolate(images.float(), originals.shape[-2:], mode="bilinear")
        return torch.stack([psnr(targets, images), similar, psnr(originals, enlarged)])


def sides_of(config: EvalConfig, path: str, finest: int, tied: bool) -> tuple[int, ...]:
    """--pn, or the sides that a tokenizer's run was trained at, or the released ten; the last is the images' own.

    Raises ValueError where codes are `tied` to a schedule, and none is known that ends there.
    """
    run = find_run(path)
    named = ScaleSchedule.parse(config.pn) if config.pn else (run and run.schedule) or DEFAULT_SCHEDULE
    if config.pn and named.sides[-1] != finest:
        raise ValueError(f"--pn ends at {named.sides[-1]}, these images at {finest}")
    if tied and named.sides[-1] != finest:
        raise ValueError(f"this tokenizer's codes depend on all sides, and these images end at {finest}: name --pn")
    return (*(s for s in named.sides if s < finest), finest)


def evaluate_reconstructions(config: EvalConfig, extractor: Extractor, me: Ranks, directory: Path) -> dict[str, object]:
    """rFID, PSNR and SSIM of a tokenizer, and at every side PSNR, SSIM and the use of the codebook. Draws a picture."""
    source = open_images(config.reconstruct, config.image_size, config.seed)
    path = config.vae_ckpt or FlexVARConfig.released_tokenizer
    chunk = chunk_size(config, me)
    described = describe_images(config.reconstruct, config, extractor)
    vae = load_tokenizer(path).to(me.device)
    if not vae.config.codebook_size:
        raise ValueError(f"{path} has no codebook: --reconstruct judges tokenizers that make codes")
    high, wide = source.batch(range(1)).shape[-2:]
    if high != wide or wide % vae.config.factor:
        raise ValueError(
            f"{config.reconstruct} holds images of {wide}×{high}: give --image_size, a multiple of {vae.config.factor}"
        )
    sides = sides_of(config, path, wide // vae.config.factor, vae.config.tied_to_schedule)
    real = FeatureStore(directory / "real", len(source), chunk, described, me)
    real.fill(source, extractor, "real images")
    described |= {"tokenizer_sha256": digest_of(vae), "scales": list(sides)}
    made = FeatureStore(directory / "reconstructed", len(source), chunk, described, me)
    reconstructed = Reconstructed(source, vae, sides, made.directory)
    made.fill(reconstructed, extractor, "reconstructions", reconstructed.keep)
    if not me.first:
        return {}
    save_picture(reconstructed_picture(reconstructed), directory / "reconstructions.png")
    quality = np.concatenate([read_array(p) for p in sorted(made.directory.glob("quality_*.npy"))], axis=2)  # (S, 3, N)
    enough = len(source) > NEIGHBOURS  # else pixels are compared alone
    distances = score(made, extractor, Reference.of_store(real) if enough else None, config)
    if not enough:
        distances["warning"] = f"{len(source)} images are too few for distances, precision and recall: at least 4"
    renamed = {f"r{name}" if name in ("fid", "sfid") else name: value for name, value in distances.items()}
    means = dict(zip(("psnr", "ssim"), quality[-1, :2].mean(1).tolist(), strict=True))
    table = side_table(quality, sorted(made.directory.glob("codes_*.npy")), vae, sides)
    return {**renamed, **means, "sides": table, "settings": described}


def side_table(quality: np.ndarray, files: Sequence[Path], vae: Tokenizer, sides: tuple[int, ...]) -> list[dict]:
    """A row a side, from the quality (S, 3, N) and the files of codes."""
    schedule, rows = ScaleSchedule(sides), vae.config.codebook_size
    counts = torch.zeros(len(sides), rows, dtype=torch.long)
    for file in files:
        codes = torch.from_numpy(read_array(file)).long()
        counts += torch.stack([histogram(part, rows) for part in schedule.split(codes)])
    return [
        {
            "side": s,
            "pixels": vae.pixels(s, schedule),
            "psnr": quality[i, 0].mean().item(),
            "ssim": None if np.isnan(quality[i, 1]).any() else quality[i, 1].mean().item(),
            "psnr_enlarged": quality[i, 2].mean().item(),
            "codebook_usage": usage(counts[i]).item(),
            "perplexity": perplexity(counts[i]).item(),
        }
        for i, s in enumerate(sides)
    ]


def reconstructed_picture(reconstructed: Reconstructed) -> Tensor:
    """A few images over their reconstructions, from the finest side to the coarsest (3, H, W) in [0, 1]."""
    n = min(SHOWN, len(reconstructed))
    spread = linspace_indices(n, len(reconstructed))
    originals = torch.cat([reconstructed.source.batch(range(i, i + 1)) for i in spread])
    made = reconstructed.at_every_side(originals)[1]
    rows = [F.interpolate(x.float(), originals.shape[-2:], mode="nearest") for x in (originals, *reversed(made))]
    return grid(torch.cat(rows) / 127.5 - 1, columns=n)
