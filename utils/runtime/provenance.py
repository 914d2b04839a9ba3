"""Provenance of a run or an evaluation: versions, device, commit, command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from utils.runtime.distributed import Ranks


def versions(me: Ranks) -> dict[str, str]:
    """Versions and device of a run or an evaluation."""
    device = torch.cuda.get_device_name(me.device) if me.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "device": f"{me.world} × {device}",
    }


def git_state() -> str:
    """The commit of this code, "+" when files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def record_start(directory: Path, me: Ranks, step: int) -> None:
    """A line in DIRECTORY/starts.jsonl: when, from which step, by which command, with which code and libraries."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,  # holds no key: see utils/runtime/flags.py
        "git": git_state(),
        **versions(me),
    }
    with (directory / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
