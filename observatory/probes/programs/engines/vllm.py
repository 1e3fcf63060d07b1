"""The general plugin of vLLM: what its processes call as they start, and nothing else until then.

It does nothing unless ``observatory run`` or the variable ``OBSERVATORY_VLLM`` asks for it. Loads nothing
heavy: every process of the engine calls it, also those without a model.
"""

from __future__ import annotations

import logging
import os

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
