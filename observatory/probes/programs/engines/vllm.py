"""The general plugin of vLLM: what its processes call as they start, and nothing else until then.

It does nothing unless ``observatory run`` or the variable ``OBSERVATORY_VLLM`` asks for it. Loads nothing
heavy: every process of the engine calls it, also those without a model.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from observatory.probes.programs.settings import SETTINGS, VLLM


def register() -> None:
    """Watch the workers that this process will make; doing it twice does nothing."""
    if not (os.environ.get(SETTINGS) or os.environ.get(VLLM)):
        return
    try:
        from observatory.probes.programs.engines.vllm_worker import watch_workers

        watch_workers()
    except Exception as error:  # an engine without us is better than none
        logging.getLogger("vllm.observatory").warning("not watched: %s: %s", type(error).__name__, error)


def plugins_imported(plugins: Any) -> None:
    """Register under ``observatory run`` also where ``VLLM_PLUGINS`` names other plugins alone.

    Args:
        plugins: vLLM's module; nothing has imported from it yet.
    """
    load = plugins.load_general_plugins

    @functools.wraps(load)
    def load_with_ours(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        register()

    plugins.load_general_plugins = load_with_ours
