"""Runs that are disturbed, and what must be equal afterwards.

One process is a fork of the test: real kills without seconds of imports. Several are torchrun's.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from tests.conftest import ROOT, config_of
from train import build, check
from utils.runtime.checkpoint import newest_checkpoint, read_checkpoint
from utils.runtime.entry import entry
from utils.training.loop import Loop, start

Fault = Callable[[], None]  # prepares a process that will go wrong


# ------------------------------------------------------------------------------------------- one process


def attempt(flags: list[str], fault: Fault = lambda: None, kill_after: float | None = None) -> int:
    """A training run in a process of its own. Returns its status; -9 when it was killed. Its output goes to flags'
    --out_dir + ".log"."""
    out = Path(next(f for f in flags if f.startswith("--out_dir=")).partition("=")[2])
    out.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
            fault()
            entry(lambda: start(config_of(flags), build, check))()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def log_of(directory: Path) -> str:
    return Path(f"{directory}.log").read_text()


class Points:
    """Counts the operations on files that matter to a save, and dies before number `fatal`."""

    def __init__(self, fatal: int):
        self.fatal, self.seen = fatal, 0

    def install(self) -> None:
        from utils.runtime import checkpoint, files

        for module, name in [
            (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (torch, "save"), (files, "save_file"),
            (checkpoint, "digest"), (Path, "mkdir"), (Path, "write_text"),
        ]:  # fmt: skip
            setattr(module, name, self.around(getattr(module, name)))

    def around(self, function: Callable) -> Callable:
        def counted(*args, **kwargs):
            if "checkpoints" in " ".join(map(str, args)) or function.__name__ in ("fsync", "save"):
                self.seen += 1
                if self.seen == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted


def each_step(do: Callable[[Loop], None]) -> Fault:
    """Do something before each step of a run."""

    def fault() -> None:
        inner = Loop.train_step

        def train_step(self, batches):
            do(self)
            inner(self, batches)

        Loop.train_step = train_step

    return fault


def small_disk(limit: int) -> Fault:
    """No file may grow beyond `limit` bytes: what a full disk looks like from inside."""

    def fault() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return fault


# --------------------------------------------------------------------------------------------- torchrun


@dataclass
class Launched:
    """torchrun and its ranks."""

    process: subprocess.Popen
    log: Path
    began: float = field(default_factory=time.monotonic)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        return [pid for _, pid in sorted((rank_of(pid), pid) for pid in children(self.process.pid))]

    def wait_for(self, text: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, f"no {text!r} in\n{self.log.read_text()}"
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def wait(self, seconds: float) -> int:
        return self.process.wait(timeout=seconds)


def launch(processes: int, flags: list[str], log: Path, entry: str = "train.py", **env: str) -> Launched:
    """torchrun in a session of its own, as a scheduler would start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", entry]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )  # fmt: skip
    return Launched(process, log)


def children(parent: int) -> list[int]:
    """Its direct children that are still alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next((e[5:] for e in environment if e.startswith(b"RANK=")), b"-1"))


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
        except OSError:
            continue
    return found


def killed(pids: list[int]) -> list[int]:
    """Those that were still alive. They are not any more: a test that fails leaves nothing running."""
    found = alive(pids)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


# --------------------------------------------------------------------------------------------- comparing

TIMES = {"train/images_per_second"}


def lines_of(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_identical(found: Path, wanted: Path) -> None:
    """The same logged numbers, weights, average, moments and state, to the last bit."""
    assert lines_of(found) == lines_of(wanted)
    paths = [newest_checkpoint(d) for d in (found, wanted)]
    assert paths[0].name == paths[1].name
    parts = [read_checkpoint(p) for p in paths]
    for a, b in zip(*parts, strict=True):
        a, b = (vars(x) if hasattr(x, "step") else x for x in (a, b))
        leaves = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in leaves)
