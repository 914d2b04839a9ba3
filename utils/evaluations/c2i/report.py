"""From features to numbers, and from numbers to report.json, report.md and the plots of a sweep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from utils.config.sampling import EvalConfig
from utils.evaluations.c2i.features import Extractor
from utils.evaluations.c2i.metrics import Statistics, frechet_distance, inception_score, precision_recall
from utils.evaluations.c2i.reference import Reference
from utils.evaluations.c2i.store import FeatureStore
from utils.reporting.tables import markdown
from utils.runtime.files import read_json, write_json

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
) -> dict[str, float | str]:
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
    named: dict[str, float | str] = {**name_all(values, extractor.name), "samples": len(pool)}
    if reference is not None and len(pool) < pool.shape[1]:
        named["warning"] = (
            f"{len(pool)} samples are fewer than the {pool.shape[1]} dimensions of the features: the distances are far "
            "too large, and compare with those of equally many samples only"
        )
    return named


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
    if report.get("warning"):
        lines += ["", f"**Warning**: {report['warning']}."]
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
    """sweep.json, sweep.md, and sweep.png: distance over score."""
    from matplotlib.figure import Figure

    several = len({row["settings"].get("moving_average") for row in rows}) > 1
    swept = ("cfg", "top_k", "top_p", *(("moving_average",) if several else ()))
    metrics = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    table = dashed([{name: {**row["settings"], **row}.get(name) for name in (*swept, *metrics)} for row in rows])
    write_json(directory / "sweep.json", rows)
    text = table + "\n" + (f"\n**Warning**: {rows[0]['warning']}.\n" if rows[0].get("warning") else "")
    (directory / "sweep.md").write_text(text, encoding="utf-8")
    print(text)
    distance = next((n for n in metrics if n == "fid" or n.startswith("frechet")), None)
    if distance is None:
        return
    score_name = next(n for n in metrics if n.startswith("inception"))
    varied = [name for name in swept if len({row["settings"][name] for row in rows}) > 1]
    along, others = varied[:1], varied[1:]  # points of equal others make a line
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(said(row, others), []).append(row)
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    plot = figure.subplots()
    for label, points in lines.items():
        plot.plot([p[score_name] for p in points], [p[distance] for p in points], marker="o", label=label)
        for p in points:
            place = (p[score_name], p[distance])
            plot.annotate(said(p, along), place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    plot.set(xlabel=score_name.replace("_", " "), ylabel=distance.replace("_", " "))
    plot.grid(alpha=0.3)
    if others:
        plot.legend(fontsize=8)
    figure.savefig(directory / "sweep.png", dpi=150)


def said(row: dict, names: Sequence[str]) -> str:
    """A report's settings of these names."""
    return ", ".join(f"{name} {row['settings'][name]:g}" for name in names)


def compare(paths: Sequence[str]) -> str:
    """Reports side by side, as Markdown: their numbers, then the settings that differ.

    Args:
        paths: directories that an evaluation wrote to, or their report.json.
    """
    files = [Path(path) / "report.json" if Path(path).is_dir() else Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            below = ", ".join(sorted(str(f.parent) for f in file.parent.glob("*/report.json")))
            raise ValueError(f"no report {file}" + (f"; there are some in {below}" if below else ""))
    reports = [read_json(file) for file in files]
    common = os.path.commonpath([file.parent.parent.resolve() for file in files])
    titles = [os.path.relpath(file.parent.resolve(), common) for file in files]
    numbers = dict.fromkeys(n for r in reports for n, value in r.items() if isinstance(value, int | float))
    rows = [[name, *(show(report.get(name)) for report in reports)] for name in numbers]
    described = [{**r.get("settings", {}), **{n: r.get(n) for n in ("features", "reference")}} for r in reports]
    names = dict.fromkeys(name for settings in described for name in settings)
    differing = [name for name in names if len({str(settings.get(name)) for settings in described}) > 1]
    rows += [[name, *(str(settings.get(name, "")) for settings in described)] for name in differing]
    text = markdown(["", *titles], rows)
    content = [settings.get("reference_sha256") or settings["reference"] for settings in described]
    unequal = ["features"] if "features" in differing else []
    unequal += ["references"] if len(set(content)) > 1 else []
    unequal += [name for name in ("split_size", "reference_image_size") if name in differing]
    if unequal:
        text += f"\n\n**Warning**: these are of different {' and '.join(unequal)}: their numbers do not compare."
    for title, report in zip(titles, reports, strict=True):
        text += f"\n\n**Warning** ({title}): {report['warning']}." if report.get("warning") else ""
    return text
