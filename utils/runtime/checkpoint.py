"""The checkpoints of a run: DIRECTORY/checkpoints/step_N, each complete or not there, each with its own digests.

python -m utils.runtime.checkpoint list out/SAR-d16               # what there is, and whether it is as it was written
python -m utils.runtime.checkpoint verify out/SAR-d16
python -m utils.runtime.checkpoint export out/SAR-d16 SARd16.pth  # one file, in the released layout; or .safetensors
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from utils.runtime.entry import check_output_file, entry, notice
from utils.runtime.files import (
    digest,
    flush,
    read_sealed,
    read_tensors,
    remove_tree,
    replacing,
    save_tensors,
    write_sealed,
)
from utils.runtime.flags import Parser
from utils.runtime.process import release_freed_memory

StateDict = dict[str, Tensor]

MODEL, EMA, STATE, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
VERSION = 1


def average_names(decays: Sequence[float]) -> dict[str, float]:
    """File → decay of a run's moving averages. The first is ema.safetensors, the others bear their decay."""
    return {(f"ema_{decay:g}.safetensors" if i else EMA): decay for i, decay in enumerate(decays)}


def averages_of(config: Mapping[str, Any]) -> dict[str, float]:
    """File → decay of the moving averages that a recorded config keeps; runs of old have one, or 0 for none."""
    kept = config.get("optim", {}).get("ema", [])
    return average_names([decay for decay in (kept if isinstance(kept, list) else [kept]) if decay])


@dataclass(frozen=True)
class RunState:
    """State that a run needs to go on, beside its weights."""

    step: int
    optimizer: dict
    scaler: dict
    meter: list[dict] = field(default_factory=list)  # of each rank: what it has added up since the last log line
    skipped: int = 0  # steps dropped since the start, see --on_nonfinite


# ------------------------------------------------------------------------------------------------- reading


def checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints of a run, from the oldest to the newest."""
    found = [p for p in (Path(directory) / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def read_manifest(path: Path) -> dict:
    """A checkpoint's manifest: files, step, and the settings it was trained with. Raises ValueError if damaged."""
    manifest = read_sealed(path / MANIFEST)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path / MANIFEST} is of version {manifest.get('version')}, not {VERSION}")
    return manifest


def verify(path: Path, *names: str) -> None:
    """Raises ValueError unless the files of a checkpoint, or those named, are as they were written."""
    files = read_manifest(path)["files"]
    for name, described in files.items():
        if names and name not in names:
            continue
        file = path / name
        try:
            size = file.stat().st_size
            if size != described["bytes"]:
                raise ValueError(f"{file} has {size} bytes, not {described['bytes']}")
            if digest(file) != described["sha256"]:
                raise ValueError(f"{file} is damaged: its SHA-256 is another")
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def newest_checkpoint(directory: str | Path, *names: str) -> Path | None:
    """The newest one whose files (or those named) are as they were written; None when there is none at all.

    Damaged ones are reported and passed over. Raises ValueError when all are damaged.
    """
    found = checkpoints(directory)
    for path in reversed(found):
        try:
            verify(path, *names)
            return path
        except ValueError as error:
            print(f"passed over a damaged checkpoint: {error}", file=sys.stderr)
    if found:
        raise ValueError(f"every checkpoint in {directory} is damaged: move it away to start anew")
    return None


def reached(run: str | Path) -> int:
    """The step of a run's newest checkpoint; 0 when it has none."""
    found = checkpoints(run)
    return step_of(found[-1]) if found else 0


def runs_below(directory: str | Path) -> str:
    """Hint for a directory that is no run: the runs in its folders, if there are any."""
    found = {p.parent.parent for depth in ("*", "*/*") for p in Path(directory).glob(f"{depth}/checkpoints/step_*")}
    return f"; the runs below it are {', '.join(sorted(map(str, found)))}" if found else ""


def invariants_of(manifest: dict) -> dict:
    """Facts that a checkpoint's run cannot change, beside its flags. Older manifests call it "facts"."""
    return manifest.get("invariants") or manifest.get("facts", {})


