"""Dispatch of tokens to expert ranks and back: one interface, three algorithms."""

from observatory.collectives.dispatch.algorithms import ALGORITHMS, Algorithm, make_dispatcher
from observatory.collectives.dispatch.base import Dispatcher, LocalExperts
from observatory.collectives.dispatch.plan import DispatchPlan, ExpertMap

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "DispatchPlan",
    "Dispatcher",
    "ExpertMap",
    "LocalExperts",
    "make_dispatcher",
]
