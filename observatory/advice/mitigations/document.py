"""The document and the tables of ``observatory advise``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from observatory.advice.conclusions.changes import is_off
from observatory.advice.mitigations.advise import Advice, PhaseAdvice, above_published
from observatory.advice.mitigations.verdict import MitigationCode, Premise, Verdict
from observatory.advice.mitigations.words import premise_words, reason_words
from observatory.analysis.columns import Column, Table
from observatory.analysis.statistics import Interval
from observatory.run.documents.printed import printed_document
from observatory.text import counted, listing, percent_words

COLUMNS = (
    Column(name="change", title="change", text=True, key=True),
    Column(name="setting", title="setting", text=True, otherwise=""),
    Column(
        name="step_us",
        title="step",
        unit="ms",
        scale=1e-3,
        legend="MoE part of a step: exchanges, busiest rank's experts and shared experts of all layers",
    ),
    Column(
        name="gain",
        title="gain",
        unit="%",
        digits=1,
        interval=("gain_low", "gain_high"),
        legend="share of today's time that it removes, with its 90 % interval over steps and model errors",
    ),
    Column(
        name="break_even_steps",
        title="pays after",
        unit="steps",
        digits=0,
        legend="steps until what moving the experts costs is won back",
    ),
    Column(name="verdict", title="verdict", text=True),
    Column(
        name="beyond",
        title="beyond placement",
        unit="%",
        digits=1,
        interval=("beyond_low", "beyond_high"),
        wide=True,
        legend="gain over the chosen placement without replicas, of expert caches over the first; "
        "verdicts on replicas and caches are about it",
    ),
    Column(name="p10_us", title="p10", unit="ms", scale=1e-3, wide=True),
    Column(name="p90_us", title="p90", unit="ms", scale=1e-3, wide=True),
    Column(name="counts_us", title="counts", unit="ms", scale=1e-3, wide=True),
    Column(name="dispatch_us", title="dispatch", unit="ms", scale=1e-3, wide=True),
    Column(name="experts_us", title="experts", unit="ms", scale=1e-3, wide=True),
    Column(name="waiting_us", title="waiting", unit="ms", scale=1e-3, wide=True),
    Column(name="combine_us", title="combine", unit="ms", scale=1e-3, wide=True),
    Column(name="memory_bytes", title="memory", unit="MB", scale=1e-6, digits=2, signed=True, wide=True),
    Column(name="kv_tokens", title="cache lost", unit="tokens", digits=0, wide=True),
    Column(
        name="change_us",
        title="costs once",
        unit="s",
        scale=1e-6,
        wide=True,
        legend="weights that the busiest rank receives, and the standstill",
    ),
    Column(
        name="energy_mj", title="energy", unit="mJ", wide=True, legend="of a step, by the power of its phase"
    ),
    Column(
        name="energy_saving",
        title="energy saved",
        unit="%",
        digits=1,
        interval=("energy_saving_low", "energy_saving_high"),
        wide=True,
    ),
    Column(
        name="extrapolated",
        title="outside",
        unit="%",
        digits=0,
        wide=True,
        legend="share of predictions outside what was measured",
    ),
    Column(name="how_far", title="how far", text=True, wide=True, otherwise=""),
    Column(name="rests_on", title="rests on", text=True, wide=True),
    Column(name="why", title="why", text=True, wide=True, otherwise=""),
)


def advice_document(advices: Sequence[tuple[str, Advice, Sequence[str]]]) -> dict[str, Any]:
    """What ``--json`` prints (docs/json.md).

    Args:
        advices: path of each run, what is advised, and problems of the run.
    """
    return printed_document(
        "advice",
        {"runs": [{"run": path, **_run(advice, problems)} for path, advice, problems in advices]},
    )


def advice_tables(document: Mapping[str, Any]) -> list[Table]:
    """One table per run and phase; with ``csv`` they have the same columns."""
    tables = []
    for run in document["runs"]:
        setup = run["setup"]
        where = f"{setup['ranks']} ranks, {setup['gpus_per_node']} on a node, {setup['algorithm']}"
        for phase in run["phases"]:
            title = (
                f"{run['run']}, {phase['phase']}: {where}; chosen on {phase['train_steps']} steps, judged on "
                f"{phase['judged_steps']}"
            )
            tables.append(Table(name="changes", columns=COLUMNS, rows=worded_rows(phase), title=title))
    return tables


def worded_rows(phase: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of a phase, of the phase as in the document."""
    return [
        {**row, "why": _why(row), "how_far": "; ".join(map(reason_words, row["extrapolated_by"]))}
        for row in phase["verdicts"]
    ]


