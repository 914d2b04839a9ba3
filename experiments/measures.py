"""Shared by the studies: measures beside samples (likelihoods, exposure bias, entropy, cost), and tables.

Legend: L tokens of a schedule.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from benchmarks.common import forward_flops
from models import ScaleSchedule
from utils.config.training import DataConfig, SARConfig
from utils.evaluations.exposure_bias import Exposure, ValidationSet
from utils.reporting.tables import markdown
from utils.runtime.files import read_json
from utils.training.estimate import step_flops
from utils.training.log import read_metrics

IMAGES = 500  # of each split

Cell = Callable[[list[float], int], str]  # the values of all seeds and the digits → what stands in the table


def measure(run: Path, data: DataConfig) -> dict[str, float | list[float]]:
    """Of a finished run, in evaluation mode, in nats per token; `…_side` a number a scale."""
    seen, held_out = (ValidationSet.of(str(run), data, IMAGES, split=split) for split in ("train", "val"))
    schedule = held_out.schedule
    exposure, entropy = Exposure.of(held_out, seed=0), held_out.entropy()
    config, model = read_json(run / "config.json"), held_out.pipeline.model.config
    known = {f.name for f in fields(SARConfig)}
    sar = SARConfig(**{name: value for name, value in config["sar"].items() if name in known})
    speeds = read_metrics(run, "train/images_per_second")[1]
    return {
        "train": seen.nll(seen.tokens).double().mean().item(),
        "held_out": per_token(exposure.forced, schedule),
        "gap": per_token(exposure.gaps("own"), schedule),
        "gap_side": exposure.gaps("own"),
        "step_gap": per_token(exposure.gaps("one_step"), schedule),
        "step_gap_side": exposure.gaps("one_step"),
        "entropy": per_token(entropy, schedule),
        "entropy_side": entropy,
        "sides": list(schedule.sides),
        "seconds": config["optim"]["bs"] / statistics.median(speeds),
        "steps": read_metrics(run, "train/loss")[0][-1],
        "gflops": step_flops(sar, schedule, partial(forward_flops, model)) / 1e9,
    }


def per_token(sides: list[float], schedule: ScaleSchedule) -> float:
    """Means of each side → the mean over all tokens."""
    return sum(n * value for n, value in zip(schedule.lengths, sides, strict=True)) / schedule.total


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.lower())


def mean_sd(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def standard_error(values: list[float], digits: int) -> str:
    """Mean ± standard error over the seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def table_of(found: dict[str, list[dict]], columns: dict[str, tuple[str, int]], cell: Cell = mean_sd) -> str:
    """A line a variant, from the rows of its seeds; columns have titles and digits."""

    def cells(rows: list[dict]) -> list[str]:
        return [cell([r[c] for r in rows], d) if all(c in r for r in rows) else "" for c, (_, d) in columns.items()]

    lines = [[name, *cells(rows)] for name, rows in found.items()]
    return markdown(["", *(title for title, _ in columns.values())], lines)
