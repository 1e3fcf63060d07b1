"""What ``observatory run`` calls in the processes of an SGLang server, once a module of SGLang is there.

Loads nothing heavy by itself: processes without a model import some of these modules as well.
"""

from __future__ import annotations

import logging
from types import ModuleType

_log = logging.getLogger("sglang.observatory")


def choices_imported(topk: ModuleType) -> None:
    """The module that chooses experts is there; nothing has imported from it yet."""
    try:
        from observatory.probes.programs.engines.sglang_layers import show_choices

        show_choices(topk)
    except Exception as error:  # an engine without us is better than none
        _log.warning("observatory: nothing is watched: %s: %s", type(error).__name__, error)


def runner_imported(runner: ModuleType) -> None:
    """The module of the model runner is there."""
    try:
        from observatory.probes.programs.engines.sglang_runner import watch_runners

        watch_runners(runner)
    except Exception as error:
        _log.warning("observatory: nothing is watched: %s: %s", type(error).__name__, error)
