"""The conclusion about changes of an expert-parallel set-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from observatory.advice.conclusions.reasons import NOTHING, Code, Conclusion, Row, chosen, command, worst_row
from observatory.reasons import Reason

#: Predicted and measured times that differ by more than this factor are not of the same thing.
_OFF = 1.25
#: Changes that keep a part of the experts on the device.
_CACHES = ("expert cache", "expert prefetch")
#: Verdicts on changes that would be faster but for something: what is stated, and what would have to be done.
_HELD_UP = {
    "does not fit": (Code.NO_MEMORY, Code.MORE_MEMORY),
    "far off": (Code.FAR_OFF, Code.FIT_AGAIN),
    "extrapolated": (Code.EXTRAPOLATED, Code.OTHER_FABRIC),
}
#: What is stated of a change that would gain, and of one that pays late.
_GAINING = ("change", "setting", "gain", "gain_low", "gain_high")
_PAYING = ("phase", "break_even_steps", "horizon_steps")


def conclude_advice(document: Row) -> Conclusion:
    """Of ``observatory advise``: the change that gains most, or what perfect balance alone would."""
    rows = [
        (run, phase, row) for run in document["runs"] for phase in run["phases"] for row in phase["verdicts"]
    ]
    needed = next((item for item in rows if item[2]["verdict"] == "needed"), None)
    if needed is not None:
        run, phase, row = needed
        caches = [other for other in phase["verdicts"] if other["change"] in _CACHES]
        better = [other for other in caches if other["verdict"] == "change"]
        row = max(better, key=lambda other: other["beyond"], default=row)
        place = {"run": run["run"], "ranks": run["setup"]["ranks"], **chosen(row, "change", "setting")}
        return (Reason(Code.DOES_NOT_FIT, place),)
    best = [item for item in rows if item[1]["best"] is not None and item[2] is _best(item[1])]
    held_up = [] if best else [item for item in rows if _is_held_up(item[2])]
    if held_up:
        run, phase, row = max(held_up, key=lambda item: item[2]["gain"])
        # As where nothing is in the way: of those that gain about as much, the simplest.
        least = max(row["gain_low"], row["gain"] / 2)
        alike = (other for other in phase["verdicts"] if _is_held_up(other) and other["gain"] >= least)
        return _conclude_held_up(run, phase, next(alike))
    locks = [row for _, _, row in rows if row["change"] == "clock lock" and row["verdict"] == "change"]
    if not best and locks:
        surest = max(locks, key=lambda row: row["energy_saving_low"])
        names = ("setting", "energy_saving", "energy_saving_low", "energy_saving_high", "slowdown")
        return (Reason(Code.CLOCK_SAVES, chosen(surest, *names)),)
    if not best:
        late = [
            {"phase": phase["phase"], "horizon_steps": run["horizon_steps"], **row}
            for run, phase, row in rows
            if row["verdict"] == "does not pay"
        ]
        if late:
            first = min(late, key=lambda row: row["break_even_steps"])
            return (*NOTHING, Reason(Code.PAYS_LATE, chosen(first, *_GAINING, *_PAYING)))
        balanced = [
            {"phase": phase["phase"], **row}
            for _, phase, row in rows
            if row["change"] == "perfect balance" and row["gain"] is not None
        ]
        most = worst_row(balanced, lambda row: row["gain"])
        shown = () if most is None else (Reason(Code.PERFECT_BALANCE, chosen(most, "phase", "gain")),)
        return (*NOTHING, *shown)
    run, phase, row = max(best, key=lambda item: item[2]["gain"])
    place = {"run": run["run"], "phase": phase["phase"], **chosen(row, "change", "setting")}
    place["of_several"] = len(document["runs"]) > 1
    gain = chosen(row, "gain", "gain_low", "gain_high", "break_even_steps")
    gain["cost_known"] = row["change_us"] is not None
    values = {
        **gain,
        "has_exchanges": run["network"] is not None,
        "elsewhere": phase["elsewhere"],
        "measured_over_predicted": phase["measured_over_predicted"],
        "energy_saved": _energy_saved(phase["verdicts"][0], row),
    }
    return (
        Reason(Code.BEST_CHANGE, place),
        Reason(Code.CHANGE_GAIN, values),
        *_next_of_change(run, phase, row),
    )


def is_off(measured_over_predicted: float | None) -> bool:
    """Whether steps took another time than predicted; False where that is not known."""
    ratio = measured_over_predicted
    return ratio is not None and max(ratio, 1 / ratio) > _OFF


def _is_held_up(row: Row) -> bool:
    """Whether a change on today's ranks would be faster, and something is in its way."""
    return row["verdict"] in _HELD_UP and row["change"] != "EP ranks"


def _conclude_held_up(run: Row, phase: Row, row: Row) -> Conclusion:
    """The change that would gain most, what is in its way, and what removes that."""
    what, then = _HELD_UP[row["verdict"]]
    ranks = run["setup"]["ranks"]
    because = {name: value for name, value in row["reason"].items() if name != "code"}
    place = {**because, "phase": phase["phase"], "ranks": ranks, **chosen(row, *_GAINING)}
    if what is Code.EXTRAPOLATED:
        place["outside"] = row["reason"]["code"]
    return (Reason(what, place), Reason(then, {"ranks": ranks}))


def _energy_saved(today: Row, row: Row) -> float | None:
    """Share of the energy of today's step that a change saves; None where either is not known."""
    before_mj, after_mj = today["energy_mj"], row["energy_mj"]
    return None if not before_mj or after_mj is None else 1.0 - float(after_mj / before_mj)


def _best(phase: Row) -> Row:
    best: Row = phase["verdicts"][phase["best"]]
    return best


def _next_of_change(run: Row, phase: Row, row: Row) -> Iterator[Reason]:
    """The command that makes the change, where there is one."""
    ranks, out = str(run["setup"]["ranks"]), ("--out", "placement.json")
    if row["change"] in ("placement", "placement, once per rank"):
        yield command("place", Path(run["run"]), "--ranks", ranks, "--phase", phase["phase"], *out)
    elif row["setting"].endswith(" replicas"):
        copies = ("--replicas", row["setting"].split()[0])
        yield command("place", Path(run["run"]), "--ranks", ranks, *copies, "--phase", phase["phase"], *out)
    elif row["change"] == "deduplication":
        yield command("profile", run["model"], "--ep", ranks, "--deduplicate", "--out", "RUN")
    elif row["change"] in ("flat", "hierarchical", "gather"):
        yield command("profile", run["model"], "--ep", ranks, "--algorithm", row["change"], "--out", "RUN")
