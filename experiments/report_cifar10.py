"""From the study's numbers to its report: tables beside the paper's, a verdict a claim, figures.

python -m experiments.report_cifar10 --out out/cifar10_cpu       # again, from study.json
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from scipy.stats import t as student

from experiments.figures import trajectory
from experiments.measures import standard_error, table_of
from experiments.plan_cifar10 import CLAIMS
from models.pipeline import open_pipeline, to_pil
from models.sampling import Guidance, SamplingConfig, generate
from utils.reporting.pictures import captioned_grid, grid, plot_curves, spread_labels
from utils.reporting.tables import markdown
from utils.runtime.entry import entry
from utils.runtime.files import read_json
from utils.runtime.flags import Parser
from utils.runtime.numerics import derive_seed
from utils.training.log import read_metrics

Rows = dict[str, list[dict]]  # variant → the rows of its seeds

COLUMNS = {
    "distance": ("Fréchet distance", 2),
    "at_equal_score": ("at TF's score", 2),
    "to_reconstructions": ("to reconstructions", 2),
    "fid": ("FID", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "precision_of_those": ("precision of reconstructions", 3),
    "recall_of_those": ("recall of reconstructions", 3),
    "score": ("IS-style score", 2),
    "accuracy": ("class accuracy", 3),
    "held_out": ("held-out NLL", 4),
    "train": ("training NLL", 4),
    "step_gap": ("gap of one step", 3),
    "gap": ("gap of own inputs", 3),
    "entropy": ("entropy", 3),
    "guidance": ("guidance", 1),
}
CONFIDENCE = 0.95
PAPER = {
    "5": {"TF continued": 3.47, "SAR argmax": 2.98, "SAR sampled": 2.94, "SAR guided": 2.89},
    "3": {
        "TF continued": 3.83,
        "SF full": 16.56,
        "SF alternate": 9.31,
        "SF interleave": 9.47,
        "SF hybrid@6": 10.83,  # hybrid@8: of its tokens 87 % are self-fed, here 77 %; of hybrid@16's (5.90) 38 %
    },
}
SHOWN = ("TF continued", "SAR guided", "noisy context")  # in the sample grid


def paired(found: Rows, a: str, b: str, name: str = "distance") -> list[float]:
    """a's number less b's, of every seed that both have: equal seeds saw equal data in equal order."""
    others = {row["seed"]: row[name] for row in found.get(b, []) if name in row}
    return [row[name] - others[row["seed"]] for row in found.get(a, []) if row["seed"] in others and name in row]


def half_width(spread: float, n: int) -> float:
    """Of the confidence interval of a mean of n values with this standard deviation (Student's t)."""
    return float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / math.sqrt(n)


def with_interval(differences: list[float]) -> str:
    """Mean ± standard error, and the confidence interval where there are several."""
    shown = standard_error(differences, 2)
    if len(differences) > 1:
        shown += f" (95 %: ± {half_width(statistics.stdev(differences), len(differences)):.2f})"
    return shown


def differences_table(found: Rows, columns: dict[str, tuple[str, int]]) -> str:
    """Every variant's numbers less those of continued teacher forcing, seed by seed."""
    rows = {}
    for name in found:
        pairs = {column: paired(found, name, "TF continued", column) for column in columns}
        if name not in ("before", "TF continued") and pairs["distance"]:
            full = {column: values for column, values in pairs.items() if len(values) == len(pairs["distance"])}
            rows[name] = [dict(zip(full, values, strict=True)) for values in zip(*full.values(), strict=True)]
    return table_of(rows, columns, standard_error)


def verdict(differences: list[float]) -> tuple[str, str]:
    """shown, not shown or opposite, of the claim that the differences are negative; and how many seeds
    would be just enough if mean and spread stayed as they are."""
    if len(differences) < 2:
        return "not run", "at least two seeds"
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = half_width(spread, len(differences))
    if abs(mean) > half:
        return ("shown" if mean < 0 else "opposite"), "–"
    enough = next((n for n in range(len(differences) + 1, 1001) if half_width(spread, n) < abs(mean)), None)
    return "not shown", f"{enough} seeds" if enough else "more than 1,000 seeds"


def claims_table(found: Rows, column: str) -> str:
    lines = []
    for claim, (a, b) in CLAIMS.items():
        differences = paired(found, a, b, column)
        said, settle = verdict(differences)
        shown = with_interval(differences) if differences else ""
        lines.append([claim, shown, str(len(differences)), f"**{said}**", settle])
    return markdown(["claim", "difference of distances", "seeds", "", "just enough at this spread"], lines)


def paper_table(found: Rows, number: str) -> str:
    """The paper's FIDs and our distances, each also as a multiple of continued teacher forcing's."""

    def beside_forced(values: list[float], forced: float) -> list[str]:
        return [standard_error(values, 2), f"{statistics.mean(values) / forced:.3f}"] if values else ["not run", ""]

    lines, columns = [], ("distance", "to_reconstructions")
    forced = {c: statistics.mean([row[c] for row in found.get("TF continued", [])] or [math.nan]) for c in columns}
    for name, fid in PAPER[number].items():
        mine = [beside_forced([row[c] for row in found.get(name, [])], forced[c]) for c in columns]
        lines.append([name, *beside_forced([fid], PAPER[number]["TF continued"]), *mine[0], *mine[1]])
    here = ["here: Fréchet distance", "× TF", "to reconstructions", "× TF"]
    return markdown(["", f"paper, Table {number}: FID", "× TF", *here], lines)


def per_side(found: Rows, name: str, digits: int = 3) -> str:
    """A number a scale, over the seeds."""
    sides = next(iter(found.values()))[0]["sides"]
    flat = {v: [dict(zip(sides, row[name], strict=True)) for row in rows] for v, rows in found.items()}
    return table_of(flat, {s: (f"side {s}", digits) for s in sides}, standard_error)


def cost_table(found: Rows) -> str:
    lines = []
    for name, rows in found.items():
        steps, gflops = rows[0]["steps"], rows[0]["gflops"]
        seconds = statistics.median(row["seconds"] for row in rows)
        lines.append([name, str(steps), f"{gflops:.2f}", f"{seconds:.3f}", f"{seconds * steps:.0f}"])
    return markdown(["", "steps", "GFLOP an image and step", "s/step", "s a run"], lines)


def draw_curves(found: Rows, out: Path) -> None:
    """Fig. 1a: held-out NLL of the base, and of the variants' first seeds from there."""
    base = read_metrics(Path(found["before"][0]["run"]), "val/loss")
    start = ([0], [base[1][-1]])
    more = {}
    for name, rows in found.items():
        if name != "before":
            steps, values = read_metrics(Path(rows[0]["run"]), "val/loss")
            more[name] = (start[0] + steps, start[1] + values)
    far = {name: more.pop(name) for name in list(more) if name.startswith("SF") or "γ" in name}
    panels = {"teacher forcing from scratch": {"base": base}, "further steps": more, "further steps, far off": far}
    panels = {title: curves for title, curves in panels.items() if curves}
    plot_curves(panels, ("step", "held-out NLL, nats per token"), out / "curves.png")


FRONTIER = {"distance": 2, "score": 2, "precision": 3, "recall": 3}  # digits


def frontier_of(rows: list[dict]) -> list[dict]:
    """Means over the seeds at every guidance."""
    points = zip(*(row["frontier"] for row in rows), strict=True)
    return [{key: statistics.mean(point[key] for point in same) for key in ("guidance", *FRONTIER)} for same in points]


def frontier_table(found: Rows) -> str:
    """A line a variant and guidance."""
    lines = [
        [name, f"{point['guidance']:g}", *(f"{point[key]:.{digits}f}" for key, digits in FRONTIER.items())]
        for name, rows in found.items()
        for point in frontier_of(rows)
    ]
    return markdown(["", "guidance", "Fréchet distance", "IS-style score", "precision", "recall"], lines)


def same_guidance_table(found: Rows) -> str:
    """Distances at every guidance less those of continued teacher forcing at the same one, seed by seed: no choice of a
    guidance, which the noise of few images can tip, is in them."""
    guidances = [point["guidance"] for point in next(iter(found.values()))[0]["frontier"]]
    points = [
        {name: [{"seed": row["seed"], **row["frontier"][i]} for row in rows] for name, rows in found.items()}
        for i in range(len(guidances))
    ]
    lines = [
        [name, *(with_interval(paired(at, name, "TF continued")) for at in points)]
        for name in found
        if name not in ("before", "TF continued") and paired(points[0], name, "TF continued")
    ]
    return markdown(["", *(f"guidance {g:g}" for g in guidances)], lines)


def draw_frontiers(found: Rows, out: Path) -> None:
    """Distance against score, precision against recall, over guidance: variants with all seeds, and the others."""
    most = max(len(rows) for rows in found.values())
    panels = {"all seeds": lambda rows: len(rows) == most, "one seed": lambda rows: len(rows) < most}
    axes = {"score": ("IS-style score", "Fréchet distance", "distance"), "recall": ("recall", "precision", "precision")}
    for x, (x_title, y_title, y) in axes.items():
        curves = {}
        for title, wanted in panels.items():
            chosen = {name: frontier_of(rows) for name, rows in found.items() if wanted(rows) or name == "TF continued"}
            curves[title] = {n: ([p[x] for p in points], [p[y] for p in points]) for n, points in chosen.items()}
        plot_curves(curves, (x_title, y_title), out / f"frontier_{x}.png")


def draw_samples(found: Rows, out: Path, each: int = 10) -> None:
    """A row of `each` a class: the first seeds of some variants, at their guidance, from equal seeds."""
    pictures, captions = [], []
    for name in (n for n in SHOWN if n in found):
        row = found[name][0]
        pipeline = open_pipeline(row["run"])
        labels = spread_labels(10, 10).repeat_interleave(each)
        seeds = [derive_seed("shown", i) for i in range(len(labels))]
        draw = SamplingConfig(Guidance("ramp", row["guidance"]))
        images = generate(pipeline.model, pipeline.vae, labels, pipeline.schedule, draw, seeds)
        picture = to_pil(grid(images, each)[None] * 2 - 1)[0]
        pictures.append(picture)
        captions.append(name)
    if pictures:
        captioned_grid(pictures, captions, columns=len(pictures), cell=pictures[0].width).save(out / "samples.png")


def draw_trajectory(found: Rows, data: dict[str, str], out: Path) -> None:
    """Fig. 7: how teacher forcing and SAR go on from the same held-out images' codes."""
    pair = [found[name][0] for name in ("TF continued", "SAR guided") if name in found]
    if len(pair) == 2:
        where = {"vae_ckpt": "", "pn": "", "cfg": pair[0]["guidance"], "seed": 0, "n": 3, **data}
        trajectory(argparse.Namespace(ckpt=[row["run"] for row in pair], out=str(out / "trajectory.png"), **where))


def as_text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_report(out: Path) -> None:
    """OUT/report.md, curves.png, samples.png and trajectory.png, from OUT/study.json and the runs it names."""
    study = read_json(out / "study.json")
    found: Rows = study["rows"]
    columns = {key: title for key, title in COLUMNS.items() if any(key in r for rows in found.values() for r in rows)}
    bounds = {kind: [row] for kind, row in study["bounds"].items()}
    draw_curves(found, out)
    draw_samples(found, out)
    draw_frontiers(found, out)
    draw_trajectory(found, {name: study["settings"][name] for name in ("dataset", "data_path")}, out)
    parts = [
        "## Numbers",
        table_of({**bounds, **found}, columns, standard_error),
        "## Differences from continued teacher forcing, seed by seed",
        differences_table(found, {key: title for key, title in columns.items() if key != "guidance"}),
        "## Claims, by the distance to held-out photographs",
        claims_table(found, "distance"),
        "## Claims, by that distance at equal score",
        claims_table(found, "at_equal_score"),
        "## Claims, by the distance to reconstructions",
        claims_table(found, "to_reconstructions"),
        "## Differences in Fréchet distance from continued teacher forcing at equal guidance, seed by seed",
        same_guidance_table(found),
        "## Frontiers over guidance",
        frontier_table(found),
        "![distance against score](frontier_score.png)",
        "![precision against recall](frontier_recall.png)",
        "## Beside the paper",
        paper_table(found, "5"),
        paper_table(found, "3"),
        "## By scale: gap of one stagger-scale step",
        per_side(found, "step_gap_side"),
        "## By scale: gap of own inputs",
        per_side(found, "gap_side"),
        "## By scale: entropy",
        per_side(found, "entropy_side"),
        "## Cost",
        cost_table(found),
        "## Pictures",
        "![held-out NLL](curves.png)",
        "![samples](samples.png)",
        "![trajectories](trajectory.png)",
        "## Settings",
        markdown(["", ""], [[name, as_text(value)] for name, value in study["settings"].items()]),
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m experiments.report_cifar10")
    parser.add_argument("--out", type=Path, default=Path("out/cifar10_cpu"))
    write_report(parser.parse_args().out)


if __name__ == "__main__":
    main()
