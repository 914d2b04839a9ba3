"""TensorBoard, W&B, metrics.jsonl and the console. A logger that should be silent is `Silent`, not an `if`."""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor
from tqdm import tqdm

from utils.config.tokenizer import TokenizerTrainConfig
from utils.config.training import LogConfig, TrainConfig
from utils.runtime.distributed import Ranks
from utils.runtime.files import replacing

METRICS = "metrics.jsonl"


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
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        with replacing(path) as partial:
            partial.write_text("".join(line for line in lines if step_of(line) <= start), encoding="utf-8")
        self.path, self.file = path, path.open("a", buffering=1, encoding="utf-8")

    def scalars(self, values: dict[str, float], step: int) -> None:
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}") from error

    def close(self) -> None:
        self.file.close()


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite when a killed run left only a part of it."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def read_metrics(directory: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run, from its metrics.jsonl."""
    lines = (directory / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if step_of(line) < math.inf]  # a killed run may leave half a line
    points = [(line["step"], line[name]) for line in found if name in line]
    return [step for step, _ in points], [value for _, value in points]


class TensorBoard(Silent):
    def __init__(self, directory: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        # Purged even at the start: a run may have died before it first saved.
        self.writer = SummaryWriter(str(directory), purge_step=start + 1)

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
        record = directory / "wandb_run_id"
        if not record.is_file():
            with replacing(record) as partial:
                partial.write_text(uuid.uuid4().hex)
        self.run = wandb.init(
            id=record.read_text(),
            resume="allow",  # a step that is there already is not written again
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
        self.run.finish(exit_code=int(sys.exc_info()[0] is not None))  # else a run that failed is shown as finished


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


def check_tracking(config: LogConfig) -> None:
    """Raises ValueError when W&B would ask for a key: there is nobody to answer on a cluster."""
    if config.logger_type != "wandb":
        return
    online = os.environ.get("WANDB_MODE", "online") in ("online", "run")
    if online and not has_wandb_key():
        raise ValueError(
            "--logger_type wandb has no key: set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"
        )


def has_wandb_key() -> bool:
    """True where W&B will find credentials: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_logger(config: TrainConfig | TokenizerTrainConfig, ranks: Ranks, start: int) -> Silent:
    """The loggers of a run that goes on after step `start`; silent but on the first rank."""
    if not ranks.first:
        return Silent()
    directory, kind = config.run.directory, config.log.logger_type
    loggers: list[Silent] = [JsonLines(directory / METRICS, start)]
    if kind == "tensorboard":
        loggers.append(TensorBoard(directory / "tensorboard", start))
    elif kind == "wandb":
        loggers.append(WandB(config.log, config.run.name, directory, asdict(config)))
    return Several(loggers)


class Meter:
    """Means of named tensors over steps, those left out that are not finite. Nothing leaves the device until `means` or
    `state` is called."""

    def __init__(self):
        self.waiting: list[tuple[tuple[str, ...], Tensor, int]] = []
        self.sums: dict[str, list[float]] = {}  # name → [sum, count]

    def add(self, values: dict[str, Tensor], weight: int = 1) -> None:
        """Numbers that count as often as they stand for micro-batches: so a mean is the same on any number of ranks."""
        numbers = torch.stack([value.detach().float() for value in values.values()])
        self.waiting.append((tuple(values), numbers, weight))

    def settle(self) -> None:
        """Fetch what is on the device, and add it up."""
        if not self.waiting:
            return
        names = [(name, weight) for some, _, weight in self.waiting for name in some]
        numbers = torch.cat([numbers for _, numbers, _ in self.waiting]).tolist()
        self.waiting.clear()
        for (name, weight), number in zip(names, numbers, strict=True):
            total = self.sums.setdefault(name, [0.0, 0.0])
            if math.isfinite(number):
                total[0] += weight * number
                total[1] += weight

    def state(self) -> dict[str, list[float]]:
        """A copy of what has been added up on this rank since `means` was called."""
        self.settle()
        return {name: list(total) for name, total in self.sums.items()}

    def restore(self, states: list[dict[str, list[float]]], ranks: Ranks) -> None:
        """Go on from the states of all ranks; of another number of ranks, from their share."""
        if len(states) == ranks.world:
            self.sums = states[ranks.rank]
        elif states:
            shares = {name: [[s[name][k] / ranks.world for s in states] for k in (0, 1)] for name in states[0]}
            self.sums = {name: [sum(totals), sum(counts)] for name, (totals, counts) in shares.items()}

    def means(self, ranks: Ranks) -> dict[str, float]:
        """The means over steps and ranks, and start anew. All ranks must have added the same names."""
        self.settle()
        names = sorted(self.sums)
        if not names:
            return {}
        table = torch.tensor([self.sums[name] for name in names], dtype=torch.float64)  # (names, 2)
        total, count = ranks.sum(table).unbind(1)
        self.sums = {}
        return dict(zip(names, (total / count).tolist(), strict=True))


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
        if not self.terminal and self.step == self.start + 1:  # long before there are means to show
            seconds = time.perf_counter() - self.began
            self.say(f"{self.name} {self.step}/{self.total}, the first step took {seconds:.1f} s")

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
            with suppress(OSError):  # nobody reads it any more: no reason to end a run
                tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    """3725 → 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
