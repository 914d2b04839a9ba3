"""FlexVAR against the hybrid model on digits (Sec. 3.3, Table 2): at the first side, and at full resolution.

    python -m experiments.study_hybrid          # after the quickstart; a finished run is not run again

Equal steps of teacher forcing from scratch, three seeds, samples without guidance. Writes table.md, study.json and the
runs to out/study_hybrid.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
    check_quickstart,
    run_stage,
)
from experiments.study_digits import write_table
from models.sampling import SamplingConfig, sample_codes
from models.scales import ScaleSchedule
from models.tokenizer import Tokenizer
from models.weights import load_flexvar, load_tokenizer
from utils.reporting.pictures import read_metrics
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.flags import Parser, whole
from utils.runtime.numerics import derive_seed

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


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m experiments.study_hybrid")
    parser.add_argument("--quickstart", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("out/study_hybrid"))
    parser.add_argument("--steps", type=whole(1), default=450)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    check_quickstart(args.quickstart)
    check_output_directory(args.out, "--out")
    start = [f"--vae_ckpt={args.quickstart / 'tokenizer'}", f"--code_cache={args.quickstart / 'codes'}"]
    jobs = [(name, seed) for seed in args.seeds for name in VARIANTS]

    def train(job: tuple[str, int]) -> Path:
        name, seed = job
        flags = [*start, *FLEXVAR, *FROM_SCRATCH, *VARIANTS[name], f"--seed={seed}", "--vis_num_samples=0"]
        place = f"{list(VARIANTS).index(name)}_{seed}"
        return run_stage(place, "train.py", flags, args.steps, args.out, processes=1)[0]

    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(jobs, pool.map(train, jobs), strict=True))
    vae = load_tokenizer(args.quickstart / "tokenizer")
    judges = {HYBRID_SIDE: Judge(side=HYBRID_SIDE * vae.config.factor), 8: Judge()}
    found = {name: [scores(runs[name, seed], vae, judges) for seed in args.seeds] for name in VARIANTS}
    write_table(found, COLUMNS, args.out)


if __name__ == "__main__":
    main()
