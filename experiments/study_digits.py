"""Every training schedule of the paper on digits: equal further steps from one model, three seeds.

    python -m experiments.study_digits          # after the quickstart; a finished run is not run again
    python -m experiments.study_digits --quickstart out/quickstart_var --out out/study_digits_var   # SAR on VAR

Writes table.md, study.json and the runs to out/study_digits.
"""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.measures import measure
from experiments.quickstart import FLEXVAR, FURTHER, MODELS, PER_CLASS, Judge, sample
from experiments.study import Plan, Scorer, run_study
from models.weights import load_tokenizer
from utils.config.training import DataConfig
from utils.runtime.entry import entry
from utils.runtime.files import read_json

DRAWN = ["--sf_top_k=0", "--sf_top_p=0"]
SAR = "--training_mode=csfl"
VARIANTS = {
    "TF continued": ["--training_mode=teacher_forcing"],
    "SF full": ["--training_mode=sf_full", "--rollout=sample", *DRAWN],
    "SF alternate": ["--training_mode=sf_alternate", "--rollout=sample", *DRAWN],
    "SF interleave": ["--training_mode=sf_interleave", "--rollout=sample", *DRAWN],
    "SF hybrid@3": ["--training_mode=sf_hybrid", "--sf_hybrid_from=3", "--rollout=sample", *DRAWN],
    "SF hybrid@8": ["--training_mode=sf_hybrid", "--sf_hybrid_from=8", "--rollout=sample", *DRAWN],
    "SAR argmax": [SAR, "--rollout=argmax"],
    "SAR sampled": [SAR, "--rollout=sample", *DRAWN],
    "SAR guided": [SAR, "--rollout=cfg", *DRAWN],
    "SAR guided, ground-truth target": [SAR, "--rollout=cfg", "--csf_target=ground_truth", *DRAWN],
    "SAR sampled, γ 0.1": [SAR, "--rollout=sample", "--csf_weight=0.1", *DRAWN],
    "SAR sampled, γ 1": [SAR, "--rollout=sample", "--csf_weight=1", *DRAWN],
}
# Of a VAR beside the others: the other reading of its second pass, and our target for it.
VARIANTS_VAR = {
    "SAR guided, one-step canvas": [SAR, "--rollout=cfg", "--rollout_canvas=one_step", *DRAWN],
    "SAR guided, requantised target": [SAR, "--rollout=cfg", "--csf_target=requantised", *DRAWN],
    "SAR guided, requantised target, γ 1": [SAR, "--rollout=cfg", "--csf_target=requantised", "--csf_weight=1", *DRAWN],
}
COLUMNS = {
    "class_accuracy": ("class accuracy", 3),
    "frechet_distance": ("Fréchet distance", 2),
    "held_out": ("held-out NLL", 4),
    "step_gap": ("gap of one step, nats", 3),
    "gap": ("gap of own inputs, nats", 3),
    "seconds": ("s/step", 2),
}


def variants(model: str) -> dict[str, list[str]]:
    """Variants of a quickstart with this --model."""
    every = {**VARIANTS, **(VARIANTS_VAR if model == "var" else {})}
    return {name: [*MODELS[model].model, *flags] for name, flags in every.items()}


def flags(quickstart: Path) -> list[str]:
    return [f"--vae_ckpt={quickstart / 'tokenizer'}", f"--init_ckpt={quickstart / 'flexvar'}", *FLEXVAR, *FURTHER]


def scorer(quickstart: Path) -> Scorer:
    judge, vae = Judge(), load_tokenizer(quickstart / "tokenizer")
    sampling = MODELS[read_json(quickstart / "report.json")["model"]].sampling
    labels = torch.arange(10).repeat_interleave(PER_CLASS)

    def scores(run: Path) -> dict:
        found = measure(run, DataConfig(dataset="digits"))
        return {**found, **judge.score(sample(run, vae, labels, sampling), labels.numpy())}

    return scores


@entry
def main() -> None:
    run_study(Plan("study_digits", variants, flags, scorer, COLUMNS, steps=100, before=True), __doc__)


if __name__ == "__main__":
    main()
