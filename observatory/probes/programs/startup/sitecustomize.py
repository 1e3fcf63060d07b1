"""Run by Python as it starts, where this folder is on ``PYTHONPATH``.

Once the program has imported torch, models with MoE layers are watched. Until then nothing but the standard
library is loaded, and whatever fails here is noted for ``observatory run``: the program goes on.
"""

import contextlib
import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_SETTINGS = "OBSERVATORY_PROGRAM"


class _AfterTorch:
    """A finder that finds nothing: it has torch's own loader call us once torch is there."""

    def find_spec(self, name: str, *_place: object) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                load(module)
                _begin()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _begin() -> None:
    try:
        from observatory.probes.programs.models import begin

        begin()
    except Exception as error:
        _note(error)


def _note(error: Exception) -> None:
    reason = {"code": "not_loaded", "python": sys.prefix, "error": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError, ValueError):
        folder = Path(os.environ[_SETTINGS]).parent
        (folder / f"note-{os.getpid()}-start.json").write_text(json.dumps({"reason": reason}))


def _run_the_next() -> None:
    """The ``sitecustomize`` that Python would have run without this folder."""
    others = [folder for folder in sys.path if os.path.abspath(folder) != _FOLDER]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get(_SETTINGS):
    sys.meta_path.insert(0, _AfterTorch())
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _FOLDER]
_run_the_next()
