"""FlexVAR against the hybrid model on digits (Sec. 3.3, Table 2): at the first side, and at full resolution.

    python -m experiments.study_hybrid          # after the quickstart; a finished run is not run again

Equal steps of teacher forcing from scratch, three seeds, samples without guidance. Writes table.md, study.json and the
runs to out/study_hybrid.
"""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.quickstart import (
    FLEXVAR,
    FROM_SCRATCH,
    HYBRID,
    HYBRID_SIDE,
    PER_CLASS,
    SIDES,
    Judge,
)
from experiments.study import Plan, Scorer, run_study
from models.sampling import SamplingConfig, sample_codes
from models.scales import ScaleSchedule
from models.tokenizer import Tokenizer
from models.weights import load_flexvar, load_tokenizer
from utils.runtime.entry import entry
from utils.runtime.numerics import derive_seed
from utils.training.log import read_metrics

VARIANTS = {"FlexVAR": [], "hybrid": HYBRID}
COLUMNS = {
    "first_distance": (f"Fréchet distance at side {HYBRID_SIDE}", 2),
    "first_accuracy": (f"class accuracy at side {HYBRID_SIDE}", 3),
    "frechet_distance": ("Fréchet distance", 2),
    "class_accuracy": ("class accuracy", 3),
    "finest_loss": ("held-out NLL at side 8", 4),
}


def scores(run: Path, vae: Tokenizer, judges: dict[int, Judge]) -> dict[str, float]:
    """Samples judged as the first side shows them, and as the last one does."""
    model = load_flexvar(run)
    schedule = model.trim(ScaleSchedule.parse(SIDES))
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    seeds = [derive_seed("study", i) for i in range(len(labels))]
    codes = sample_codes(model, vae.pathway, labels, schedule, SamplingConfig(), seeds)
    found: dict[str, float] = {}
    for names, side in (("first_accuracy", "first_distance"), HYBRID_SIDE), (("class_accuracy", "frechet_distance"), 8):
        with torch.no_grad():
            images = torch.cat(
                [vae.decode_at({side: part}, side, ScaleSchedule((side,))) for part in codes[side].split(100)]
            )
        score = judges[side].score(images, labels.numpy())
        found |= dict(zip(names, (score["class_accuracy"], score["frechet_distance"]), strict=True))
    return {**found, "finest_loss": read_metrics(run, "val/loss_side/8")[1][-1]}


def flags(quickstart: Path) -> list[str]:
    start = [f"--vae_ckpt={quickstart / 'tokenizer'}", f"--code_cache={quickstart / 'codes'}"]
    return [*start, *FLEXVAR, *FROM_SCRATCH]


def scorer(quickstart: Path) -> Scorer:
    vae = load_tokenizer(quickstart / "tokenizer")
    judges = {HYBRID_SIDE: Judge(side=HYBRID_SIDE * vae.config.factor), 8: Judge()}
    return lambda run: scores(run, vae, judges)


@entry
def main() -> None:
    run_study(Plan("study_hybrid", lambda _: VARIANTS, flags, scorer, COLUMNS, steps=450), __doc__)


if __name__ == "__main__":
    main()
