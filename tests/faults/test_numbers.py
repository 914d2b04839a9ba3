"""7. Other numbers of ranks; 8. what is not finite."""

import math
import os
import signal
import time

import pytest
import torch

from tests.faults.harness import alive, assert_identical, attempt, each_step, launch, lines_of, log_of
from utils.runtime.checkpoint import MODEL, checkpoints, verify
from utils.runtime.files import read_tensors


def assert_all_finite(directory, at_least=1):
    found = checkpoints(directory)
    assert len(found) >= at_least
    for path in found:
        verify(path)
        assert all(x.isfinite().all() for x in read_tensors(path / MODEL).values())


@pytest.mark.parametrize("where", ["head.weight", "class_emb.weight", "blocks.1.attn.mat_qkv.weight"])
def test_a_weight_that_turns_nan_is_never_saved(where, tiny, undisturbed, tmp_path):
    def before_step(loop):
        if loop.step == 7:
            loop.model.get_parameter(where).data[-1, 0] = torch.nan

    directory = tmp_path / "run"
    flags = [
        *tiny,
        f"--out_dir={directory}",
        "--label_drop=0",
        "--rollout=argmax",
    ]  # class_emb: the null class's row, which nothing reads
    assert attempt(flags, each_step(before_step)) == 1
    said = log_of(directory)
    assert "error: " in said
    assert "not finite at step" in said
    assert "Traceback" not in said
    assert [p.name for p in checkpoints(directory)] == ["step_0000003", "step_0000006"]
    assert_all_finite(directory)
    assert attempt(flags) == 0, log_of(directory)


@pytest.mark.faults
def test_a_nan_in_one_ranks_batch_stops_all_before_the_update(tiny, tmp_path):
    wanted, directory, log = tmp_path / "wanted", tmp_path / "run", tmp_path / "log"
    assert launch(2, [*tiny, f"--out_dir={wanted}"], tmp_path / "wanted.log").wait(120) == 0
    flags = [*tiny, f"--out_dir={directory}"]
    run = launch(2, flags, log, "tests/faults/drive.py", FAULT="nan_batch_of_rank_1")
    assert run.wait(120) == 1
    assert "error: the loss of rank 1 is not finite at step 5, images " in log.read_text()
    assert_all_finite(directory)
    assert launch(2, flags, log).wait(120) == 0, log.read_text()
    assert_identical(directory, wanted)


@pytest.mark.faults
def test_a_dropped_step_is_dropped_on_all_ranks(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log"
    flags = [*tiny, f"--out_dir={directory}", "--on_nonfinite=skip"]
    run = launch(2, flags, log, "tests/faults/drive.py", FAULT="nan_batch_of_rank_1")
    assert run.wait(120) == 0, log.read_text()
    assert "dropped the step, number 1 of at most 10" in log.read_text()
    assert_all_finite(directory)
    assert all(math.isfinite(value) for line in lines_of(directory) for value in line.values())


@pytest.mark.faults
def test_one_two_and_one_ranks_train_alike(tiny, undisturbed, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log"
    flags = [*tiny, f"--out_dir={directory}"]

    def killed_after(step):
        def before_step(loop):
            if loop.step == step:
                loop.checkpoints.finish()
                os.kill(os.getpid(), signal.SIGKILL)

        return each_step(before_step)

    assert attempt(flags, killed_after(4)) == -9
    two = launch(2, flags, log)
    two.wait_for("8/12")
    ranks = two.ranks()
    two.process.kill()
    two.process.wait()
    while alive(ranks):
        time.sleep(0.01)
    time.sleep(1)  # a dead process holds its lock until its last thread is gone
    assert attempt(flags) == 0, log_of(directory)
    assert "steps 3 to 12" in log.read_text()
    worst = 0.0
    for found, wanted in zip(lines_of(directory), lines_of(undisturbed), strict=True):
        assert found.keys() == wanted.keys()
        worst = max(worst, *(abs(found[k] - wanted[k]) / max(abs(wanted[k]), 1e-3) for k in wanted))
    print(f"largest relative difference of a logged number: {worst:.1e}")
    assert worst < 1e-4
