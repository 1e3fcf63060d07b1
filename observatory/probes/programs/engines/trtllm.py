"""What ``observatory run`` calls in the processes of TensorRT-LLM, once its PyTorch engine is imported."""

from __future__ import annotations

import logging
from types import ModuleType


def engine_imported(engine: ModuleType) -> None:
    """The module of the model engine is there."""
    try:
        from observatory.probes.programs.engines.trtllm_engine import watch_engines

        watch_engines(engine)
    except Exception as error:  # an engine without us is better than none
        logging.getLogger("observatory").warning(
            "observatory: nothing is watched: %s: %s", type(error).__name__, error
        )
