"""Conclusions about routes and fetches in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from observatory.advice.route_fetch import RouteFetchCode
from observatory.reasons import Reason
from observatory.text import percent_words

#: A part of a saving that is named.
_PART = 0.1
_SENTENCES = {
    RouteFetchCode.FETCH_FROM: "{shape}: at size {size:.0f} fetching costs less from {rows:.0f} rows on "
    "({rows_low:.0f} to {end}), routing below",
    RouteFetchCode.ALWAYS_ROUTE: "{shape}: at size {size:.0f} routing costs less for any number of rows",
    RouteFetchCode.ALWAYS_FETCH: "{shape}: at size {size:.0f} fetching costs less for any number of rows",
    RouteFetchCode.UNRELIABLE: "{shape}: do not rely on these costs: of {options} the faster was picked at "
    "{right_apart} of {apart} held-out points",
    RouteFetchCode.MEASURE_AGAIN: "next: measure again with more --repeats on a quiet machine",
    RouteFetchCode.SEND_ALL: "send all tokens: to fetch weights of an expert shortens no step{copies_too}",
    RouteFetchCode.CHANGE: "{what}, all layers together: on steps that were not used to choose that "
    "saves {share} of the {today_us:.0f} us of a step: {saved_us:.0f} us "
    "({saved_us_low:.0f} to {saved_us_high:.0f}){computed}",
    RouteFetchCode.UNCERTAIN: "send all tokens: to {what} saves {saved_us:.0f} us of {today_us:.0f} on steps "
    "that were not used to choose ({saved_us_low:.0f} to {saved_us_high:.0f}), which may be nothing",
    RouteFetchCode.KEEP_COST: "kept copies take {keep_mib:.2g} MiB on every rank; steps until bringing them "
    "there has paid: {break_even_steps}",
    RouteFetchCode.BREAK_EVEN: "the busiest expert has {busiest_tokens:.0f} tokens in a step; on {ranks} "
    "ranks its weights take less time to move than its tokens from {break_even} tokens on",
    RouteFetchCode.RANKS_NOT_MEASURED: "the constants were measured on {measured_ranks} ranks; times on "
    "{ranks} are extrapolated",
    RouteFetchCode.SIZES_NOT_MEASURED: "the busiest expert's tokens or weights are {beyond:.2g} times beyond "
    "what was measured: times are extrapolated",
    RouteFetchCode.OTHER_HOSTS: "the run was on {run}, the constants were measured on {measured}: they are "
    "those of another fabric",
    RouteFetchCode.WITHOUT_COMPUTE: "{source} says nothing about the experts' own time, which is left out",
}


def _what(fetched: int, kept: int) -> str:
    """Experts to fetch and to keep, in words."""
    parts = {"fetch the weights of {}": fetched, "keep copies of {} on every rank": kept}
    return " and ".join(
        text.format(f"{number} {'expert' if number == 1 else 'experts'}")
        for text, number in parts.items()
        if number
    )


def route_fetch_sentences(verdict: Sequence[Reason]) -> list[str]:
    """A verdict in words."""
    sentences = []
    for reason in verdict:
        values: dict[str, Any] = dict(reason.values)
        if "rows_high" in values:
            values["end"] = "any number" if values["rows_high"] is None else f"{values['rows_high']:.0f}"
        if "copies" in values:
            values["copies_too"] = (
                ", nor does a copy on every rank" if values["copies"] else "; copies take --copies"
            )
        if "today_us" in values:
            values["what"] = _what(values["fetched"], values["kept"])
            experts_us = values["saved_experts_us"]
            moved_us = values["saved_us"] - experts_us
            values["computed"] = (
                f"; experts {experts_us:.0f} us less, as all ranks compute these, "
                f"exchanges {abs(moved_us):.0f} us {'less' if moved_us >= 0 else 'more'}"
                if experts_us > _PART * values["saved_us"]
                else ""
            )
            values["share"] = percent_words(values["saved_us"] / max(values["today_us"], 1e-9))
            values |= {name: round(values[name]) for name in ("saved_us", "saved_us_low")}  # never -0
        if "keep_bytes" in values:
            values["keep_mib"] = values["keep_bytes"] / (1 << 20)
        if "break_even_tokens" in values:
            tokens = values["break_even_tokens"]
            values["break_even"] = "no number of" if tokens is None else f"{tokens:.0f}"
        sentences.append(_SENTENCES[RouteFetchCode(reason.code)].format_map(values))
    return sentences
