import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ALONE, config_of, run, tool
from train import main
from utils.config.training import TrainConfig
from utils.runtime.distributed import Ranks
from utils.runtime.flags import parse
from utils.training.log import JsonLines, Meter, Progress, Silent, WandB, clock, make_logger, read_metrics


def test_means_over_steps_with_names_that_come_and_go():
    meter = Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    meter.add({"a": torch.tensor(3.0)})
    assert meter.means(ALONE) == {"a": 2.0, "b": 5.0}
    assert meter.means(ALONE) == {}


def test_a_saved_meter_goes_on_and_does_not_change(tmp_path):
    """It is written in the background, while steps are added to the meter."""
    first, second = Meter(), Meter()
    first.add({"a": torch.tensor(1.0), "b": torch.tensor(torch.nan)})
    saved = first.state()
    first.add({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}, weight=3)
    first.settle()
    assert saved == {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    second.restore([saved], ALONE)
    second.add({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}, weight=3)
    assert second.means(ALONE) == first.means(ALONE) == {"a": 2.5, "b": 4.0}


def test_lines_after_a_resume_are_neither_lost_nor_doubled(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in (1, 2, 3):
        first.scalars({"x": step}, step)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 3, "x"')  # killed in the middle of a line
    second = JsonLines(path, 2)  # the checkpoint was of step 2
    second.scalars({"x": 30}, 3)
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["x"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]


def test_only_the_first_rank_writes(tmp_path):
    logger = make_logger(config_of([f"--out_dir={tmp_path}"]), Ranks(1, 2, torch.device("cpu")), 0)
    assert type(logger) is Silent
    logger.scalars({"a": 1.0}, 1)
    logger.image("i", torch.zeros(3, 4, 4), 1)
    logger.close()
    assert not list(tmp_path.iterdir())


def test_wandb_runs_offline_and_stores_no_key(flags, tmp_path):
    more = ["--logger_type=wandb", "--wandb_project=p", "--wandb_run_name=n", "--wandb_tags=a,b", "--wandb_notes=hi"]
    key = "0123456789abcdef0123456789abcdef01234567"
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run(sys.executable, "train.py", *flags, *more, f"--wandb_api_key={key}", **env)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert not any(key.encode() in p.read_bytes() for p in files)
    assert json.loads((tmp_path / "run/config.json").read_text())["log"]["wandb_tags"] == "a,b"


def test_wandb_is_told_that_a_run_failed():
    said, logger = [], WandB.__new__(WandB)
    logger.run = SimpleNamespace(finish=lambda exit_code: said.append(exit_code))
    logger.close()
    with suppress(ValueError):
        try:
            raise ValueError
        finally:
            logger.close()
    assert said == [0, 1]


def test_curves_are_read_of_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
    lines = [
        '{"step": 1, "train/loss": 2.0}',
        '{"step": 2, "val/loss": 1.5}',
        '{"step": 3, "train/loss": 1.0}',
        '{"step": 4, "tra',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path, "train/loss") == ([1, 3], [2.0, 1.0])
    assert read_metrics(tmp_path, "lr") == ([], [])


def test_progress_reports_rate_and_remaining_time(capsys):
    progress = Progress("run", 4, 0, ALONE)
    progress.advance(8)
    assert "run 1/4, the first step took 0.0 s" in capsys.readouterr().err
    assert progress.rate() > 0
    progress.show({"loss": 1.5})
    assert "run 1/4 ETA" in (err := capsys.readouterr().err)
    assert "loss 1.5" in err
    progress.close()


def test_a_run_is_called_as_it_was_named_or_as_its_directory():
    for flags, name in [
        (["--out_dir=out/my/flexvar"], "flexvar"),
        (["--out_dir=out/my/flexvar", "--exp_name=first"], "first"),
        (["--exp_name=first"], "first"),
        ([], "SAR"),
    ]:
        run = parse(TrainConfig, flags).run
        assert run.name == name
        assert str(run.directory) == (flags[0].partition("=")[2] if "out_dir" in str(flags) else f"out/{name}")


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("environment", "netrc", "allowed"),
    [
        ({}, "", False),
        ({}, "machine other.site login user password x", False),
        ({}, "machine api.wandb.ai login user password x", True),
        ({}, "no netrc at all", False),
        ({"WANDB_BASE_URL": "https://own.site"}, "machine own.site login user password x", True),
        ({"WANDB_BASE_URL": "https://own.site"}, "machine api.wandb.ai login user password x", False),
        ({"WANDB_API_KEY": "x" * 40}, "", True),
        ({"WANDB_MODE": "offline"}, "", True),
        ({"WANDB_MODE": "disabled"}, "", True),
        ({"WANDB_MODE": "online"}, "", False),
    ],
)
def test_wandb_without_a_key_is_refused_before_any_work(environment, netrc, allowed, flags, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc + "\n")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for more in ([], ["--check"]) if not allowed else (["--check"],):
        status, _, err = tool(main, *flags, "--logger_type=wandb", *more)
        assert status == (0 if allowed else 1), err
        assert allowed or "WANDB_API_KEY" in err
    assert not (tmp_path / "run").exists()
