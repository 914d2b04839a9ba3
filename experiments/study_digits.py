"""Every training schedule of the paper on digits: equal further steps from one model, three seeds.

    python -m experiments.study_digits          # after the quickstart; a finished run is not run again
    python -m experiments.study_digits --quickstart out/quickstart_var --out out/study_digits_var   # SAR on VAR

Writes table.md, study.json and the runs to out/study_digits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from experiments.measures import measure, slug, table_of
from experiments.quickstart import FLEXVAR, FURTHER, MODELS, PER_CLASS, Judge, check_quickstart, run_stage, sample
from models.weights import load_tokenizer
from utils.config.training import DataConfig
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.files import read_json, write_json
from utils.runtime.flags import Parser, whole

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
    "SAR guided, requantised, γ 1": [SAR, "--rollout=cfg", "--csf_target=requantised", "--csf_weight=1", *DRAWN],
}
COLUMNS = {
    "class_accuracy": ("class accuracy", 3),
    "frechet_distance": ("Fréchet distance", 2),
    "held_out": ("held-out NLL", 4),
    "step_gap": ("gap of one step, nats", 3),
    "gap": ("gap of own inputs, nats", 3),
    "seconds": ("s/step", 2),
}


def write_table(found: dict[str, list[dict]], columns: dict[str, tuple[str, int]], out: Path) -> None:
    """study.json: the rows of every seed; table.md."""
    write_json(out / "study.json", found)
    table = table_of(found, columns)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m experiments.study_digits")
    parser.add_argument("--quickstart", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("out/study_digits"))
    parser.add_argument("--steps", type=whole(1), default=100)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name contains one of these")
    args = parser.parse_args()
    check_quickstart(args.quickstart)
    check_output_directory(args.out, "--out")
    start = [f"--vae_ckpt={args.quickstart / 'tokenizer'}", f"--init_ckpt={args.quickstart / 'flexvar'}"]
    model = read_json(args.quickstart / "report.json")["model"]
    every = {**VARIANTS, **(VARIANTS_VAR if model == "var" else {})}
    variants = {name: flags for name, flags in every.items() if any(part in name for part in args.only)}
    if not variants:
        raise ValueError(f"--only {args.only}: no variant has that in its name; there are {', '.join(every)}")
    jobs = [(name, seed) for seed in args.seeds for name in variants]

    def train(job: tuple[str, int]) -> Path:
        name, seed = job
        flags = [
            *start,
            *FLEXVAR,
            *MODELS[model][3],
            *FURTHER,
            *variants[name],
            f"--seed={seed}",
            "--vis_num_samples=0",
        ]
        return run_stage(f"{slug(name)}_{seed}", "train.py", flags, args.steps, args.out, processes=1)[0]

    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(jobs, pool.map(train, jobs), strict=True))
    judge, vae = Judge(), load_tokenizer(args.quickstart / "tokenizer")
    labels = torch.arange(10).repeat_interleave(PER_CLASS)

    def scores(run: Path) -> dict:
        found = measure(run, DataConfig(dataset="digits"))
        return {**found, **judge.score(sample(run, vae, labels), labels.numpy())}

    before = scores(args.quickstart / "flexvar")
    del before["seconds"]  # of two ranks, the others' are of one
    found = {"before": [before], **{name: [scores(runs[name, seed]) for seed in args.seeds] for name in variants}}
    write_table(found, COLUMNS, args.out)


if __name__ == "__main__":
    main()
