"""1. kill -9 at random moments and at each point inside a save."""

import random
import time

import pytest

from tests.faults.harness import Points, alive, assert_identical, attempt, launch, log_of


def points_of_a_run(tiny, directory) -> int:
    """How many operations on files the saves of a run make."""

    def fault():
        import atexit  # noqa: F401
        import os

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
def test_killed_at_every_point_of_every_save(tiny, undisturbed, tmp_path):
    total = points_of_a_run(tiny, tmp_path / "counted")
    assert total > 60
    print(f"points: {total}")
    kill_at(range(1, total + 1), tiny, undisturbed, tmp_path)


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
        assert not alive(ranks)
        assert launch(2, flags, log).wait(120) == 0, log.read_text()
        assert_identical(directory, wanted)
