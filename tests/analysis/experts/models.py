"""Costs and network models with known coefficients."""

from __future__ import annotations

from observatory.analysis.experts import cost as experts_cost
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.network.features import FORMS
from observatory.analysis.network.network import AlgorithmFit, Coefficient, Domain, NetworkModel
from observatory.run.documents.expert_bench import ExpertShape

SHAPE = ExpertShape(
    hidden=8, intermediate=16, experts=4, top_k=2, dtype="float32", expert_bytes=8 * 16 * 3 * 4
)


def cost(call_s: float = 0.0, expert_s: float = 0.0, row_s: float = 0.0, **changes: object) -> ExpertCost:
    """A measured cost of the plainest form."""
    fields = {
        "grade": "measured",
        "shape": SHAPE,
        "form": experts_cost.FORMS["experts-and-rows"],
        "coefficient_F": (call_s, expert_s, row_s, 0.0),
        "idle_s": 0.0,
        "source": "test",
        "most_assignments": 100,
        "most_activated": 4,
        "most_rows": 50.0,
    }
    return ExpertCost(**{**fields, **changes})


def network(*, latency_us: float, us_per_byte: float) -> NetworkModel:
    """Latency plus bytes of the busiest rank, for all algorithms."""
    gb_per_s = 1e-3 / us_per_byte if us_per_byte else None
    values = {
        "exchange": latency_us,
        "start": latency_us,
        "bytes_other": us_per_byte,
        "bytes_node": us_per_byte,
    }
    coefficients = [
        Coefficient(
            term=term,
            us_per_unit=values.get(term, 0.0),
            gb_per_s=gb_per_s if term in ("bytes_other", "bytes_node") else None,
        )
        for term in FORMS["two-way"].terms
    ]
    fits = [
        AlgorithmFit(
            algorithm=algorithm,
            form="two-way",
            coefficients=tuple(coefficients),
            samples_BF=(),
            ratio_Q=(1.0,),
            scores=(),
            domain=Domain(
                ranks=(2, 4), nodes=(1, 2), ranks_on_node=(2, 4), rank_bytes=(1, 1 << 30), empty=True
            ),
            cases=10,
            sharing="none",
        )
        for algorithm in ("flat", "hierarchical", "gather")
    ]
    return NetworkModel(created_unix_s=0.0, backend="gloo", fits=tuple(fits))
