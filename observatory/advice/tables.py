"""Tables of advice."""

from __future__ import annotations

from typing import Any

from observatory.advice.frequency import ClockAdvice, SeriesAdvice
from observatory.analysis.columns import Column, Table

#: Of `advice_table`.
ADVICE_COLUMNS = (
    Column(name="series", title="series", text=True, key=True),
    Column(name="behaviour", title="class", text=True),
    Column(name="reference_mhz", title="reference", unit="MHz", digits=0, legend="clock to compare with"),
    Column(name="reference_how", title="as", text=True, wide=True),
    Column(name="lock_mhz", title="lock to", unit="MHz", digits=0),
    Column(
        name="saving",
        title="saving",
        unit="%",
        digits=1,
        interval=("saving_low", "saving_high"),
        legend="of the energy, with its 90 % interval",
    ),
    Column(
        name="slowdown",
        title="slowdown",
        unit="%",
        digits=1,
        interval=("slowdown_low", "slowdown_high"),
    ),
    Column(
        name="reference_mj_per_token",
        title="before",
        unit="mJ/token",
        digits=2,
        wide=True,
        legend="energy at the reference",
    ),
    Column(name="mj_per_token", title="energy", unit="mJ/token", digits=2, wide=True),
    Column(
        name="edp_mhz",
        title="EDP",
        unit="MHz",
        digits=0,
        wide=True,
        legend="clock of the least energy times time; ED2P: times time squared",
    ),
    Column(name="ed2p_mhz", title="ED2P", unit="MHz", digits=0, wide=True),
    Column(name="lock_against_cap", title="lock or cap", text=True, wide=True),
    Column(name="verdict", title="verdict", text=True),
)

#: Words for verdicts that files hold under another name.
_VERDICTS = {"not told apart": "not distinguished"}


def advice_table(advice: ClockAdvice) -> Table:
    """One row per series."""
    title = (
        f"{advice.device.name or 'device'}: least energy for at most {100 * advice.max_slowdown:.1f} % "
        "more time"
    )
    rows = [_row(item) for item in advice.series]
    return Table(name="series", columns=ADVICE_COLUMNS, rows=rows, title=title)


def _row(item: SeriesAdvice) -> dict[str, Any]:
    choice = item.choice
    row: dict[str, Any] = {
        "series": item.title,
        "behaviour": item.behaviour.words,
        "reference_mhz": item.reference_mhz,
        "reference_how": item.reference_how,
        "reference_mj_per_token": item.reference_mj_per_token,
        "lock_mhz": choice.sm_clock_mhz if choice else None,
        "mj_per_token": choice.mj_per_token if choice else None,
        "edp_mhz": item.edp.sm_clock_mhz if item.edp else None,
        "ed2p_mhz": item.ed2p.sm_clock_mhz if item.ed2p else None,
        "lock_against_cap": _VERDICTS.get(item.lock_against_cap.verdict, item.lock_against_cap.verdict),
        "verdict": item.verdict,
    }
    for name in ("saving", "slowdown"):
        interval = getattr(choice, name) if choice else None
        row[name] = interval.value if interval else None
        row[f"{name}_low"] = interval.low if interval else None
        row[f"{name}_high"] = interval.high if interval else None
    return row


def advised_clocks(advice: ClockAdvice) -> list[float]:
    """The clocks to lock to, each once: the common one first, then each series' own."""
    clocks = [advice.common.sm_clock_mhz] if advice.common and advice.common.sm_clock_mhz else []
    return list(
        dict.fromkeys([*clocks, *(item.choice.sm_clock_mhz for item in advice.series if item.choice)])
    )
