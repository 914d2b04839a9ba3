"""Engine of the studies on digits: variants and seeds, each a run of train.py, a scorer, and a table.

A study is a `Plan`. Its runs start from a quickstart's stages, --jobs at a time; a finished one is not run again. OUT
gets the runs, study.json (the numbers of every seed) and table.md.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments.measures import slug, table_of
from experiments.quickstart import check_quickstart, run_stage
from utils.runtime.checkpoint import reached
from utils.runtime.entry import check_output_directory
from utils.runtime.files import read_json, write_json
from utils.runtime.flags import Parser, whole

Scorer = Callable[[Path], dict]  # a run → its numbers, by column


@dataclass(frozen=True)
class Plan:
    """A study: what is run, and what is measured of it."""

    name: str  # of its module, and of its directory below out/
    variants: Callable[[str], dict[str, list[str]]]  # model of the quickstart → name → flags
    flags: Callable[[Path], list[str]]  # a quickstart's directory → the flags that all runs share
    scorer: Callable[[Path], Scorer]  # a quickstart's directory → the scorer
    columns: dict[str, tuple[str, int]]  # of the table: titles and digits
    steps: int
    before: bool = False  # the model that all runs go on from is a row, too
    # A quickstart's directory and OUT → flags of each variant for what is made here, before all runs.
    prepare: Callable[[Path, Path], dict[str, list[str]]] = lambda quickstart, out: {}


def run_study(plan: Plan, description: str) -> None:
    """The command line of a study."""
    parser = Parser(description, prog=f"python -m experiments.{plan.name}")
    parser.add_argument("--quickstart", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("out", plan.name))
    parser.add_argument("--steps", type=whole(1), default=plan.steps)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=whole(1), default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name contains one of these")
    parser.add_argument("--status", action="store_true", help="say what is done, and stop")
    args = parser.parse_args()
    check_quickstart(args.quickstart)
    check_output_directory(args.out, "--out")
    every = plan.variants(read_json(args.quickstart / "report.json")["model"])
    variants = {name: flags for name, flags in every.items() if any(part in name for part in args.only)}
    if not variants:
        raise ValueError(f"--only {args.only}: no variant has that in its name; there are {', '.join(every)}")
    jobs = {(name, seed): f"{slug(name)}_{seed}" for seed in args.seeds for name in variants}
    if args.status:
        for (name, seed), directory in jobs.items():
            print(f"{name:>40}  seed {seed}: step {reached(args.out / directory)} of {args.steps}")
        return

    prepared = plan.prepare(args.quickstart, args.out)

    def train(job: tuple[str, int]) -> Path:
        flags = [
            *plan.flags(args.quickstart),
            *prepared.get(job[0], []),
            *variants[job[0]],
            f"--seed={job[1]}",
            "--vis_num_samples=0",
        ]
        return run_stage(jobs[job], "train.py", flags, args.steps, args.out, processes=1)[0]

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(jobs, pool.map(train, jobs), strict=True))
    scores = plan.scorer(args.quickstart)
    found = {"before": [scores(args.quickstart / "flexvar")]} if plan.before else {}
    for row in found.get("before", []):
        row.pop("seconds", None)  # of two ranks, the others' are of one
    found |= {name: [scores(runs[name, seed]) for seed in args.seeds] for name in variants}
    write_json(args.out / "study.json", found)
    table = table_of(found, plan.columns)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
