"""MoE Dispatch Observatory: what mixture-of-experts models do to the machines they run on.

Importing this package loads nothing heavy; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from observatory.api.runs import Run, open_run
    from observatory.api.training import TrainerCallback
    from observatory.api.watching import watch
    from observatory.errors import ObservatoryError
    from observatory.run import RunWriter

__all__ = ["ObservatoryError", "Run", "RunWriter", "TrainerCallback", "open_run", "watch"]
__version__ = "0.1.0"

_HOMES = {
    "ObservatoryError": "observatory.errors",
    "Run": "observatory.api.runs",
    "RunWriter": "observatory.run",
    "TrainerCallback": "observatory.api.training",
    "open_run": "observatory.api.runs",
    "watch": "observatory.api.watching",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'observatory' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ModuleNotFoundError(
            f"observatory.{name} needs {error.name}, which is not installed; "
            "run: pip install 'moe-observatory[capture]'",
            name=error.name,
        ) from error
