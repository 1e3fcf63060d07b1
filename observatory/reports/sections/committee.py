"""Do a few experts hold half of the work, and are they the same ones on other data?"""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.frames.committees import committee_overlaps, committee_sizes
from observatory.reports.frames.report import ReportFrames, condition_order, each_row, phases_of
from observatory.reports.page import Cell, Section, Table, frame_table
from observatory.reports.sections.common import NO_LOADS, spread
from observatory.reports.text import number, percent, shorten
from observatory.run.documents.writing import frame_records

_NOT_RUN = Cell(text="–", detail="not run")
_PLACE = (Column(name="label", title="model", text=True), Column(name="phase", title="phase", text=True))
_WITH = (
    Column(name="same", title="same text, other steps", legend="even and odd steps"),
    Column(name="real", title="another real text", legend="all pairs"),
    Column(name="altered", title="altered text", legend="against each real one"),
    Column(name="mock", title="mock tokens", legend="against each real one"),
)
_LOCALITY = (
    Column(name="label", title="model", text=True),
    Column(name="condition", title="data", text=True),
    Column(name="phase", title="phase", text=True),
    Column(name="segments", title="segments", legend="per layer, below it the tokens of each"),
    Column(name="segment_tokens", title="tokens each"),
    Column(name="cached_experts", title="experts kept", legend="per segment"),
    Column(name="hit_share", title="served by them", unit="%", digits=1),
    Column(name="hit_share_shuffled", title="tokens in random order", unit="%", digits=1),
    Column(name="locality_gain", title="gain by locality", unit="%", digits=1),
)


def committee_section(frames: ReportFrames) -> Section:
    """Committee sizes, their overlap between conditions, and locality where tokens were sampled."""
    title, short = "A standing committee?", "Committees"
    sizes = committee_sizes(frames.loads)
    if sizes.empty:
        return Section(id="committee", title=title, short=short, reason=NO_LOADS)
    sizes = sizes.merge(frames.runs, on="run")
    overlaps = committee_overlaps(frames)
    lead = [
        "The committee of a layer is the smallest set of experts that holds half of its assignments "
        "(“Standing committee” under Methods). With equal loads it is half of all experts; the "
        f"smaller, the more concentrated. Layers here have {spread(sizes['experts'])} experts. Values are "
        "means over the model's MoE layers."
    ]
    if overlaps.empty:
        lead.append("No model here has a real text to compare committees on.")
    elif set(overlaps["with_kind"]) == {"same"}:
        lead.append(
            "Whether it stands on other data cannot be decided from one data condition per model. The second "
            "table compares even and odd steps of the same text (Jaccard index: 1 for the same experts, 0 "
            "for none in common), compared with chance."
        )
    else:
        lead.append(
            "Whether it stands is another question: the second table compares its members between data "
            "conditions (Jaccard index: 1 for the same experts, 0 for none in common). Compare "
            "each value with two others: chance, and “same text, other steps”, where only sampling and the "
            "progress of the text differ. Near the latter the same experts work on any data; near chance the "
            "data choose them; below chance different data have been given different experts."
        )
    if frames.locality.empty:
        lead.append("No run here holds token samples, so local routing consistency is not known.")
    return Section(
        id="committee",
        title=title,
        short=short,
        lead=tuple(lead),
        blocks=(
            _sizes(sizes),
            *(() if overlaps.empty else (_overlaps(overlaps),)),
            *(() if frames.locality.empty else (_locality(frames),)),
        ),
    )


def _sizes(sizes: pd.DataFrame) -> Table:
    conditions = condition_order(sizes)
    means = sizes.groupby(["phase", "label", "condition"], sort=False)[["size", "experts"]].mean()
    cells: dict[Hashable, Cell] = {
        row.Index: Cell(text=number(row.size, 1), detail=percent(row.size / row.experts, 0))
        for row in each_row(means)
    }
    columns = [Column(name=f"on {name}", title=shorten(name, 24)) for name in conditions]
    return frame_table(
        "Experts that hold half of the assignments",
        (*_PLACE, *columns),
        [
            {
                "label": shorten(label),
                "phase": phase,
                **{f"on {name}": cells.get((phase, label, name), _NOT_RUN) for name in conditions},
            }
            for phase in phases_of(sizes)
            for label in dict.fromkeys(sizes["label"])
        ],
        note="Mean over layers, whole window; below it the share of all experts.",
    )


def _overlaps(overlaps: pd.DataFrame) -> Table:
    kinds = [column for column in _WITH if column.name in set(overlaps["with_kind"])]
    groups = overlaps.groupby(["phase", "label", "with_kind"], sort=False)
    cells: dict[Hashable, Cell] = {
        row.Index: Cell(text=number(row.jaccard, 2), detail=f"chance {number(row.jaccard_chance, 2)}")
        for row in each_row(groups[["jaccard", "jaccard_chance"]].mean())
    }
    return frame_table(
        "Overlap of committees with those on real text",
        (*_PLACE, *kinds),
        [
            {
                "label": shorten(label),
                "phase": phase,
                **{kind.name: cells.get((phase, label, kind.name), _NOT_RUN) for kind in kinds},
            }
            for phase in phases_of(overlaps)
            for label in dict.fromkeys(overlaps["label"])
        ],
        note="Jaccard index per layer, then the mean over layers and pairs of conditions; no interval. "
        "Committees of the same text's even and odd steps rest on half of the tokens, so they overlap less "
        "than two whole windows of it would. Chance: two random sets of the same sizes, exact.",
    )


def _locality(frames: ReportFrames) -> Table:
    sampled = frames.locality[frames.locality["segments"] > 0].merge(frames.runs, on="run")
    groups = sampled.groupby(["label", "condition", "phase"], sort=False)
    means = groups[["hit_share", "hit_share_shuffled", "locality_gain"]].mean()
    ranges = groups[["segments", "segment_tokens", "cached_experts"]].max()
    return frame_table(
        "Local routing consistency",
        _LOCALITY,
        frame_records(means.join(ranges).reset_index()),
        note="From the sampled tokens alone: share of a segment's assignments that its own busiest experts "
        "serve (“Local routing consistency” under Methods), mean over layers. Only "
        "the gain is due to the order of the tokens.",
        below={"condition": "phase", "segments": "segment_tokens"},
    )
