"""What a network model cannot predict, as codes; and this room's findings in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum

import pandas as pd

from observatory.analysis.exchange import words as exchange_words
from observatory.analysis.network.network import AlgorithmFit, Misfit, NetworkModel, Verdict
from observatory.reasons import Reason
from observatory.run.documents.bench import NODES_AS_STATED


class NetworkCode(StrEnum):
    """Codes of the reasons that this room gives; the values of each are the names in its words."""

    RANKS_OUTSIDE = "ranks_outside"
    NODES_OUTSIDE = "nodes_outside"
    RANKS_ON_NODE_OUTSIDE = "ranks_on_node_outside"
    RANKS_BETWEEN = "ranks_between"
    BYTES_ABOVE = "bytes_above"
    BYTES_BELOW = "bytes_below"
    EMPTY_EXCHANGE = "empty_exchange"
    ONE_GROUP_OF_SEVERAL = "one_group_of_several"
    NODES_UNKNOWN = "nodes_unknown"
    NOT_STRAIGHT = "not_straight"
    NOTHING_SENT = "nothing_sent"
    TOO_SHORT = "too_short"
    OTHER_BACKEND = "other_backend"
    NOT_PREDICTED = "not_predicted"
    MATRICES_DRAWN = "matrices_drawn"
    NODES_AS_STATED = "nodes_as_stated"


_MOST_NAMED = 8
_REASONS = {
    "repeat_noise": "repeats of one matrix leave its time uncertain by {value:.0%}",
    "held_out_median": "the median error on held-out matrices is {value:.0%}",
    "held_out_p90": "the 90th percentile of the error on held-out matrices is {value:.0%}",
    "other_ranks_median": "the median error on numbers of ranks left out is {value:.0%}",
    "other_ranks_p90": "the 90th percentile of the error on numbers of ranks left out is {value:.0%}",
}
_WORDS = {
    NetworkCode.RANKS_OUTSIDE: "{ranks} ranks (measured {measured})",
    NetworkCode.NODES_OUTSIDE: "{nodes} nodes (measured {measured})",
    NetworkCode.RANKS_ON_NODE_OUTSIDE: "{ranks} ranks on a node (measured {measured})",
    NetworkCode.RANKS_BETWEEN: (
        "{ranks} ranks (measured {measured}; a third number would show how well others fit)"
    ),
    NetworkCode.BYTES_ABOVE: "{bytes} bytes on one rank (measured up to {most_bytes})",
    NetworkCode.BYTES_BELOW: "{bytes} bytes on one rank (measured from {least_bytes})",
    NetworkCode.EMPTY_EXCHANGE: "an empty exchange (none was measured)",
    NetworkCode.ONE_GROUP_OF_SEVERAL: "one group of several",
    NetworkCode.NODES_UNKNOWN: "the run does not say which rank is on which node",
    NetworkCode.NOT_STRAIGHT: "recorded as {algorithm}: only all-to-alls that go straight are compared",
    NetworkCode.NOTHING_SENT: "nothing went to another rank",
    NetworkCode.TOO_SHORT: "too short for the clock",
    NetworkCode.OTHER_BACKEND: "exchanged over {backend}, not {model_backend}",
    NetworkCode.NOT_PREDICTED: "{error}",
    NetworkCode.MATRICES_DRAWN: "{algorithm}: {fitted} of {measured} matrices were fitted, drawn at random",
    NetworkCode.NODES_AS_STATED: NODES_AS_STATED,
}


def sentence(reason: Reason) -> str:
    """A reason of this room, or of the exchanges that it looks at, for people."""
    if isinstance(reason.code, exchange_words.ExchangeCode):
        return exchange_words.sentence(reason)
    return _WORDS[NetworkCode(reason.code)].format(**reason.values)


def reason_columns(reasons: Iterable[Reason]) -> dict[str, object]:
    """Columns ``extrapolated`` (in words) and ``extrapolated_codes`` of a frame; None without reasons."""
    listed = list(reasons)
    return {
        "extrapolated": "; ".join(map(sentence, listed)) or None,
        "extrapolated_codes": [reason.code.value for reason in listed] or None,
    }


def reason_counts(reasons: Iterable[Reason]) -> pd.DataFrame:
    """How many exchanges have each reason: code, reason (in words), exchanges."""
    counts = Counter((reason.code.value, sentence(reason)) for reason in reasons)
    rows = [(code, text, exchanges) for (code, text), exchanges in counts.items()]
    return pd.DataFrame(rows, columns=["code", "reason", "exchanges"])


def verdict_sentence(fit: AlgorithmFit, backend: str) -> str:
    """What a fit is good for, or why it is not to be relied on."""
    what, verdict = f"{fit.algorithm} over {backend}", fit.verdict
    if verdict is None:
        return f"{what}: the file is older than verdicts; fit again to know whether it holds"
    if verdict.code == "valid":
        low, high = fit.domain.rank_bytes
        return (
            f"{what}: valid for {_numbers(fit.domain.ranks)} ranks on {_numbers(fit.domain.nodes)} nodes, "
            f"{low} to {high} bytes on the busiest rank, within {_errors(verdict)}"
        )
    because = [
        _REASONS[reason.code].format(value=reason.value) + f" (bound {reason.bound:.0%})"
        for reason in verdict.reasons
    ]
    state = "too noisy to fit" if verdict.code == "too_noisy" else "does not fit"
    return f"{what}: {state}: {'; '.join(because)}. Do not rely on predictions"


def misfit_sentence(misfit: Misfit) -> str:
    """What of the fabric is slower, and by how much."""
    on = f" (host {', '.join(misfit.hosts)})" if misfit.hosts else ""
    return (
        f"{_part(misfit)}{on}, of {misfit.ranks} ranks, is slower than the others: a byte costs "
        f"{misfit.factor:.2g} times as much there"
    )


def through_misfits(misfits: Sequence[Misfit], places: Iterable[int]) -> str:
    """What a prediction passes that its model does not describe."""
    named = [f"{_part(misfits[place])} of {misfits[place].ranks}" for place in sorted(set(places))]
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return f"through what the model does not describe: {', '.join(named[:_MOST_NAMED])}{more}"


def comparison_sentence(
    first: str, second: str, *, ratio: float, low: float | None, high: float | None, code: str
) -> str:
    """Whether predicted times of two layouts differ beyond the error of the model."""
    if low is None or high is None:
        return (
            f"{first} takes {ratio:.2f} times {second} by the model, but the error of predictions for such "
            "ranks was not measured: no verdict"
        )
    interval = f"90 % interval {low:.2f} to {high:.2f}"
    if code == "apart":
        return f"{first} takes {ratio:.2f} times {second} ({interval})"
    return f"predicted times do not distinguish {first} from {second}: {ratio:.2f} times, {interval}"


def model_notes(model: NetworkModel, algorithm: str | None = None) -> list[str]:
    """What a user of a model must know of it: bad verdicts, misfits; empty when all is well."""
    notes = []
    for fit in model.fits:
        if algorithm in (None, fit.algorithm) and (fit.verdict is None or fit.verdict.code != "valid"):
            notes.append(verdict_sentence(fit, model.backend))
        if algorithm in (None, fit.algorithm):
            notes += [misfit_sentence(misfit) for misfit in fit.misfits[:_MOST_NAMED]]
    return notes


def _part(misfit: Misfit) -> str:
    first = misfit.who[0]
    return {
        "rank_sends": f"what rank {first} sends",
        "rank_receives": f"what rank {first} receives",
        "rank": f"what rank {first} sends and receives",
        "pair": f"what rank {first} sends rank {misfit.who[-1]}",
        "node_sends": f"what node {first} sends",
        "node_receives": f"what node {first} receives",
    }[misfit.code]


def _errors(verdict: Verdict) -> str:
    errors = (
        f"{verdict.median_error:.0%} (median) and {verdict.p90_error:.0%} (90th percentile) on held-out "
        "patterns"
    )
    if verdict.other_ranks_median_error is not None and verdict.other_ranks_p90_error is not None:
        errors += (
            f", {verdict.other_ranks_median_error:.0%} and {verdict.other_ranks_p90_error:.0%} on numbers "
            "of ranks left out"
        )
    return errors


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
