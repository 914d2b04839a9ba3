"""3. A rank killed or stopped; 4. the launcher killed, a second start; 5. SIGTERM and SIGUSR1."""

import os
import re
import signal
import time

import pytest

from tests.faults.harness import assert_identical, attempt, children, each_step, killed, launch, log_of
from utils.runtime.checkpoint import newest_checkpoint

LONG = ["--max_steps=100000", "--ep=100000", "--save_every_steps=1000000", "--eval_images=0", "--log_every=5"]
LONG += ["--eval_every=0"]  # over the fixture's


def ask(number, tiny, undisturbed, tmp_path):
    """Send a signal to a run of one process in the middle of a step."""

    def before_step(loop):
        if loop.step == 7:
            os.kill(os.getpid(), number)

    directory = tmp_path / f"signal_{number}"
    flags = [*tiny, f"--out_dir={directory}"]
    assert attempt(flags, each_step(before_step)) == 128 + number, log_of(directory)
    assert f"stopped by signal {number}, saved step 8: the same command goes on" in log_of(directory)
    assert attempt(flags) == 0, log_of(directory)
    assert "steps 8 to 12" in log_of(directory)
    assert_identical(directory, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_within_the_step(number, tiny, undisturbed, tmp_path):
    ask(int(number), tiny, undisturbed, tmp_path)


def test_a_second_start_is_refused(tiny, tmp_path):
    directory = tmp_path / "run"
    flags = [*tiny, f"--out_dir={directory}"]

    def before_step(loop):
        if loop.step == 2 and not (tmp_path / "asked").exists():  # once, whoever gets here
            (tmp_path / "asked").touch()
            (tmp_path / "status").write_text(str(attempt([*flags, "--exp_name=second"])))

    assert attempt(flags, each_step(before_step)) == 0, log_of(directory)
    assert (tmp_path / "status").read_text() == "1"
    assert re.search(r"error: process \d+ on \S+ is training in .*: stop it, or use another", log_of(directory))


def test_a_finished_run_started_again_ends_with_0(tiny, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert attempt([*tiny, f"--out_dir={undisturbed}"]) == 0
    assert "finished at step 12: nothing to do" in log_of(undisturbed)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves_and_resumes(number, tiny, tmp_path):
    """Of SIGUSR1 torchrun knows by what the scripts set."""
    wanted = tmp_path / "wanted"
    assert launch(2, [*tiny, f"--out_dir={wanted}", "--max_steps=400"], tmp_path / "w.log").wait(200) == 0
    directory, log = tmp_path / "run", tmp_path / "run.log"
    flags = [*tiny, f"--out_dir={directory}", "--max_steps=400", "--save_every_steps=1000"]
    run = launch(
        2, flags, log, PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    )  # as scripts/lib.sh has it
    run.wait_for("40/400")
    ranks = run.ranks()
    os.kill(run.process.pid, number)
    assert run.wait(60) != 0
    assert not killed(ranks)
    saved = int(re.search(rf"stopped by signal {number:d}, saved step (\d+)", log.read_text())[1])
    logged = max(int(step) for step in re.findall(r"run (\d+)/400", log.read_text()))
    assert logged <= saved <= logged + 60  # log lines are 4 steps apart; the signal travels
    assert launch(2, flags, log).wait(200) == 0, log.read_text()
    assert f"steps {saved} to 400" in log.read_text()
    assert_identical(directory, wanted)


@pytest.mark.faults
def test_a_signal_to_one_rank_stops_all(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log"
    run = launch(2, [*tiny, *LONG, f"--out_dir={directory}", "--timeout_minutes=0.25"], log)
    run.wait_for("10/100000")
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGUSR1)
    assert run.wait(90) != 0
    saved = re.search(r"stopped by signal 10, saved step (\d+)", log.read_text())[1]
    assert newest_checkpoint(directory).name == f"step_{int(saved):07d}"


@pytest.mark.faults
@pytest.mark.parametrize(("fault", "limit"), [("killed", 30), ("stopped", 15 + 30 + 15)])
def test_one_rank_is_lost(fault, limit, tiny, tmp_path):
    """Killed: torchrun sees it. Stopped: the others give up after --timeout_minutes; torchrun waits 30 s more."""
    flags = [*tiny, *LONG, f"--out_dir={tmp_path / 'run'}", "--timeout_minutes=0.25"]
    run = launch(2, flags, tmp_path / "log", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    run.wait_for("10/100000")
    ranks = run.ranks()
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    assert run.wait(limit) != 0
    print(f"{fault}: {time.monotonic() - began:.1f} s")
    assert not killed(ranks)


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_the_launcher_is_killed(workers, tiny, tmp_path):
    flags = [*tiny, *LONG, f"--out_dir={tmp_path / 'run'}", f"--workers={workers}"]
    run = launch(2, flags, tmp_path / "log")
    run.wait_for("10/100000")
    ranks = run.ranks()
    everything = ranks + [pid for rank in ranks for pid in children(rank)]
    assert len(everything) >= 2 + 2 * workers
    second = launch(2, flags, tmp_path / "second.log")
    assert second.wait(60) == 1
    assert "is training in" in (tmp_path / "second.log").read_text()
    run.process.kill()
    time.sleep(5)
    assert not killed(everything)
    last = launch(2, [*flags, "--max_steps=3"], tmp_path / "log")  # the lock went with its holder
    assert last.wait(60) == 0, (tmp_path / "log").read_text()
