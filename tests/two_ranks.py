"""Runs of train.py, one after the other in one process group: the names and flags of DIR/runs.json, into DIR/NAME."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train import build
from utils.config.training import TrainConfig
from utils.runtime.distributed import ranks
from utils.runtime.flags import parse

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    with ranks() as me:
        for name, flags in json.loads((directory / "runs.json").read_text()).items():
            build(parse(TrainConfig, [*flags, f"--out_dir={directory / name}"]), me).fit()
