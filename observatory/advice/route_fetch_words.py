"""Conclusions about routes and fetches in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from observatory.advice.route_fetch import RouteFetchCode
from observatory.reasons import Reason
from observatory.text import percent_words

_SENTENCES = {
    RouteFetchCode.FETCH_FROM: "{shape}: at size {size:.0f} fetching costs less from {rows:.0f} rows on "
    "({rows_low:.0f} to {end}), routing below",
    RouteFetchCode.ALWAYS_ROUTE: "{shape}: at size {size:.0f} routing costs less for any number of rows",
    RouteFetchCode.ALWAYS_FETCH: "{shape}: at size {size:.0f} fetching costs less for any number of rows",
    RouteFetchCode.UNRELIABLE: "{shape}: do not rely on these costs: of {options} the faster was picked at "
    "{right_apart} of {apart} held-out points; measure with more --repeats on a quiet machine",
    RouteFetchCode.SEND_ALL: "send all tokens: there is no expert to fetch or keep",
    RouteFetchCode.CHANGE: "fetch {fetched} experts and keep {kept}, all layers together: on steps that were "
    "not used to choose that saves {share} of the {today_us:.0f} us of a step: {saved_us:.0f} us "
    "({saved_us_low:.0f} to {saved_us_high:.0f})",
    RouteFetchCode.UNCERTAIN: "send all tokens: to fetch {fetched} experts and keep {kept} would save "
    "{saved_us:.0f} us of {today_us:.0f} ({saved_us_low:.0f} to {saved_us_high:.0f}), which may be nothing",
    RouteFetchCode.KEEP_COST: "kept copies take {keep_mib:.2g} MiB on every rank; steps until bringing them "
    "there has paid: {break_even_steps}",
    RouteFetchCode.BREAK_EVEN: "the busiest expert has {busiest_tokens:.0f} tokens in a step; on {ranks} "
    "ranks fetching one takes less time from {break_even} tokens on",
    RouteFetchCode.RANKS_NOT_MEASURED: "the constants were measured on {measured_ranks} ranks; times on "
    "{ranks} are extrapolated",
    RouteFetchCode.OTHER_HOSTS: "the run was on {run}, the constants were measured on {measured}: they are "
    "those of another fabric",
    RouteFetchCode.WITHOUT_COMPUTE: "{source} says nothing about the experts' own time, which is left out",
}


def route_fetch_sentences(verdict: Sequence[Reason]) -> list[str]:
    """A verdict in words."""
    sentences = []
    for reason in verdict:
        values: dict[str, Any] = dict(reason.values)
        if "rows_high" in values:
            values["end"] = "any number" if values["rows_high"] is None else f"{values['rows_high']:.0f}"
        if "today_us" in values:
            values["share"] = percent_words(values["saved_us"] / max(values["today_us"], 1e-9))
        if "keep_bytes" in values:
            values["keep_mib"] = values["keep_bytes"] / (1 << 20)
        if "break_even_tokens" in values:
            tokens = values["break_even_tokens"]
            values["break_even"] = "no number of" if tokens is None else f"{tokens:.0f}"
        sentences.append(_SENTENCES[RouteFetchCode(reason.code)].format_map(values))
    return sentences
