"""A run as a process among others: signals, its parent's death, and the lock on its directory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
OUTLIVE = 600  # seconds: of a step and a save, on a GPU alone a minute and more
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the signal that asked this process to save and stop; 0 while there is none.

    A launcher may pass on a signal that the process has had already: repeats change nothing. But a second Ctrl-C, a
    while after the first, ends the process at once; under torchrun its end does that.
    """

    def __init__(self):
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Within, SIGTERM, SIGUSR1 and Ctrl-C do nothing but be remembered."""
        old = {number: signal.signal(number, self.remember) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def remember(self, number: int, frame: object) -> None:
        again, self.signal = self.signal == number == signal.SIGINT, self.signal or number
        if number != signal.SIGINT or ("RANK" in os.environ and again):
            return
        if again:
            say_now(b"\ninterrupted again: ended at once, unsaved\n")
            os._exit(128 + number)
        if os.environ.get("RANK", "0") == "0":
            say_now(b"\ninterrupted: saves at the end of this step, then stops; again to end at once\n")


def say_now(line: bytes) -> None:
    """Write a line from within a signal's handler. Ctrl-C may have ended what reads it, `tee` say, already."""
    with suppress(OSError):
        os.write(2, line)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files(wanted: int) -> int:
    """Raise this process's limit of open files to `wanted`, or as far as the system lets it. Returns the limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return wanted if soft == resource.RLIM_INFINITY else soft


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def become_worker(number: int) -> None:
    """A loader's worker: it ends when its trainer does. What stops the trainer is not for it: it leaves the trainer's
    group, and outlives a SIGTERM of its own by the time that a step and a save may take."""
    die_with_parent()
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLIVE))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def locked(directory: Path, wanted: bool = True) -> Iterator[None]:
    """Hold a run's directory (if `wanted`: the first rank holds it for all). The system lets go when the process ends.

    Raises ValueError when another process holds it.
    """
    if not wanted:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"cannot write to {directory}: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers do not inherit it
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"no lock on {directory}, whose file system has none: {error.strerror}", file=sys.stderr)
                yield
                return
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{holder} is training in {directory}: stop it, or use another --out_dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. By default it returns each large tensor to the system, and faults it in again page
    by page when the next one is made: a sixth of the tokenizer's time on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**31 - 1)


def release_freed_memory() -> None:
    """Have glibc return what is freed and kept to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
