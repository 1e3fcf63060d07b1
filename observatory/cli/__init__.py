"""The ``observatory`` command.

Exit codes: 0 done, 1 something the user can fix (one line says how), 2 wrong usage, 3 a network model that is
written but not to be relied on (``fit``), 4 a threshold that could not be judged (``compare``), 130
interrupted by Ctrl-C (or a terminal that hangs up, or SIGTERM, which schedulers send before they kill).
Results go to stdout, progress and messages to stderr. No command shows a traceback, unless
``OBSERVATORY_DEBUG`` is set: then unexpected errors are raised as they are.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main", "run"]

_INTERRUPTED = 130
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    _open_missing_streams()
    try:
        return _guarded(argv)
    except KeyboardInterrupt:  # outside typer's own handling: while modules are imported
        sys.stderr.write("observatory: interrupted; nothing was left half written\n")
        return _INTERRUPTED


def _guarded(argv: Sequence[str] | None) -> int:
    from observatory.cli.app import command
    from observatory.cli.output import complain
    from observatory.errors import ObservatoryError, PlaceTakenError

    try:
        command().main(args=None if argv is None else list(argv), prog_name="observatory")
        sys.stdout.flush()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED and not _is_local_rank():  # typer turns Ctrl-C into this
            complain("interrupted; of a run, what was written so far is kept and can be read")
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except ObservatoryError as error:
        if not error.of_all_ranks or _is_first_rank():
            is_taken = isinstance(error, PlaceTakenError)
            complain(
                f"{error.what}; choose another place, or replace it (--force)" if is_taken else str(error)
            )
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`| head`): leave quietly, as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(
            f"{error.strerror or error}: {error.filename or 'no file named'}; check space and permissions"
        )
        return 1
    except ImportError as error:
        complain(f"{error}; install what is missing, for example: pip install 'moe-observatory[capture]'")
        return 1
    except MemoryError as error:
        complain(f"not enough memory: {error or 'no details'}; ask for less at once, or use a larger machine")
        return 1
    except Exception as error:
        if os.environ.get("OBSERVATORY_DEBUG"):
            raise
        complain(
            f"unexpected {type(error).__name__}: {error}; a fault of the program: please report it with "
            "what OBSERVATORY_DEBUG=1 shows"
        )
        return 1
    return 0


def _is_first_rank() -> bool:
    """Whether this process has to say what all ranks know."""
    from observatory.errors import CaptureError
    from observatory.host.ranks import find_rank

    try:
        return find_rank().rank == 0
    except CaptureError:
        return True


def _is_local_rank() -> bool:
    """Whether another ``observatory`` started this process as a rank, and says what there is to say."""
    from observatory.host.ranks import LOCAL_RUN

    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(LOCAL_RUN)


def _open_missing_streams() -> None:
    """Give a process that was started with closed streams (`>&-`) somewhere to write."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def run() -> None:
    """Entry point of the console script."""
    _put_standard_library_first()
    # What torch's C++ would warn of when ranks do not meet, pages of it, is one sentence of ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _interrupt)
    warnings.showwarning = _show_warning
    from observatory.hpc.rank_guard import end_rank, guard_rank

    guard_rank()
    code = main()
    end_rank(code)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line, without the place in the code that gave it."""
    from observatory.cli.output import say

    say(f"warning: {message}")


def _put_standard_library_first() -> None:
    """Let no file of the user's, in the working directory or on ``PYTHONPATH``, hide a module of Python."""
    library = os.path.dirname(os.__file__)
    standard = {library, os.path.join(library, "lib-dynload")}
    sys.path.sort(key=lambda folder: folder not in standard)


def _interrupt(*_: object) -> None:
    """End as after Ctrl-C; a second signal does not disturb what is still written."""
    for number in _ENDING:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt
