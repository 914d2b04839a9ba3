"""Every training schedule of the paper on digits: equal further steps from one FlexVAR, three seeds.

    python -m experiments.study_digits          # after the quickstart; a finished run is not run again

Writes table.md, study.json and the runs to out/study_digits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from experiments.quickstart import FLEXVAR, FURTHER, PER_CLASS, Judge, run_stage, sample
from utils.files import write_json
from utils.pictures import read_metrics
from utils.tables import markdown
from utils.visualize import HeldOut, exposure
from utils.weights import load_tokenizer

DRAWN = ["--sf_top_k=0", "--sf_top_p=0"]
SAR = "--training_mode=csfl"
VARIANTS = {
    "TF continued": ["--training_mode=teacher_forcing"],
    "SF full": ["--training_mode=sf_full", "--rollout=sample", *DRAWN],
    "SF alternate": ["--training_mode=sf_alternate", "--rollout=sample", *DRAWN],
    "SF interleave": ["--training_mode=sf_interleave", "--rollout=sample", *DRAWN],
    "SF hybrid, from side 3": ["--training_mode=sf_hybrid", "--sf_hybrid_from=3", "--rollout=sample", *DRAWN],
    "SAR argmax": [SAR, "--rollout=argmax"],
    "SAR sampled": [SAR, "--rollout=sample", *DRAWN],
    "SAR guided": [SAR, "--rollout=cfg", *DRAWN],
    "SAR guided, ground-truth target": [SAR, "--rollout=cfg", "--csf_target=ground_truth", *DRAWN],
    "SAR sampled, γ 0.1": [SAR, "--rollout=sample", "--csf_weight=0.1", *DRAWN],
    "SAR sampled, γ 1": [SAR, "--rollout=sample", "--csf_weight=1", *DRAWN],
}
COLUMNS = {
    "class_accuracy": ("class accuracy", 3),
    "frechet_distance": ("Fréchet distance", 2),
    "held_out_loss": ("held-out NLL", 4),
    "exposure_gap": ("exposure gap, nats", 3),
    "seconds_per_step": ("s/step", 2),
}


Cell = Callable[[list[float], int], str]  # the values of all seeds and the digits → what stands in the table


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.lower())


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table_of(found: dict[str, list[dict]], columns: dict[str, tuple[str, int]], cell: Cell = spread) -> str:
    """A line a variant, from the rows of its seeds; columns have titles and digits."""
    lines = [
        [name, *(cell([row[c] for row in rows], d) if c in rows[0] else "" for c, (_, d) in columns.items())]
        for name, rows in found.items()
    ]
    return markdown(["", *(title for title, _ in columns.values())], lines)


def write_table(found: dict[str, list[dict]], columns: dict[str, tuple[str, int]], out: Path) -> None:
    """study.json: the rows of every seed; table.md."""
    write_json(out / "study.json", found)
    table = table_of(found, columns)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quickstart", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("out/study_digits"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="variants whose name contains this")
    args = parser.parse_args()
    start = [f"--vae_ckpt={args.quickstart / 'tokenizer'}", f"--init_ckpt={args.quickstart / 'flexvar'}"]
    variants = {name: flags for name, flags in VARIANTS.items() if args.only in name}
    jobs = [(name, seed) for seed in args.seeds for name in variants]

    def train(job: tuple[str, int]) -> Path:
        name, seed = job
        flags = [*start, *FLEXVAR, *FURTHER, *VARIANTS[name], f"--seed={seed}", "--vis_num_samples=0"]
        return run_stage(f"{slug(name)}_{seed}", "train.py", flags, args.steps, args.out, processes=1)[0]

    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(jobs, pool.map(train, jobs), strict=True))
    judge, vae = Judge(), load_tokenizer(args.quickstart / "tokenizer")
    labels = torch.arange(10).repeat_interleave(PER_CLASS)

    def scores(run: Path) -> dict[str, float]:
        data = HeldOut.of(str(run), argparse.Namespace(vae_ckpt="", pn="", dataset="digits", data_path="", n=497))
        forced, own = exposure(data, seed=0)
        gap = (own.mean() - forced.mean()).item()
        loss = read_metrics(run, "val/loss")[1][-1]
        return {**judge.score(sample(run, vae, labels), labels.numpy()), "held_out_loss": loss, "exposure_gap": gap}

    found: dict[str, list[dict[str, float]]] = {name: [] for name in ["before", *variants]}
    found["before"].append(scores(args.quickstart / "flexvar"))
    for (name, _), run in runs.items():
        seconds = 48 / statistics.median(read_metrics(run, "train/images_per_second")[1])
        found[name].append({**scores(run), "seconds_per_step": seconds})
    write_table(found, COLUMNS, args.out)


if __name__ == "__main__":
    main()
