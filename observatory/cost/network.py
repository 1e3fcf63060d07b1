"""The network model as a document: what was fitted, from what, how sure it is and where it holds.

Shapes: B bootstrap samples, F terms of the form, Q quantiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from observatory.cost.features import FORMS
from observatory.errors import BenchmarkError
from observatory.records import Count, Record, Text
from observatory.versioned import load_document

__all__ = [
    "NETWORK_VERSION",
    "AlgorithmFit",
    "Coefficient",
    "Domain",
    "FormScore",
    "NetworkModel",
    "RanksScore",
    "load_network",
]

NETWORK_VERSION = "2.0"

#: Beyond any error of a fit.
_NotNegative = Annotated[float, Field(ge=0.0, le=1e30)]
#: Microseconds per unit and ratios: beyond what any fabric is, so that predictions stay finite.
_Cost = Annotated[float, Field(ge=0.0, le=1e12)]
_Ratio = Annotated[float, Field(gt=0.0, le=1e24)]
_Known = Annotated[tuple[Count, ...], Field(min_length=1)]


class Coefficient(Record):
    """One coefficient of the chosen form.

    Attributes:
        term: name of the term, see ``features.TERMS``.
        us_per_unit: microseconds per exchange, message, rank or byte; None when the measurements cannot tell
            it.
        reason: why ``us_per_unit`` is None.
        low_us, high_us: 90 % bootstrap interval over matrices; None like ``us_per_unit``.
        gb_per_s: the bandwidth that a coefficient per byte means; None for other terms, and when the
            coefficient is 0: bytes of this kind cost nothing that could be measured.
    """

    term: str
    us_per_unit: _Cost | None
    reason: Literal["never measured", "not told apart from the terms before it"] | None = None
    low_us: _Cost | None = None
    high_us: _Cost | None = None
    gb_per_s: _NotNegative | None = None

    @model_validator(mode="after")
    def _missing_with_a_reason(self) -> Coefficient:
        if (self.us_per_unit is None) != (self.reason is not None):
            raise ValueError("a coefficient is either a number or has a reason for being none")
        return self


class FormScore(Record):
    """How one form did on matrices that were left out of its fit.

    Attributes:
        form: its name.
        parameters: coefficients the measurements determine.
        median_error, p90_error: of |predicted - measured| / measured over held-out matrices.
        other_ranks_error: median of the same over all matrices, each with its number of ranks left out of
            the fit; None where fewer than three numbers of ranks were measured.
        weighted_error: mean of both errors, a matrix counting the less the more its repeats scatter; forms
            are chosen by it.
    """

    form: str
    parameters: Count
    median_error: _NotNegative
    p90_error: _NotNegative
    other_ranks_error: _NotNegative | None = None
    weighted_error: _NotNegative


class RanksScore(Record):
    """How the chosen form did on one number of ranks that was left out of its fit.

    Attributes:
        ranks: the number of ranks.
        median_error, p90_error: of |predicted - measured| / measured.
        median_ratio: median of predicted / measured.
    """

    ranks: Count
    median_error: _NotNegative
    p90_error: _NotNegative
    median_ratio: _NotNegative


class Domain(Record):
    """Where a fit was measured; outside it a prediction is an extrapolation and says so.

    Attributes:
        ranks: numbers of ranks.
        nodes: numbers of nodes.
        ranks_on_node: largest numbers of ranks on one node.
        rank_bytes: smallest (not 0) and largest bytes that the busiest rank of an exchange sent or received.
        empty: whether exchanges of nothing were among them.
    """

    ranks: _Known
    nodes: _Known
    ranks_on_node: _Known
    rank_bytes: tuple[Count, Count]
    empty: bool = False


class AlgorithmFit(Record):
    """The model of one algorithm.

    Attributes:
        algorithm: flat, hierarchical or gather.
        form: the chosen form, a key of ``features.FORMS``.
        coefficients: in the order of the form's terms.
        samples_BF: the same refitted to resampled matrices, 0 where not determined.
        ratio_Q: quantiles (1/40, 3/40, ... 39/40) of measured / predicted on held-out matrices.
        other_ranks_ratio_Q: the same with each number of ranks left out in turn: the spread of predictions
            for numbers of ranks that were not measured; None where fewer than three were.
        held_out_ranks: the same for each number of ranks.
        scores: all forms that were tried.
        domain: where it was measured.
        cases: matrices it was fitted to.
        sharing: what held-out means here.
    """

    algorithm: str
    form: str
    coefficients: tuple[Coefficient, ...]
    samples_BF: Annotated[tuple[tuple[_Cost, ...], ...], Field(max_length=10_000)]
    ratio_Q: Annotated[tuple[_Ratio, ...], Field(min_length=1, max_length=1000)]
    other_ranks_ratio_Q: Annotated[tuple[_Ratio, ...], Field(min_length=1, max_length=1000)] | None = None
    held_out_ranks: tuple[RanksScore, ...] = ()
    scores: tuple[FormScore, ...]
    domain: Domain
    cases: Count
    sharing: Text

    @property
    def never_measured(self) -> tuple[str, ...]:
        """Terms of which the measurements had nothing at all."""
        return tuple(item.term for item in self.coefficients if item.reason == "never measured")

    @model_validator(mode="after")
    def _fits_its_form(self) -> AlgorithmFit:
        if self.form not in FORMS:
            raise ValueError(f"form {self.form[:40]!r} is unknown")
        terms = FORMS[self.form].terms
        if tuple(coefficient.term for coefficient in self.coefficients) != terms:
            raise ValueError(f"coefficients are not those of form {self.form}")
        if any(len(sample) != len(terms) for sample in self.samples_BF):
            raise ValueError("a bootstrap sample has another number of terms than the form")
        return self


class NetworkModel(Record):
    """What ``observatory fit`` writes.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        created_unix_s: wall-clock label.
        argv: command line.
        backend: what moved the bytes.
        fits: one per algorithm.
        sources: names of the benchmark files and the hosts they come from.
        git_sha: commit of the working directory.
        notes: what a reader must know.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = NETWORK_VERSION
    created_unix_s: float
    argv: tuple[Text, ...] = ()
    backend: str
    fits: Annotated[tuple[AlgorithmFit, ...], Field(min_length=1)]
    sources: tuple[Text, ...] = ()
    git_sha: Text | None = None
    notes: tuple[Text, ...] = ()

    def of(self, algorithm: str) -> AlgorithmFit:
        """The fit of one algorithm.

        Raises:
            BenchmarkError: it was not measured.
        """
        for fit in self.fits:
            if fit.algorithm == algorithm:
                return fit
        known = ", ".join(fit.algorithm for fit in self.fits)
        raise BenchmarkError(
            f"the network model knows {known}, not {algorithm!r}; benchmark it with --algorithm {algorithm} "
            "and fit again"
        )


def load_network(path: Path | str) -> NetworkModel:
    """Read and check a network model.

    Raises:
        BenchmarkError: not readable, of a newer schema, or not what the schema says.
    """
    return load_document(
        NetworkModel,
        path,
        version=NETWORK_VERSION,
        what="network model",
        remedy="make one with `observatory fit`",
    )
