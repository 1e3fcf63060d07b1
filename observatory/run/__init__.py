"""The run directory: Parquet parts per rank and a versioned manifest (format: ``docs/run-format.md``).

Each public name is imported on first use: the watchdog of a clock lock and the commands around it need the
names of files and not pandas, and start in a third of the time without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from observatory.run.appender import TableAppender
    from observatory.run.blocks import LoadBlock
    from observatory.run.reader import Run, open_run
    from observatory.run.rows import routing_rows
    from observatory.run.writer import RunWriter

__all__ = ["LoadBlock", "Run", "RunWriter", "TableAppender", "open_run", "routing_rows"]

_HOMES = {
    "LoadBlock": "blocks",
    "Run": "reader",
    "RunWriter": "writer",
    "TableAppender": "appender",
    "open_run": "reader",
    "routing_rows": "rows",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'observatory.run' has no attribute {name!r}")
    return getattr(importlib.import_module(f"observatory.run.{_HOMES[name]}"), name)
