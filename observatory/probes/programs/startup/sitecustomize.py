"""Run by Python as it starts, where this folder is on ``PYTHONPATH``.

Once the program has imported torch, models with MoE layers are watched; serving engines are watched by their
own interface. Until then nothing but the standard library is loaded, and whatever fails here is noted for
``observatory run``: the program goes on.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_SETTINGS = "OBSERVATORY_PROGRAM"
#: Modules of programs -> what of ours is given them once they are there, before anything imports from them.
_CALLS = {
    "torch": "models:begin",
    "vllm.plugins": "engines.vllm:plugins_imported",
    "sglang.srt.layers.moe.topk": "engines.sglang:choices_imported",
    "sglang.srt.model_executor.model_runner": "engines.sglang:runner_imported",
    "tensorrt_llm._torch.pyexecutor.model_engine": "engines.trtllm:engine_imported",
}


class _AfterImport:
    """A finder that finds nothing: it has a module's own loader call ours once the module is there."""

    def find_spec(self, name: str, *_place: object) -> ModuleSpec | None:
        ours = _CALLS.pop(name, None)
        if ours is None:
            return None
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                load(module)
                _call(ours, module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _call(ours: str, module: ModuleType) -> None:
    place, _, name = ours.partition(":")
    try:
        getattr(importlib.import_module(f"observatory.probes.programs.{place}"), name)(module)
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
    sys.meta_path.insert(0, _AfterImport())
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _FOLDER]
_run_the_next()
