"""The ``observatory`` command.

Exit codes: 0 done, 1 something the user can fix (one line says how), 2 wrong usage, 130 interrupted.
Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main", "run"]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    from observatory.cli.app import command
    from observatory.cli.output import complain
    from observatory.errors import ObservatoryError

    try:
        command().main(args=None if argv is None else list(argv), prog_name="observatory")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer turns Ctrl-C into this
            complain("interrupted; what was written so far is kept and can be read")
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except ObservatoryError as error:
        complain(str(error))
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
    return 0


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())
