"""MoE Dispatch Observatory: what mixture-of-experts models do to the machines they run on.

Importing this package loads nothing heavy; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from observatory.api.lightning_callback import LightningCallback
    from observatory.api.runs import Run, open_run
    from observatory.api.trainer_callback import TrainerCallback
    from observatory.api.watching import watch
    from observatory.errors import ObservatoryError
    from observatory.run import RunWriter

__all__ = [
    "LightningCallback",
    "ObservatoryError",
    "Run",
    "RunWriter",
    "TrainerCallback",
    "open_run",
    "watch",
]
__version__ = "0.1.0"

_HOMES = {
    "LightningCallback": "observatory.api.lightning_callback",
    "ObservatoryError": "observatory.errors",
    "Run": "observatory.api.runs",
    "RunWriter": "observatory.run",
    "TrainerCallback": "observatory.api.trainer_callback",
    "open_run": "observatory.api.runs",
    "watch": "observatory.api.watching",
}
#: What pip is asked for to install a package that a public name needs.
_INSTALLED_BY = {
    "torch": "'moe-observatory[capture]'",
    "transformers": "'moe-observatory[capture]'",
    "lightning": "lightning",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'observatory' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in _INSTALLED_BY:
            raise
        raise ModuleNotFoundError(
            f"observatory.{name} needs {error.name}, which is not installed; "
            f"run: pip install {_INSTALLED_BY[error.name]}",
            name=error.name,
        ) from error
