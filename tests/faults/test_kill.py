"""1. kill -9 at random moments and at each point inside a save."""

import os
import random
import signal
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.harness import Points, assert_identical, attempt, each_step, killed, launch, lines_of, log_of


def points_of_a_run(tiny, directory) -> int:
    """How many operations on files the saves of a run make."""

    def fault():
        counter.install()
        inner = os._exit

        def leave(status):
            (directory.parent / "count").write_bytes(str(counter.seen).encode())
            inner(status)

        os._exit = leave

    counter = Points(fatal=0)
    assert attempt([*tiny, f"--out_dir={directory}"], fault) == 0, log_of(directory)
    return int((directory.parent / "count").read_bytes())


def kill_at(points, tiny, undisturbed, tmp_path):
    for point in points:
        directory = tmp_path / f"point_{point}"
        flags = [*tiny, f"--out_dir={directory}"]
        assert attempt(flags, Points(point).install) == -9
        assert attempt(flags) == 0, log_of(directory)
        assert_identical(directory, undisturbed)
        assert "passed over" not in log_of(directory)  # a kill damages nothing
        assert not list((directory / "checkpoints").glob(".*"))


def test_killed_at_points_of_a_save(tiny, undisturbed, tmp_path):
    """The short form: some points of the second save, where there is something to lose."""
    total = points_of_a_run(tiny, tmp_path / "counted")
    kill_at(range(total // 3, total * 2 // 3, 9), tiny, undisturbed, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_point_of_a_save(part, tiny, undisturbed, tmp_path):
    """All of the third save, which is the first that removes an old checkpoint; in four parts."""
    total = points_of_a_run(tiny, tmp_path / "counted")
    points = range(total // 2 + 1, total * 3 // 4 + 1)[part::4]
    assert len(points) > 6
    print(f"{len(points)} points")
    kill_at(points, tiny, undisturbed, tmp_path)


def test_curves_have_each_step_once(tiny, tmp_path):
    """TensorBoard shows what metrics.jsonl holds, although two processes wrote it."""
    directory = tmp_path / "run"
    flags = [*tiny, f"--out_dir={directory}", "--logger_type=tensorboard", "--log_every=1"]

    def before_step(loop):
        if loop.step == 8:
            loop.checkpoints.finish()
            os.kill(os.getpid(), signal.SIGKILL)

    assert attempt(flags, each_step(before_step)) == -9
    time.sleep(1.1)  # a second event file needs another second in its name
    assert attempt(flags) == 0, log_of(directory)
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name in ("train/loss", "val/loss"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(line["step"], line[name]) for line in lines_of(directory) if name in line]
        assert [step for step, _ in found] == [step for step, _ in wanted] == sorted({step for step, _ in wanted})
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    assert [step for step, _ in wanted] == [6, 12]


@pytest.mark.faults
def test_killed_at_20_random_moments(tiny, undisturbed, tmp_path):
    began = time.monotonic()
    assert attempt([*tiny, f"--out_dir={tmp_path / 'timed'}"]) == 0
    seconds = time.monotonic() - began
    rng = random.Random(0)
    for trial in range(20):
        directory = tmp_path / f"trial_{trial}"
        flags = [*tiny, f"--out_dir={directory}"]
        while attempt(flags, kill_after=rng.uniform(0.1, 1) * seconds) == -9:
            pass  # again and again, until one run gets through
        assert_identical(directory, undisturbed)


@pytest.mark.faults
def test_all_ranks_killed(tiny, tmp_path):
    """Two ranks under torchrun, killed with their launcher at three moments."""
    wanted = tmp_path / "wanted"
    assert launch(2, [*tiny, f"--out_dir={wanted}"], tmp_path / "wanted.log").wait(120) == 0
    for moment in ("steps 0 to 12", "4/12", "8/12"):
        directory, log = tmp_path / moment.replace("/", "_"), tmp_path / f"{moment.replace('/', '_')}.log"
        flags = [*tiny, f"--out_dir={directory}"]
        run = launch(2, flags, log)
        run.wait_for(moment)
        ranks = run.ranks()
        assert len(ranks) == 2
        run.process.kill()
        time.sleep(1)
        assert not killed(ranks)
        assert launch(2, flags, log).wait(120) == 0, log.read_text()
        assert_identical(directory, wanted)
