"""Whether an engine has the interface that an adapter needs, before anything of it is changed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from observatory.errors import CaptureError


def check_interface(engine: str, names: Mapping[str, Sequence[str]]) -> None:
    """Look for what will be used.

    Args:
        engine: its name and version, for people.
        names: "module:name" or "module:Class.name" -> parameters that it takes, by name; empty where it is
            not called here, or is no function.

    Raises:
        CaptureError: the first thing that is missing.
    """
    for name, parameters in names.items():
        found = _find(engine, name)
        if not parameters:
            continue
        known = inspect.signature(found).parameters
        for parameter in parameters:
            if parameter not in known:
                raise _not_understood(engine, f"{name} takes no {parameter}")


def _find(engine: str, name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise _not_understood(engine, f"{module} is missing") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise _not_understood(engine, f"{name} is missing")
        found = getattr(found, part)
    return found


def _not_understood(engine: str, what: str) -> CaptureError:
    return CaptureError(f"this version of {engine} has another interface: {what}")
