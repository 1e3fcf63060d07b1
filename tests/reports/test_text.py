"""Text of strangers, and numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.reports.embed import content_security_policy, packed_json, script_json, script_text
from observatory.reports.text import (
    bytes_text,
    count,
    figure_label,
    figure_text,
    interval,
    microseconds,
    number,
    plain,
    shorten,
    unbroken,
)
from observatory.text import listing

HOSTILE = "</script><script>window.hit=1</script><a href=javascript:hit()>%{x}"


def test_markup_and_templates_of_plotly_are_taken_apart() -> None:
    text = figure_text("<b>a</b> & %{customdata}", 80)
    assert text == "&lt;b&gt;a&lt;/b&gt; &amp; &#37;{customdata}"


@given(st.text(max_size=300))
def test_no_text_brings_markup_into_a_figure(text: str) -> None:
    for made in (figure_text(text), figure_label(text).replace("<br>", "")):
        assert not set("<>") & set(made)
        assert "%{" not in made


@given(st.text(max_size=300))
def test_a_label_has_at_most_three_lines(text: str) -> None:
    assert figure_label(text).count("<br>") <= 2


@given(st.text(max_size=500), st.integers(min_value=5, max_value=80))
def test_shortened_text_fits_and_keeps_its_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    assert len(short) <= width
    assert short[:1] == plain(text)[:1]
    assert short[-1:] == plain(text)[-1:]


def test_direction_overrides_and_control_characters_are_made_visible() -> None:
    assert plain("a\u202eb\x00c\nd") == "a\ufffdb\ufffdc d"


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists, max_leaves=5))
def test_json_in_a_page_reads_back_as_it_was_and_ends_no_script(value: object) -> None:
    text = str(script_json({"value": value}))
    assert json.loads(text) == {"value": value}
    assert not set("<>&\u2028\u2029") & set(text)


def test_packed_json_holds_nothing_html_could_read() -> None:
    packed = str(packed_json([{"alt": HOSTILE}]))
    assert set(packed) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def test_a_script_that_would_end_its_element_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be put into a page"):
        script_text("let a = '</SCRIPT>';")


def test_the_policy_allows_the_given_script_and_no_other_source() -> None:
    policy = content_security_policy("alert(1)")
    # sha256 of "alert(1)" as openssl gives it
    assert "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (number(None), "n/a"),
        (number(float("nan")), "n/a"),
        (number(0.12345), "0.123"),
        (count(40960), "40\u202f960"),
        (interval(0.1, 0.25, 2), "0.10 to 0.25"),
        (interval(None, 0.2), "n/a"),
        (bytes_text(1536), "1.5 KiB"),
        (listing([]), "none"),
        (listing(["a", "b", "c"]), "a, b and c"),
        (listing(list("abcdef")), "a, b, c and 3 more"),
    ],
)
def test_numbers_read_well_and_missing_ones_are_never_zero(made: str, expected: str) -> None:
    assert made == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0.00 µs"), (7.25, "7.25 µs"), (183.4, "183 µs"), (4123.0, "4.12 ms"), (45_000.0, "45.0 ms"),
        (2.5e6, "2.50 s"), (1.2e14, "1.2e+08 s"), (None, "n/a"), (float("inf"), "n/a"), (-83.4, "−83.4 µs"),
    ],
)  # fmt: skip
def test_times_are_given_in_the_unit_that_reads_best(value: float | None, said: str) -> None:
    assert microseconds(value) == said


def test_differences_carry_their_sign() -> None:
    assert microseconds(143.0, signed=True) == "+143 µs"
    assert microseconds(-1280.0, signed=True) == "−1.28 ms"


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    assert unbroken("4 ms of 12.5 %, in 3 steps (2 s)") == "4\u00a0ms of 12.5\u00a0%, in 3 steps (2\u00a0s)"