def doubt_sentences(document: Mapping[str, Any]) -> list[str]:
    """What numbers rest on, and where that is weak: errors of models, parts left out, mock tokens."""
    sentences = []
    for run in document["runs"]:
        name = f"{run['run']}: " if len(document["runs"]) > 1 else ""
        sentences += [f"{name}{text}" for text in (*_model_doubts(run), *_phase_doubts(run))]
    return sentences


def _model_doubts(run: Mapping[str, Any]) -> Iterator[str]:
    experts, network = run["experts"], run["network"]
    if experts["median_error"] is not None:
        error = percent_words(experts["median_error"])
        yield f"expert times of {experts['source']}: off by {error} in the median on held-out points"
    else:
        yield f"expert times of {experts['source']}: {experts['grade']} rates, taken to be off by 30 %"
    if network is None:
        yield "no network model: exchanges are left out of all times; give --network"
    elif network["median_error"] is not None:
        unreliable = "" if network["verdict"] == "valid" else "; the fit is not to be relied on"
        error = percent_words(network["median_error"])
        of = f"exchange times of {network['source']}"
        yield f"{of}: off by {error} in the median on held-out matrices{unreliable}"
    setup, ran = run["setup"], run["ran"]
    measured = [] if network is None else network["hosts"]
    if measured and ran["hosts"] and not set(measured) & set(ran["hosts"]):
        yield (
            f"exchange times of {network['source']} are of another fabric: measured on "
            f"{listing(measured)}, the run was on {listing(ran['hosts'])}"
        )
    differs = [name for name in ("ranks", "gpus_per_node") if ran[name] not in (None, setup[name])]
    if ran["ranks"] > 1 and differs:
        yield (
            f"the set-up is not that of the run, which was on {ran['ranks']} ranks"
            + ("" if ran["gpus_per_node"] is None else f", {ran['gpus_per_node']} on a node")
        )
    if run["left_out"]:
        yield f"left out of all times, as not known: {', '.join(run['left_out'])} experts"
    if any(premise["holds"] is False for premise in run["premises"]):
        yield "tokens are not real text: mock tokens overstate imbalance; use real text"


def _phase_doubts(run: Mapping[str, Any]) -> Iterator[str]:
    for phase in run["phases"]:
        today = phase["verdicts"][0]
        if phase["measured_over_predicted"] is not None:
            measured, predicted = phase["measured_us"] / 1e3, today["step_us"] / 1e3
            doubt = (
                "; shares of a step are of the predicted one"
                if is_off(phase["measured_over_predicted"])
                else ""
            )
            yield (
                f"today's steps of {phase['phase']}: {predicted:.3g} ms predicted, {measured:.3g} ms "
                f"measured by spans{doubt}"
            )
        if run["network"] is not None and not phase["has_tokens"]:
            yield (
                f"too few sampled tokens of {phase['phase']}: rows that are sent once for several experts "
                "are estimated as if experts were chosen independently"
            )
        best = None if phase["best"] is None else phase["verdicts"][phase["best"]]
        if best is not None and best["premise"] is not None:
            premise = premise_words(best["premise"])
            yield f"premise of {_named(best)} in {phase['phase']}: {premise}"
        if today["energy_reason"] is not None and today["energy_reason"]["code"] != MitigationCode.NO_POWER:
            yield f"no energy of {phase['phase']}: {reason_words(today['energy_reason'])}"
        yield from _extrapolated(phase)
        for row in phase["verdicts"]:
            if row["verdict"] == "change" and row["above_published"] is not None:
                yield (
                    f"{row['change']} in {phase['phase']} gains more than was published for it "
                    f"({percent_words(row['above_published'])}): look at its parts (--wide)"
                )
                break
    if run["unsampled_ranks"]:
        ranks = listing([str(rank) for rank in run["unsampled_ranks"]])
        word = "rank" if len(run["unsampled_ranks"]) == 1 else "ranks"
        yield f"energy is that of sampled devices alone: those of {word} {ranks} were not"
    if all(_lacks_power(phase["verdicts"][0]) for phase in run["phases"]):
        yield "no energy: the run has no power samples (profile --power on)"
    yield from _in_use(run["in_use"])
    for skipped in run["skipped_phases"]:
        steps = counted(skipped["steps"], "step")
        yield f"{skipped['phase']} has {steps}, too few to choose and to judge on"


