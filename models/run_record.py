"""The record of a training run: the scales, class names and tokenizer that its weights belong to."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from models.scales import DEFAULT_SCHEDULE, ScaleSchedule
from utils.runtime.checkpoint import EMA, averages_of, last_invariants
from utils.runtime.files import read_json

CONFIG = "config.json"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RunRecord:
    """DIRECTORY/config.json of a run of train.py or train_tokenizer.py."""

    directory: Path
    content: dict

    @property
    def schedule(self) -> ScaleSchedule | None:
        pn = self.content["model"].get("pn")
        return ScaleSchedule.parse(pn) if pn else None

    @property
    def flags(self) -> SimpleNamespace:
        """Its flags of the model."""
        return SimpleNamespace(**self.content["model"])

    @property
    def supervision(self) -> str:
        """The way its training made codes of images: see `Tokenizer.tokenize`."""
        return self.content["model"].get("supervision", "latent")

    @property
    def class_names(self) -> list[str] | None:
        return self.content.get("class_names")

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer whose codes the run was trained on; empty when nothing tells it."""
        described = self.content.get("tokenizer", {}).get("sha256")
        return described or last_invariants(self.directory).get("tokenizer_sha256", "")

    @property
    def tokenizer(self) -> str:
        """Path of its tokenizer: beside the run as it did, where it was, or as it was typed; whichever is there."""
        described = self.content.get("tokenizer", {})
        typed = self.content["model"].get("vae_ckpt", "")
        places = [
            self.directory / described["from_run"] if described.get("from_run") else None,
            described.get("path"),
            typed,
            ROOT / typed if typed else None,
        ]
        return next((os.path.normpath(place) for place in places if place and Path(place).exists()), typed)

    def check_tokenizer(self, sha256: str, path: str, named: bool) -> None:
        """Compares the tokenizer of a digest, read from `path`, with the one that the run was trained on.

        Raises ValueError when it is another one; where `path` was named on purpose, that is a warning.
        """
        if self.tokenizer_sha256 in ("", sha256):
            return
        other = f"{path} is not the tokenizer that {self.directory} was trained on"
        if not named:
            raise ValueError(f"{other} (its SHA-256 is another): name that one by --vae_ckpt (it was {self.tokenizer})")
        warnings.warn(f"{other}: its codes mean something else", stacklevel=3)


def describe_tokenizer(path: str, sha256: str, directory: Path) -> dict[str, str]:
    """The entry "tokenizer" of a run's config.json: its path, also from the run's directory, and its digest."""
    whole = Path(path).resolve()
    return {"path": str(whole), "from_run": os.path.relpath(whole, directory.resolve()), "sha256": sha256}


def find_run(path: str | Path) -> RunRecord | None:
    """The run that a directory, one of its checkpoints or a weight file in them belongs to; None when there is none.

    Its config.json lies at most three folders above. One of another program there is passed over.
    """
    path = Path(path)
    for place in [path, *list(path.absolute().parents)[:3]]:
        if not (place / CONFIG).is_file():
            continue
        try:
            content = read_json(place / CONFIG)
        except ValueError:
            continue
        if isinstance(content.get("model"), dict) and isinstance(content["model"].get("pn"), str):
            return RunRecord(place, content)
    return None


def average_of(path: str | Path, decay: float = 0.0) -> str:
    """The file of a run's moving average of this decay; 0: the first. Raises ValueError when there is none."""
    run, files = find_run(path), {EMA: 0.0}
    if run is not None:
        files = averages_of(run.content) or files
    found = next((name for name, own in files.items() if own == decay), EMA if not decay else "")
    if not found:
        raise ValueError(f"{path} keeps no moving average of {decay:g}, but of {', '.join(map(str, files.values()))}")
    return found


def schedule_of(pn: str, vae_ckpt: str | Path) -> ScaleSchedule:
    """The scales that a text names; an empty one: those of the tokenizer's run, or the default ones."""
    run = None if pn else find_run(vae_ckpt)
    return ScaleSchedule.parse(pn) if pn else (run and run.schedule) or DEFAULT_SCHEDULE
