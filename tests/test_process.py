import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, on_ranks
from tests.faults.harness import alive
from utils.runtime.process import STOP_SIGNALS, StopRequest, allow_open_files, locked

CODE = (
    "import sys, time; sys.path.insert(0, {root!r}); from pathlib import Path\n"
    "from utils.runtime.process import *; {rest}"
)


def process(rest, **options):
    command = [sys.executable, "-c", CODE.format(root=str(ROOT), rest=rest)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_a_signal_is_remembered_once_and_handlers_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's repeat does no harm
        assert stop.signal in STOP_SIGNALS
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_one_holder_of_a_directory(tmp_path):
    holder = process(f"l = locked(Path({str(tmp_path)!r})); l.__enter__(); print('held', flush=True); time.sleep(60)")
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"process {holder.pid} on \S+ is training in"), locked(tmp_path):
        pass
    with locked(tmp_path, wanted=False):  # the other ranks of a run
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):  # the system let go
        pass


def test_a_child_dies_with_its_parent():
    child = "die_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    parent = process(f"os.fork() or [{child.replace('; ', ', ')}]; time.sleep(60)")
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while alive([pid]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive([pid])


def test_a_loaders_worker_does_not_get_its_trainers_signals():
    """They are sent to the group; and one of its own ends it only after a while."""
    soon = "setattr(sys.modules['utils.runtime.process'], 'OUTLIVE', 1)"
    child = f"{soon}, become_worker(0), print('ready', os.getpid(), flush=True), time.sleep(60)"
    listening = "signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))"
    parent = process(f"{listening}; os.fork() or [{child}]; time.sleep(60)", start_new_session=True)
    pid = int(parent.stdout.readline().split()[1])
    os.killpg(parent.pid, signal.SIGTERM)
    assert parent.stdout.readline() == "told\n"
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert alive([pid])
    time.sleep(1.2)
    assert not alive([pid])
    parent.kill()


def test_ctrl_c_is_remembered_where_nobody_reads_what_is_said():
    """`… 2>&1 | tee log`: the terminal's Ctrl-C ends tee, too, and first."""
    listening = "s = StopRequest(); c = s.listening(); c.__enter__(); os.kill(os.getpid(), signal.SIGINT)"
    reader, writer = os.pipe()
    told = process(f"{listening}; print(s.signal)", stderr=writer)
    os.close(reader)
    os.close(writer)
    assert told.communicate(timeout=60)[0] == "2\n"


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes():
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
        assert allow_open_files(100) == 100
        assert allow_open_files(1000) == 128
        assert allow_open_files(50) == 128
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (128, 128)

    on_ranks(1, limited)