def _lacks_power(row: Mapping[str, Any]) -> bool:
    """Whether a row has no energy as nothing was sampled."""
    return row["energy_reason"] is not None and row["energy_reason"]["code"] == MitigationCode.NO_POWER


def _extrapolated(phase: Mapping[str, Any]) -> Iterator[str]:
    """How far predictions lie outside what was measured: of today, else of the best change or the first."""
    rows = phase["verdicts"]
    named_first = [rows[0], *([] if phase["best"] is None else [rows[phase["best"]]])]
    outside = [row for row in rows if row["extrapolated_by"]]
    if outside:
        first = next((row for row in named_first if row["extrapolated_by"]), outside[0])
        others = len(outside) - 1
        more = f"; and {others} other rows (--wide)" if others else ""
        yield (
            f"extrapolated in {phase['phase']}: {percent_words(first['extrapolated'])} of {_named(first)}, "
            f"{'; '.join(map(reason_words, first['extrapolated_by']))}{more}"
        )


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['change']} ({row['setting']})" if row["setting"] else str(row["change"])


def _in_use(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Standing committees and hardly used experts, as information."""
    experts = sum(layer["experts"] for layer in layers)
    members = sum(len(layer["committee"]) for layer in layers)
    rare = sum(len(layer["hardly_used"]) for layer in layers)
    if not members + rare:
        return
    has_mass = all(layer["mass_share"] is not None for layer in layers)
    basis = "load and gate mass" if has_mass else "load (gate mass was not captured: --gate-mass)"
    yield (
        f"for information, as without some of them it is another model: {members} of {experts} experts are "
        "standing committees of their layers (active in every step, always among the fewest with half of the "
        f"load), {rare} are hardly used by {basis}; `in_use` of --json names them"
    )


def missing_sentences(document: Mapping[str, Any]) -> list[str]:
    """Why changes have no number, each reason once: what would have to be measured, or cannot apply."""
    changes: dict[tuple[str, str], list[str]] = {}
    for run in document["runs"]:
        for phase in run["phases"]:
            for row in phase["verdicts"]:
                if row["step_us"] is None and row["reason"] is not None:
                    named = _named(row)
                    because = changes.setdefault((row["verdict"], reason_words(row["reason"])), [])
                    because += [] if named in because else [named]
    return [f"{code} ({reason}): {', '.join(names)}" for (code, reason), names in sorted(changes.items())]


def _run(advice: Advice, problems: Sequence[str]) -> dict[str, Any]:
    experts = advice.experts
    return {
        "problems": list(problems),
        "setup": advice.setup.model_dump(mode="json"),
        "ran": {
            "ranks": advice.ran.ep,
            "gpus_per_node": advice.ran.gpus_per_node,
            "hosts": list(advice.hosts),
        },
        "experts": {
            "source": experts.source,
            "grade": experts.grade,
            "form": experts.form.name,
            "median_error": experts.median_error,
            "p90_error": experts.p90_error,
        },
        "network": _network(advice),
        "model": advice.model,
        "horizon_steps": advice.horizon_steps,
        "premises": [_premise(premise) for premise in advice.premises],
        "left_out": list(advice.left_out),
        "least_used": [
            {"layer": use.layer, "share": len(use.hardly_used) / use.experts} for use in advice.in_use
        ],
        "unsampled_ranks": list(advice.unsampled_ranks),
        "in_use": [use.document() for use in advice.in_use],
        "skipped_phases": [{"phase": phase, "steps": steps} for phase, steps in advice.skipped],
        "phases": [
            {
                "phase": phase.phase,
                "train_steps": phase.steps[0],
                "judged_steps": phase.steps[1],
                "measured_us": phase.measured_us,
                "measured_over_predicted": _measured_over_predicted(advice, phase),
                "has_tokens": phase.has_tokens,
                "elsewhere": [{"phase": name, "gain": gain} for name, gain in phase.elsewhere.items()],
                "best": None if phase.best is None else phase.verdicts.index(phase.best),
                "verdicts": [_row(verdict) for verdict in phase.verdicts],
            }
            for phase in advice.phases
        ],
    }


def _measured_over_predicted(advice: Advice, phase: PhaseAdvice) -> float | None:
    """Of today's steps; None where not all of it is predicted or none was measured."""
    predicted_us = phase.verdicts[0].step_us
    if not phase.measured_us or not predicted_us or advice.network is None:
        return None
    return phase.measured_us / predicted_us


def _network(advice: Advice) -> dict[str, Any] | None:
    """What the fit of today's algorithm is good for; None without a network model."""
    if advice.network is None:
        return None
    fits = {fit.algorithm: fit for fit in advice.network.fits}
    fit = fits.get(advice.setup.algorithm)
    verdict = None if fit is None else fit.verdict
    return {
        "source": advice.network_source,
        "hosts": list(advice.network.hosts),
        "algorithms": sorted(fits),
        "verdict": None if verdict is None else verdict.code,
        "median_error": None if verdict is None else verdict.median_error,
        "p90_error": None if verdict is None else verdict.p90_error,
    }


def _row(verdict: Verdict) -> dict[str, Any]:
    parts = {f"{part}_us": verdict.parts_us.get(part) for part in _PARTS}
    return {
        "change": verdict.mitigation.value,
        "setting": verdict.setting,
        "verdict": verdict.code.value,
        "step_us": verdict.step_us,
        "p10_us": verdict.p10_us,
        "p90_us": verdict.p90_us,
        **parts,
        **dict(_ends("gain", verdict.gain)),
        **dict(_ends("beyond", verdict.beyond)),
        "memory_bytes": verdict.memory_bytes,
        "kv_tokens": verdict.kv_tokens,
        "change_us": verdict.change_us,
        "break_even_steps": verdict.break_even_steps,
        "energy_mj": verdict.energy_mj,
        "energy_covered": verdict.energy_covered,
        "energy_reason": None if verdict.energy_reason is None else verdict.energy_reason.document(),
        **dict(_ends("energy_saving", verdict.energy_saving)),
        **dict(_ends("slowdown", verdict.slowdown)),
        "extrapolated": verdict.extrapolated,
        "extrapolated_by": [reason.document() for reason in verdict.farthest],
        "above_published": above_published(verdict),
        "rests_on": ", ".join(verdict.grades),
        "premise": None if verdict.premise is None else _premise(verdict.premise),
        "reason": None if verdict.reason is None else verdict.reason.document(),
        "experts": [asdict(choice) for choice in verdict.experts],
    }


_PARTS = ("counts", "dispatch", "experts", "waiting", "combine", "alone", "extra")


def _premise(premise: Premise) -> dict[str, Any]:
    return {"holds": premise.holds, "reason": premise.reason.document()}


def _ends(name: str, interval: Interval | None) -> Iterator[tuple[str, float | None]]:
    yield name, None if interval is None else interval.value
    yield f"{name}_low", None if interval is None else interval.low
    yield f"{name}_high", None if interval is None else interval.high


def _why(row: Mapping[str, Any]) -> str:
    """Why a verdict has no number, and its premise with what the trace shows."""
    texts = reason_words(row["reason"]), premise_words(row["premise"])
    return "; ".join(filter(None, texts))
