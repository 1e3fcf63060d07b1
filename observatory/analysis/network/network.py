"""The network model as a document: what was fitted, from what, how sure it is and where it holds.

Shapes: B bootstrap samples, F terms of the form, Q quantiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from observatory.analysis.network.features import FORMS
from observatory.analysis.statistics import FormScore as _FormScore
from observatory.errors import BenchmarkError
from observatory.run.documents.versioned import load_document
from observatory.run.manifest import CoreShare
from observatory.run.records import Count, Record, Text

NETWORK_VERSION = "3.0"

#: Beyond any error of a fit.
_NotNegative = Annotated[float, Field(ge=0.0, le=1e30)]
#: Microseconds per unit and ratios: beyond what any fabric is, so that predictions stay finite.
_Cost = Annotated[float, Field(ge=0.0, le=1e12)]
_Ratio = Annotated[float, Field(gt=0.0, le=1e24)]
_Ratios = Annotated[tuple[_Ratio, ...], Field(min_length=1, max_length=1000)]
_Known = Annotated[tuple[Count, ...], Field(min_length=1)]


class Coefficient(Record):
    """One coefficient of the chosen form.

    Attributes:
        term: name of the term, see ``features.TERMS``.
        us_per_unit: microseconds per exchange, message, rank or byte; None when the measurements do not
            determine it.
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


class FormScore(_FormScore):
    """How one form did on matrices that were left out of its fit.

    Attributes:
        parameters: coefficients that the measurements determine.
        median_error, p90_error: of |predicted - measured| / measured over held-out matrices.
        other_ranks_error: median of the same over all matrices, each with its number of ranks left out of
            the fit; None where fewer than three numbers of ranks were measured.
        weighted_error: mean of both errors, a matrix counting the less the more its repeats scatter; forms
            are chosen by it.
    """

    median_error: _NotNegative
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


class Misfit(Record):
    """A part of the fabric that is slower than the others.

    Attributes:
        code: what is slower: what one rank sends, receives, or both (``rank``); what one rank sends another
            (``pair``); what a node sends or receives.
        who: the rank, the sending and the receiving rank, or the node.
        ranks, node_of_P: the set of ranks in which it was found.
        hosts: hosts of these ranks; empty when not recorded.
        factor: how many times as much a byte costs there.
    """

    code: Literal["rank_sends", "rank_receives", "rank", "pair", "node_sends", "node_receives"]
    who: Annotated[tuple[Count, ...], Field(min_length=1, max_length=2)]
    ranks: Annotated[int, Field(ge=1)]
    node_of_P: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4096)]
    hosts: tuple[Text, ...] = ()
    factor: Annotated[float, Field(ge=1.0, le=1e3)]

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Misfit:
        if len(self.who) != (2 if self.code == "pair" else 1) or len(self.node_of_P) != self.ranks:
            raise ValueError("a misfit does not fit its ranks")
        existing = self.node_of_P if self.code.startswith("node") else range(self.ranks)
        if any(number not in existing for number in self.who):
            raise ValueError("a misfit names a rank or node that is not there")
        return self


class VerdictReason(Record):
    """Why a fit is not to be relied on: a value beyond its bound."""

    code: Literal["repeat_noise", "held_out_median", "held_out_p90", "other_ranks_median", "other_ranks_p90"]
    value: _NotNegative
    bound: _NotNegative


class Verdict(Record):
    """What the fit of one algorithm is good for, within its ``domain``.

    Attributes:
        code: ``valid``; ``too_noisy`` when repeats scatter too much to fit anything; ``does_not_fit`` when
            the error is too large for another reason.
        reasons: empty when valid.
        repeat_noise: median over matrices of the relative standard error of their median time; None with
            fewer than three repeats.
        median_error, p90_error: of |predicted - measured| / measured over held-out matrices.
        other_ranks_median_error, other_ranks_p90_error: the same with each number of ranks held out; None
            where fewer than three were measured.
    """

    code: Literal["valid", "too_noisy", "does_not_fit"]
    reasons: tuple[VerdictReason, ...] = ()
    repeat_noise: _NotNegative | None = None
    median_error: _NotNegative
    p90_error: _NotNegative
    other_ranks_median_error: _NotNegative | None = None
    other_ranks_p90_error: _NotNegative | None = None

    @model_validator(mode="after")
    def _reasons_where_not_valid(self) -> Verdict:
        if (self.code == "valid") != (not self.reasons):
            raise ValueError("a verdict is either valid or has reasons")
        return self


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
        paired_ratio_Q, other_ranks_paired_ratio_Q: quantiles of how far these lie apart for two matrices of
            one size on the same ranks: what the model gets wrong of both alike does not count. None where
            there are none, and in files before schema 2.1.
        misfits: parts of the fabric that are slower, in the order in which they were found.
        verdict: whether it may be relied on; None in files before schema 2.1.
        scores: all forms that were tried.
        domain: where it was measured.
        cases: matrices it was fitted to.
        sharing: what held-out means here.
    """

    algorithm: str
    form: str
    coefficients: tuple[Coefficient, ...]
    samples_BF: Annotated[tuple[tuple[_Cost, ...], ...], Field(max_length=10_000)]
    ratio_Q: _Ratios
    other_ranks_ratio_Q: _Ratios | None = None
    held_out_ranks: tuple[RanksScore, ...] = ()
    paired_ratio_Q: _Ratios | None = None
    other_ranks_paired_ratio_Q: Annotated[tuple[_Ratio, ...], Field(min_length=1, max_length=1000)] | None = (
        None
    )
    misfits: Annotated[tuple[Misfit, ...], Field(max_length=1000)] = ()
    verdict: Verdict | None = None
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
        sources: names of the benchmark files and the hosts they come from, for people.
        hosts: names of these hosts; empty in files before schema 2.2.
        git_sha: commit of the working directory.
        notes: what a reader must know.
        note_codes: their codes; empty in older files.
        short_of_cores: machines on which ranks of a source were more than the cores that they could use.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = NETWORK_VERSION
    created_unix_s: float
    argv: tuple[Text, ...] = ()
    backend: str
    fits: Annotated[tuple[AlgorithmFit, ...], Field(min_length=1)]
    sources: tuple[Text, ...] = ()
    hosts: Annotated[tuple[Text, ...], Field(max_length=10_000)] = ()
    git_sha: Text | None = None
    notes: tuple[Text, ...] = ()
    note_codes: tuple[Text, ...] = ()
    short_of_cores: Annotated[tuple[CoreShare, ...], Field(max_length=10_000)] = ()

    def of(self, algorithm: str) -> AlgorithmFit:
        """The fit of one algorithm.

        Raises:
            BenchmarkError: it was not measured.
        """
        for fit in self.fits:
            if fit.algorithm == algorithm:
                return fit
        algorithms = ", ".join(fit.algorithm for fit in self.fits)
        raise BenchmarkError(
            f"the network model is of {algorithms}, not of {algorithm!r}; benchmark it with --algorithm "
            f"{algorithm} and fit again"
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
