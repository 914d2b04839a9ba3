"""TensorBoard, W&B, metrics.jsonl and the console. A logger that should be silent is `Silent`, not an `if`."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.config import LogConfig
from utils.distributed import Ranks


class Silent:
    """Logs nothing: what every rank but the first holds."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Named numbers of a step."""

    def image(self, name: str, image: Tensor, step: int) -> None:
        """A picture (3, H, W) in [0, 1]."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines(Silent):
    """One JSON object a line, each with its step. Lines past `start` are from before a resume, and dropped."""

    def __init__(self, path: Path, start: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("}\n")]  # a killed run may leave half a line
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= start))
        partial.replace(path)
        self.file = path.open("a", buffering=1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Silent):
    def __init__(self, directory: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=start + 1 if start else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.writer.add_image(name, image, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Silent):
    """Weights & Biases; the key comes from the environment."""

    def __init__(self, config: LogConfig, name: str, directory: Path, run_config: dict):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity or None,
            name=config.wandb_run_name or name,
            tags=[tag.strip() for tag in config.wandb_tags.split(",") if tag.strip()] or None,
            notes=config.wandb_notes or None,
            dir=str(directory),
            config=run_config,
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Several(Silent):
    """All of its loggers."""

    def __init__(self, loggers: list[Silent]):
        self.loggers = loggers

    def scalars(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.scalars(values, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        for logger in self.loggers:
            logger.image(name, image, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


def make_logger(config: LogConfig, ranks: Ranks, directory: Path, name: str, run_config: dict, start: int) -> Silent:
    """The loggers of a run that goes on after step `start`; silent but on the first rank."""
    if not ranks.first:
        return Silent()
    loggers: list[Silent] = [JsonLines(directory / "metrics.jsonl", start)]
    if config.logger_type == "tensorboard":
        loggers.append(TensorBoard(directory / "tensorboard", start))
    elif config.logger_type == "wandb":
        loggers.append(WandB(config, name, directory, run_config))
    return Several(loggers)


class Meter:
    """Means of named tensors over steps. Nothing leaves the device until `means` is called."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: defaultdict[str, int] = defaultdict(int)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().float().clone()
            self.counts[name] += 1

    def peek(self, ranks: Ranks) -> dict[str, float]:
        """The means over steps and ranks since `means` was called. All ranks must have added the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        stacked = torch.stack([self.sums[n] / self.counts[n] for n in names])
        return dict(zip(names, ranks.mean(stacked).tolist(), strict=True))

    def means(self, ranks: Ranks) -> dict[str, float]:
        """`peek`, and start anew."""
        values = self.peek(ranks)
        self.sums.clear()
        self.counts.clear()
        return values


class Progress:
    """The console line of a run: a bar with ETA on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, total: int, start: int, ranks: Ranks):
        self.first = ranks.first
        self.name, self.total, self.step, self.start = name, total, start, start
        self.terminal = sys.stderr.isatty()
        self.began = self.since = time.perf_counter()
        self.images = 0
        self.bar = tqdm(
            desc=name, total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=not (self.first and self.terminal),
        )  # fmt: skip

    def advance(self, images: int) -> None:
        self.step += 1
        self.images += images
        self.bar.update()

    def rate(self) -> float:
        """Images a second since the last call."""
        now = time.perf_counter()
        rate = self.images / max(now - self.since, 1e-9)
        self.images, self.since = 0, now
        return rate

    def show(self, values: dict[str, float]) -> None:
        """Numbers beside the bar."""
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        if self.first and not self.terminal:
            done = max(self.step - self.start, 1)
            left = (time.perf_counter() - self.began) / done * (self.total - self.step)
            numbers = " ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.say(f"{self.name} {self.step}/{self.total} ETA {clock(left)} {numbers}")

    def say(self, line: str) -> None:
        """A line of its own, from the first rank."""
        if self.first:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    """3725 → 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
