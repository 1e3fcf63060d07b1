"""Dispatch of tokens to expert ranks and back: one interface, three algorithms."""

from collectives.dispatch.base import Dispatcher, LocalExperts
from collectives.dispatch.choice import ALGORITHMS, Algorithm, make_dispatcher
from collectives.dispatch.plan import DispatchPlan, ExpertMap

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "DispatchPlan",
    "Dispatcher",
    "ExpertMap",
    "LocalExperts",
    "make_dispatcher",
]