def last_invariants(directory: str | Path) -> dict:
    """Invariants in the newest readable manifest of a run: of its data and model; empty when it has no checkpoint."""
    for path in reversed(checkpoints(directory)):
        try:
            return invariants_of(read_manifest(path))
        except ValueError:
            continue
    return {}


def read_checkpoint(path: Path) -> tuple[RunState, dict[str, StateDict]]:
    """State, and the weights of each file, of a checkpoint that has been verified."""
    state = read_tensors(path / STATE, mmap=True)  # mapped: every rank reads it
    return RunState(**state), {file.name: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}


# ------------------------------------------------------------------------------------------------- writing


class SaveError(OSError):
    """A checkpoint that could not be written."""


class Checkpoints:
    """Checkpoints of a run, written in the background, one at a time; `finish` waits for the one under way.

    After each, only the newest `keep` stay, and those marked to be kept.
    """

    def __init__(self, directory: Path, keep: int):
        self.root, self.keep = directory / "checkpoints", keep
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.job: Future | None = None

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:07d}"

    def newest(self) -> int:
        """The step of the newest one that is as it was written; 0 when there is none."""
        newest = newest_checkpoint(self.root.parent)
        return step_of(newest) if newest else 0

    def submit(self, state: RunState, models: dict[str, StateDict], about: dict, kept: bool) -> None:
        """Begin to write a checkpoint of tensors that nothing else will change."""
        self.finish()
        self.job = self.pool.submit(self.write, vars(state), models, about, kept)

    def check(self) -> None:
        """Raise what went wrong with a write that has ended."""
        if self.job is not None and self.job.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the write under way. Raises SaveError if it failed, FloatingPointError at what is not finite."""
        job, self.job = self.job, None
        if job is not None:
            job.result()
            release_freed_memory()  # of the copies: more than three times the weights

    def close(self) -> None:
        """Wait for the write under way, after an error too."""
        self.pool.shutdown()

    def write(self, state: dict, models: dict[str, StateDict], about: dict, kept: bool) -> None:
        """Files, then their manifest, flushed to disk under a temporary name; then renamed; then old ones removed."""
        step = state["step"]
        check_finite({**models, STATE: state["optimizer"]}, step)
        target, partial = self.path(step), self.root / f".partial_{step:07d}"
        try:
            self.clean()
            partial.mkdir(parents=True)
            for name, tensors in models.items():
                save_tensors(partial / name, tensors)
            with replacing(partial / STATE) as path:
                torch.save(state, path)
            files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(partial.iterdir())}
            content = {"version": VERSION, "step": step, "kept": kept, "files": files, **about}
            write_sealed(partial / MANIFEST, content)
            flush(partial)
            self.discard(target)
            os.replace(partial, target)
            flush(self.root)
        except Exception as error:  # a full disk has another name in each library
            shutil.rmtree(partial, ignore_errors=True)
            said = f"{error}; {shutil.disk_usage(self.root.parent).free / 2**20:.0f} MiB are free there"
            raise SaveError(f"cannot save step {step} in {self.root}: {said}; earlier ones are whole") from error
        self.prune()

    def prune(self) -> None:
        """Remove all but the newest `keep` and those marked to be kept."""
        for old in checkpoints(self.root.parent)[: -self.keep]:
            try:
                spared = read_manifest(old)["kept"]
            except ValueError:
                spared = True  # nobody can say whether it was to be kept
            if not spared:
                try:
                    self.discard(old)
                except OSError as error:  # the new one is safe: no reason to stop training
                    notice(f"cannot remove {old}: {error}")

    def discard(self, path: Path) -> None:
        """Remove a checkpoint; its name goes first, so that half of one never bears it."""
        if path.exists():
            doomed = path.with_name(f".discarded_{path.name}")
            remove_tree(doomed)
            os.replace(path, doomed)
            remove_tree(doomed)

    def clean(self) -> None:
        """Remove what a killed run left half written or half removed."""
        for left in (*self.root.glob(".partial_*"), *self.root.glob(".discarded_*")):
            remove_tree(left)

    def set_aside(self, after: int) -> None:
        """Rename the damaged checkpoints later than a step, so that nothing takes them for the newest."""
        for path in checkpoints(self.root.parent):
            if step_of(path) > after:
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)


def check_finite(tree: Any, step: int) -> None:
    """Raises FloatingPointError naming a tensor that holds something not finite."""
    for path, x in tree_flatten_with_path(tree)[0]:
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            raise FloatingPointError(f"{name} is not finite at step {step}: not saved")


# -------------------------------------------------------------------------------------------- command line


def describe(path: Path) -> tuple[str, bool]:
    """A line on a checkpoint, and whether it is as it was written."""
    size = sum(p.stat().st_size for p in path.iterdir()) / 2**20
    try:
        verify(path)
        kept = ", kept" if read_manifest(path)["kept"] else ""
        return f"{path}  {size:.1f} MiB  whole{kept}", True
    except ValueError as error:
        return f"{path}  {size:.1f} MiB  DAMAGED: {error}", False


def export(weights: StateDict, out: Path) -> None:
    """One weight file: `.safetensors`, or `.pth` as released ones are, {"model": state dict}."""
    if out.suffix == ".safetensors":
        return save_tensors(out, weights)
    if out.suffix != ".pth":
        raise ValueError(f"export writes .pth or .safetensors, not {out.name}")
    with replacing(out) as partial:
        torch.save({"model": weights}, partial)
    return None


def named_average(manifest: Mapping[str, Any], named: str) -> str:
    """The file of the moving average of this decay, or of the first. Raises ValueError when there is none."""
    if named == EMA:
        return EMA
    kept = {f"{decay:g}": name for name, decay in averages_of(manifest["config"]).items()}
    try:
        wanted = f"{float(named):g}"
    except ValueError:
        raise ValueError(f"--ema takes the decay of a moving average, not {named!r}") from None
    if wanted not in kept:
        raise ValueError(f"no moving average of {named} is kept, but of: {', '.join(kept) or 'none'}")
    return kept[wanted]


def check_export(manifest: Mapping[str, Any], directory: Path) -> None:
    """Raises ValueError when weights alone would not draw what the run does."""
    lost = manifest.get("beside_weights", {})
    if lost:
        named = ", ".join(f"{name} {value}" for name, value in lost.items())
        raise ValueError(
            f"a weight file does not hold {named}, which sampling needs: "
            f"python -m models.pipeline --ckpt {directory} --out DIR writes all of it"
        )


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m utils.runtime.checkpoint")
    parser.add_argument("command", choices=["list", "verify", "export"])
    parser.add_argument("directory", type=Path, help="a run's directory")
    parser.add_argument("out", type=Path, nargs="?", help="export: the file to write, .pth or .safetensors")
    parser.add_argument(
        "--ema", nargs="?", const=EMA, default="", help="export: the moving average of the weights, or the one of DECAY"
    )
    args = parser.parse_args()
    if (args.command == "export") != (args.out is not None):
        parser.error("export, and nothing else, takes the file to write as well")
    if args.ema and args.command != "export":
        parser.error("--ema has no effect without export")
    if args.command == "export":
        newest = newest_checkpoint(args.directory, MODEL)
        if newest is None:
            raise ValueError(f"{args.directory} holds no checkpoint{runs_below(args.directory)}")
        manifest = read_manifest(newest)
        check_export(manifest, args.directory)
        name = MODEL if not args.ema else named_average(manifest, args.ema)
        if not (newest / name).is_file():
            raise ValueError(f"{newest} keeps no moving average")
        export(read_tensors(newest / name), check_output_file(args.out))
        return print(f"wrote {args.out} from {newest}")
    found = [describe(path) for path in checkpoints(args.directory)]
    if not found:
        raise ValueError(f"{args.directory} holds no checkpoint{runs_below(args.directory)}")
    print("\n".join(line for line, _ in found))
    if args.command == "verify" and not all(whole for _, whole in found):
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
