"""From features to numbers, and from numbers to report.json, report.md and the plots of a sweep."""

from __future__ import annotations

from pathlib import Path

from utils.config_sampling import EvalConfig
from utils.evaluations.c2i.features import Extractor
from utils.evaluations.c2i.metrics import Statistics, frechet_distance, inception_score, precision_recall
from utils.evaluations.c2i.reference import Reference
from utils.evaluations.c2i.store import FeatureStore
from utils.files import write_json
from utils.tables import markdown

# What a number is called depends on the features: only Inception's are what the field calls FID and IS.
NAMES = {"frechet": "fid", "spatial": "sfid", "score": "inception_score", "precision": "precision", "recall": "recall"}
OTHERS = {
    "frechet": "frechet_distance",
    "spatial": "spatial_frechet_distance",
    "score": "inception_style_score",
    "precision": "precision",
    "recall": "recall",
}


def score(
    store: FeatureStore, extractor: Extractor, reference: Reference | None, config: EvalConfig
) -> dict[str, float]:
    """All metrics of the samples in a store; without a reference, the score alone."""
    pool = store.pool()
    device = store.ranks.device
    parts = (extractor.probabilities(part.to(device)).cpu() for part in pool.split(4096))
    values = {"score": inception_score(parts, config.split_size)}
    if reference is not None:
        values["frechet"] = frechet_distance(Statistics.of(pool.split(4096)), reference.pool)
        values["spatial"] = frechet_distance(Statistics.of(store.read("spatial")), reference.spatial)
        both = pool.to(device), reference.features.to(device)
        values["precision"], values["recall"] = precision_recall(*both, fp16=config.pr_fp16)
    return {**name_all(values, extractor.name), "samples": len(pool)}


def name_all(values: dict[str, float], features: str) -> dict[str, float]:
    """The field's names for Inception's numbers; the network's name behind all others."""
    if features == "inception":
        return {NAMES[key]: values[key] for key in NAMES if key in values}
    return {f"{OTHERS[key]}_{features}": values[key] for key in OTHERS if key in values}


def write_report(report: dict, directory: Path) -> None:
    """report.json and report.md."""
    write_json(directory / "report.json", report)
    lines = ["# Evaluation", "", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {show(value)} |" for name, value in report.items() if isinstance(value, int | float)]
    if report.get("sides"):
        lines += [
            "",
            dashed(report["sides"]),
            "",
            "![originals, and from the finest side down](reconstructions.png)",
        ]
    for title in ("settings", "versions"):
        lines += ["", f"| {title} | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in report[title].items()]
    if report["features"] != "inception":
        lines += ["", f"Features of {report['features']}: comparable among themselves only; none of these is an FID."]
    text = "\n".join(lines) + "\n"
    (directory / "report.md").write_text(text, encoding="utf-8")
    print(text)


def dashed(rows: list[dict]) -> str:
    """A table of rows of equal keys; a dash for None."""
    header = [name.replace("_", " ") for name in rows[0]]
    return markdown(header, [[show(value) for value in row.values()] for row in rows])


def show(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def write_sweep(rows: list[dict], directory: Path) -> None:
    """sweep.json, sweep.md, and sweep.png: distance over score, and distance over throughput."""
    from matplotlib.figure import Figure

    metrics = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    header = ["cfg", "top_k", "top_p", *metrics]
    table = dashed([{name: {**row["settings"], **row}.get(name) for name in header} for row in rows])
    write_json(directory / "sweep.json", rows)
    (directory / "sweep.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    distance = next((n for n in metrics if n == "fid" or n.startswith("frechet")), None)
    if distance is None:
        return
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    score_name = next(n for n in metrics if n.startswith("inception"))
    for plot, name in zip(figure.subplots(1, 2), (score_name, "images_per_second"), strict=True):
        points = [(r[name], r[distance], r["settings"]["cfg"]) for r in rows if name in r]
        plot.plot([p[0] for p in points], [p[1] for p in points], marker="o")
        for x, y, cfg in points:
            plot.annotate(f"cfg {cfg:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        plot.set(xlabel=name.replace("_", " "), ylabel=distance.replace("_", " "))
        plot.grid(alpha=0.3)
    figure.savefig(directory / "sweep.png", dpi=150)
