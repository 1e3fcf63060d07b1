"""How many devices: capacity plans that a report takes in addition to its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from observatory.advice.capacity.document import plan_tables
from observatory.reports.figures.plan import plan_plane
from observatory.reports.frames.plan import PlannedFile
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import Block, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.text import number, plain, shorten

_TITLE = "Capacity plan"
_NO_PLAN = "No plan was given: observatory plan RUN --target-tokens-per-s N --out FILE writes one."
#: Marks of a figure.
_MOST_MARKS = 2000


def plan_section(frames: ReportFrames) -> Section:
    """Set-ups that meet the targets of each plan, and what ruled out the others."""
    if not frames.plans:
        return Section(id="plan", title=_TITLE, reason=_NO_PLAN)
    blocks: list[Block] = []
    variants = tuple(_variant(file) for file in frames.plans if file.document["candidates"])
    if variants:
        blocks.append(
            FigureBlock(
                id="plan-plane",
                title="Throughput of a device against that of a user",
                caption="Every set-up and batch that meets all targets, with likely times. Right: each user "
                "gets tokens faster. Up: each device generates more. The cross is the set-up with the fewest "
                "devices, which is not always on the line, as devices come in whole instances.",
                choice="Plan",
                variants=variants,
            )
        )
    for file in frames.plans:
        blocks += _tables(file)
    unmet = tuple(_targets(file) for file in frames.plans if not file.document["candidates"])
    return Section(id="plan", title=_TITLE, lead=unmet, blocks=tuple(blocks))


def _targets(file: PlannedFile) -> str:
    targets, model = file.document["targets"], file.document["model"]
    limits = [
        f"at most {targets[name]:g} ms {what}"
        for name, what in (("max_ms_per_token", "per token"), ("max_ttft_ms", "to the first token"))
        if targets[name] is not None
    ]
    wanted = ", ".join([f"{targets['tokens_per_s']:,.0f} generated tokens/s", *limits])
    return plain(
        f"Targets of {shorten(file.path.name, 32)}: {wanted}, for prompts of {targets['context']} tokens and "
        f"{targets['output']} generated ones each, by {shorten(model['name'], 40)} with "
        f"{model['parameters'] / 1e9:.3g} billion weights and {file.document['routing']} routing."
    )


def _variant(file: PlannedFile) -> Variant:
    rows = file.document["candidates"][:_MOST_MARKS]
    best = rows[0]
    said = (
        f"{best['gpus']} devices ({best['gpus_low']} to {best['gpus_high']}; {best['hardware']}, "
        f"{best['set_up']}): "
        f"{number(best['tokens_per_s_user'], 1)} tokens/s of a user, "
        f"{number(best['tokens_per_s_gpu'], 0)} of a device{_energy(best)}."
    )
    first = plan_tables(file.document)[0]
    return Variant(
        group="plans",
        label=shorten(file.path.name, 32),
        figure=plan_plane(rows),
        alt=plain(f"Set-ups by throughput. The fewest devices: {said}"),
        note=f"{_targets(file)} {plain(f'The fewest devices: {said}')}",
        numbers=frame_table("Set-ups that meet every target", first.columns, first.rows),
    )


def _energy(best: Mapping[str, Any]) -> str:
    """Energy of a token with its grade, where the plan knows the power."""
    if best["joules_per_token"] is None:
        return ""
    of = ", power of a simulated device" if best["is_simulated"] else ""
    low, high = best["joules_per_token_low"], best["joules_per_token_high"]
    return (
        f", {best['joules_per_token']:.3g} J per token ({low:.3g} to {high:.3g}; {best['joules_grade']}{of})"
    )


def _tables(file: PlannedFile) -> list[Table]:
    tables = [table for table in plan_tables(file.document)[1:] if table.name in ("rejected", "routing")]
    captions = {"rejected": "What ruled out other set-ups", "routing": "What other routing leads to"}
    return [
        frame_table(f"{captions[table.name]} ({shorten(file.path.name, 32)})", table.columns, table.rows)
        for table in tables
    ]
