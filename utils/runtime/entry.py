"""The door of every command line: a user's mistake is one line and status 1, and output is safe on any terminal."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

TRACEBACK = "SAR_TRACEBACK"  # set to 1 to see where an error came from


def entry(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates the `main` of a command line.

    OSError and ValueError (unreadable data are among them), a loss that is not finite and a GPU out of memory become
    one line, `error: …`, and status 1. Ctrl-C ends with 130. All else is a fault of the program: a traceback, printed
    after everything that it held, loader workers among it, has been let go.
    """

    @functools.wraps(main)
    def guarded() -> None:
        make_output_safe()
        warnings.formatwarning = warning_line
        try:
            return main()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except BrokenPipeError:  # whoever read the output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # lets go of what it held before anything else is printed
            if os.environ.get(TRACEBACK) or not is_users(error):
                raise
            print(f"error{rank_suffix()}: {one_line(error)}", file=sys.stderr)
            raise SystemExit(1) from None

    return guarded


def warning_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line=None) -> str:
    """A warning of this project as one line; others with the place they come from."""
    own = category is UserWarning and Path(filename).resolve().is_relative_to(Path(__file__).resolve().parents[2])
    return f"warning: {message}\n" if own else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def is_users(error: Exception) -> bool:
    """True for what a user can mend."""
    return isinstance(error, OSError | ValueError | FloatingPointError) or is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's: not imported for this


def one_line(error: Exception) -> str:
    """Message of a user's error."""
    if is_out_of_memory(error):
        first = str(error).strip().partition("\n")[0]
        return f"{first} (a smaller --micro_batch or --batch, or --checkpoint_activations true, needs less)"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def rank_suffix() -> str:
    """ " (rank 3)" on every rank but the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (rank {rank})"


def notice(line: str) -> None:
    """Prints a line on stderr, from the first rank."""
    if not rank_suffix():
        print(line, file=sys.stderr)


def make_output_safe() -> None:
    """Prints signs that a terminal's encoding lacks as escapes: "×" as \\xd7, bytes of a name as \\udcff."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ------------------------------------------------------------------------------------------------- outputs


def check_output_directory(path: str | Path, flag: str = "") -> Path:
    """Makes a directory that results will be written to, before the work for them begins.

    Raises ValueError when that cannot be.
    """
    path, said = Path(path), f"{flag} {path}".strip()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            return path
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{said} cannot be a directory: a file has that name, or one of its parents'") from None
    except OSError as error:
        raise ValueError(f"cannot write to {said}: {error.strerror}") from None


def check_output_file(path: str | Path, flag: str = "") -> Path:
    """Checks that a file can be written, before the work for it begins. Raises ValueError when it cannot."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a directory: name a file".strip())
    check_output_directory(path.parent, flag)
    return path


def refuse_inside(out: str | Path, flag: str, *sources: str | Path) -> None:
    """Raises ValueError when results would be written among the images that they are made from."""
    for source in filter(None, map(str, sources)):
        if Path(source).is_dir() and Path(out).resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"{flag} {out} lies inside {source}, whose images it would join: name another place")
