"""2. The newest checkpoint damaged in every way; 6. a full disk."""

import os
import shutil
import signal

import pytest

from tests.faults.harness import assert_identical, attempt, each_step, log_of, small_disk
from tests.test_checkpoint import damage
from utils.runtime.checkpoint import EMA, MANIFEST, MODEL, STATE

HOW = ("missing", "empty", "half", "short", "flipped")
ALL = [(name, how) for name in (MODEL, EMA, STATE, MANIFEST) for how in HOW]


@pytest.fixture(scope="module")
def half_way(tiny, tmp_path_factory):
    """Killed in step 10, with checkpoints of steps 6 and 9."""
    directory = tmp_path_factory.mktemp("half") / "run"

    def before_step(loop):
        if loop.step == 10:
            loop.checkpoints.finish()
            os.kill(os.getpid(), signal.SIGKILL)

    assert attempt([*tiny, f"--out_dir={directory}"], each_step(before_step)) == -9, log_of(directory)
    return directory


def check(cases, half_way, tiny, undisturbed, tmp_path):
    for name, how in cases:
        directory = tmp_path / f"{name}_{how}"
        shutil.copytree(half_way, directory)
        newest = sorted((directory / "checkpoints").glob("step_*"))[-1]
        damage(newest / name, how)
        assert attempt([*tiny, f"--out_dir={directory}"]) == 0, log_of(directory)
        said = log_of(directory)
        assert f"passed over a damaged checkpoint: {newest / name}" in said
        assert "steps 6 to 12" in said
        assert_identical(directory, undisturbed)


def test_some_damage(half_way, tiny, undisturbed, tmp_path):
    check([(MODEL, "short"), (STATE, "flipped"), (MANIFEST, "missing")], half_way, tiny, undisturbed, tmp_path)


@pytest.mark.faults
def test_all_damage(half_way, tiny, undisturbed, tmp_path):
    check(ALL, half_way, tiny, undisturbed, tmp_path)


def full_disk(limits, half_way, tiny, undisturbed, tmp_path):
    for limit in limits:
        directory = tmp_path / f"limit_{limit}"
        shutil.copytree(half_way, directory)
        before = sorted(p.name for p in (directory / "checkpoints").iterdir())
        flags = [*tiny, f"--out_dir={directory}"]
        assert attempt(flags, small_disk(limit)) == 1
        said = log_of(directory)
        assert "error: cannot save step 12" in said
        assert "MiB are free there; earlier ones are whole" in said
        assert "Traceback" not in said
        assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == before
        assert attempt(flags) == 0, log_of(directory)
        assert_identical(directory, undisturbed)


def test_a_full_disk(half_way, tiny, undisturbed, tmp_path):
    full_disk([100_000], half_way, tiny, undisturbed, tmp_path)


@pytest.mark.faults
def test_a_disk_that_fills_at_each_file(half_way, tiny, undisturbed, tmp_path):
    """Limits between the sizes of the files: the first, a middle and the last of a save fail."""
    newest = sorted((half_way / "checkpoints").glob("step_*"))[-1]
    sizes = sorted({p.stat().st_size for p in newest.iterdir() if p.stat().st_size > 20_000})
    full_disk([int(share * size) for size in sizes for share in (0.5, 0.9)], half_way, tiny, undisturbed, tmp_path)
