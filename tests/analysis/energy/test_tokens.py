"""Tokens of a phase: those of the steps whose time is known, or a reason."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.tokens import count_tokens
from observatory.reasons import Reason
from observatory.run.manifest import DataSpec
from tests.analysis.energy.runs import codes

NO_ROUTING = pd.DataFrame(columns=["step", "window_steps", "phase", "source_rank", "tokens"])
DATA = DataSpec(condition="prose", batch_size=4, sequence_length=100)


def routed(*rows: tuple[int, int, str, int, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=NO_ROUTING.columns)


def test_tokens_are_those_of_the_rank_the_phase_and_the_steps_with_spans() -> None:
    rows = routed(
        (0, 1, "prefill", 0, 512),
        (1, 1, "decode", 0, 4),
        (2, 1, "decode", 0, 4),
        (3, 1, "decode", 0, 4),  # no span
        (1, 1, "decode", 1, 900),  # another rank
    )
    found = count_tokens("decode", 0, frozenset({1, 2}), rows, None)
    assert (found.kind, found.tokens, found.source) == ("output", 8, "routing rows")
    found = count_tokens("prefill", 0, frozenset({0}), rows, None)
    assert (found.kind, found.tokens) == ("input", 512)


def test_rows_of_several_steps_count_when_all_of_them_have_spans() -> None:
    rows = routed((0, 4, "decode", 0, 40), (4, 4, "decode", 0, 44))
    assert count_tokens("decode", 0, frozenset(range(8)), rows, None).tokens == 84
    cut = count_tokens("decode", 0, frozenset(range(6)), rows, None)
    assert cut.tokens is None
    assert cut.reason == Reason(EnergyCode.STEPS_WITHOUT_ROWS, {"missing": 2, "steps": 6})


def test_steps_without_routing_rows_leave_the_number_unknown() -> None:
    found = count_tokens("decode", 0, frozenset({1, 2}), routed((1, 1, "decode", 0, 4)), DATA)
    assert found.tokens is None
    assert "steps without routing rows" in codes(found.reason)


def test_a_row_that_claims_endless_steps_is_no_trouble() -> None:
    found = count_tokens("decode", 0, frozenset({1}), routed((1, 2**40, "decode", 0, 4)), None)
    assert found.tokens is None


def test_without_routing_rows_the_manifest_tells() -> None:
    steps = frozenset(range(5))
    assert count_tokens("prefill", 0, steps, NO_ROUTING, DATA).tokens == 5 * 4 * 100
    decode = count_tokens("decode", 0, steps, NO_ROUTING, DATA)
    assert (decode.tokens, decode.source) == (5 * 4, "manifest")
    trained = count_tokens("train_forward", 0, steps, NO_ROUTING, DATA)
    assert (trained.kind, trained.tokens) == ("processed", 2000)


def test_where_nothing_tells_there_is_a_reason_and_never_zero() -> None:
    for data in (None, DataSpec(condition="prose"), DataSpec(condition="prose", batch_size=4)):
        found = count_tokens("prefill", 0, frozenset({0}), NO_ROUTING, data)
        assert found.tokens is None
        assert found.reason
    empty = count_tokens("decode", 0, frozenset({1}), routed((1, 1, "decode", 0, 0)), DATA)
    assert empty.tokens is None
    assert "no tokens" in codes(empty.reason)


def test_a_number_of_tokens_that_cannot_be_is_refused_with_its_fields() -> None:
    data = DataSpec(condition="prose", batch_size=2**31, sequence_length=2**31)
    found = count_tokens("prefill", 0, frozenset({0}), NO_ROUTING, data)
    assert found.tokens is None
    assert "too many tokens" in codes(found.reason)
