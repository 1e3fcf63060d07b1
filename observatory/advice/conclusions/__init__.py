"""What a command's result comes to: the worst place, what it costs, what to do next; or that nothing is.

Each function takes the document that a command prints with ``--json`` and returns at most three reasons:
codes and values, which ``advice/words.py`` puts into sentences. What lies within its interval, or at its
sampling floor, is never called worse than anything else.
"""

from observatory.advice.conclusions.changes import conclude_advice
from observatory.advice.conclusions.comparisons import conclude_comparison, conclude_history
from observatory.advice.conclusions.energy import (
    conclude_clocks,
    conclude_energy,
    conclude_reuse,
    conclude_sweep,
)
from observatory.advice.conclusions.loads import conclude_exchanges, conclude_routing, conclude_scan
from observatory.advice.conclusions.measurements import (
    conclude_bench,
    conclude_experts,
    conclude_fit,
    conclude_replay,
)
from observatory.advice.conclusions.plans import conclude_plan
from observatory.advice.conclusions.reasons import (
    NEXT_STEPS,
    NOTHING,
    Code,
    Conclusion,
    conclusion_document,
    stake,
)

__all__ = [
    "NEXT_STEPS",
    "NOTHING",
    "Code",
    "Conclusion",
    "conclude_advice",
    "conclude_bench",
    "conclude_clocks",
    "conclude_comparison",
    "conclude_energy",
    "conclude_exchanges",
    "conclude_experts",
    "conclude_fit",
    "conclude_history",
    "conclude_plan",
    "conclude_replay",
    "conclude_reuse",
    "conclude_routing",
    "conclude_scan",
    "conclude_sweep",
    "conclusion_document",
    "stake",
]
