"""Where the numbers come from: everything the manifests say, the formulas, how to do it again."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from observatory.analysis.columns import Column
from observatory.analysis.provenance.nodes import NODE_COLUMNS, common_facts, node_rows
from observatory.analysis.provenance.notices import wall_clock_ahead_ns
from observatory.reports.frames.report import ReportFrames, RunFacts
from observatory.reports.page import Section, Table, frame_table
from observatory.reports.sections.common import model_on
from observatory.reports.sections.overview import when
from observatory.reports.text import bytes_text, plain, shorten
from observatory.run.manifest import Manifest, RankStatus, Verified
from observatory.run.usable_cores import as_ranges

#: Entry of docs/metrics.md, by the name that sections use -> the formula in one line.
FORMULAS: tuple[tuple[str, str], ...] = (
    (
        "load",
        "assignments (token, expert) that an expert received; padding, null and shared experts are not "
        "counted",
    ),
    (
        "gini",
        "G = Σᵢ Σⱼ |lᵢ − lⱼ| / (2 E Σ l), exact, per layer; a model's value is the unweighted mean over "
        "its layers",
    ),
    (
        "gini_floor",
        "expected G of uniform routing of the same T tokens, top-K of E experts; close to "
        "√((1 − K/E) / (π μ)) with μ = T K / E",
    ),
    ("gini_excess", "G minus its floor"),
    ("gini_uniform_limit", "G that uniform routing exceeds in about one window of a thousand"),
    (
        "gini_low, gini_high",
        "block bootstrap over steps, 95 %, all layers of a model resampled together, centred on the value",
    ),
    (
        "expert_max_over_mean, rank_max_over_mean",
        "largest load over mean load; of experts, or of ranks after placement, never mixed",
    ),
    (
        "expert_max_over_mean_floor, rank_max_over_mean_floor",
        "expected largest over mean of uniform routing of the same tokens, an approximation",
    ),
    ("lorenz_curve", "share of assignments held by the least loaded share of experts"),
    ("cv, entropy_bits", "standard deviation over mean; −Σ p log₂ p of the shares, at most log₂ E"),
    (
        "Standing committee",
        "smallest set of experts that holds half of a layer's assignments; overlap of two sets as |A ∩ B| / "
        "|A ∪ B|, with that of random sets of the same sizes",
    ),
    (
        "Local routing consistency",
        "share of a segment's assignments that its own busiest experts serve, in the order of the text and "
        "in random order",
    ),
    (
        "Expert-parallel scan",
        "loads summed over the experts a rank would hold; placement and sources as stated with each figure",
    ),
    (
        "wait_s",
        "from a rank's arrival at an exchange to the last arrival of those it exchanges with, on one clock",
    ),
    (
        "step_us",
        "sum over layers of exchanges and of the busiest rank's experts, layout chosen on the first half of "
        "the steps, time predicted for the second",
    ),
    ("mj_per_token", "energy of the phase's stretches over the tokens it processed"),
    (
        "gpus",
        "devices of an instance × ⌈target tokens/s over those of an instance⌉, and those for prefill; "
        "tokens/s of an instance: its sequences over the likely time of a token",
    ),
    ("saving", "1 − energy per iteration over that at the reference clock"),
)


def formula_anchor(name: str) -> str:
    """Anchor of the entry that holds a name."""
    whole = next(names for names, _ in FORMULAS if name in names.split(", "))
    return "formula-" + "".join(char if char.isalnum() else "-" for char in whole.split(", ")[0].lower())


_RUNS = (
    Column(name="run", title="run"),
    Column(name="label", title="model", text=True),
    Column(name="condition", title="data", text=True),
    Column(name="state", title="state", text=True),
    Column(name="path", title="directory", text=True),
    Column(name="ranks", title="ranks"),
    Column(name="rank_states", title="states", text=True),
    Column(name="created", title="created", text=True),
    Column(name="commit", title="commit", text=True),
)
_LAYERS = (
    Column(name="layer", title="layer"),
    Column(name="module", title="module", text=True),
    Column(name="verified", title="counts verified by", text=True),
    Column(name="experts", title="experts"),
    Column(name="top_k", title="top-k", otherwise="varies"),
    Column(name="shared_experts", title="shared experts"),
    Column(name="null_experts", title="null experts"),
)

#: Manifest fields shown in words of their own; all others are shown as they are.
_SHOWN_APART = {
    "model",
    "data",
    "topology",
    "hosts",
    "devices",
    "scheduler",
    "software",
    "config",
    "argv",
    "ranks",
    "notes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Provenance of one run.

    Attributes:
        title: model and condition.
        pairs: (name, value) in reading order.
        command: the command line that made it, quoted for a shell; empty when not recorded.
        nodes: table of where the ranks ran; without rows where they do not state it.
        modules: table of the MoE layers.
        config: options of the run, indented JSON.
    """

    title: str
    pairs: tuple[tuple[str, str], ...]
    command: str
    nodes: Table
    modules: Table
    config: str


def run_table(frames: ReportFrames) -> Section:
    """One row per run."""
    rows = [
        {
            "run": fact.run + 1,
            "label": shorten(label),
            "condition": shorten(fact.condition),
            "state": fact.manifest.state,
            "path": fact.path,
            "ranks": fact.manifest.topology.ranks,
            "rank_states": _states(fact.manifest),
            "created": when(fact.manifest.created_unix_s),
            "commit": (fact.manifest.git_sha or "not recorded")[:12],
        }
        for fact, label in zip(frames.facts, frames.runs["label"], strict=True)
    ]
    return Section(
        id="provenance",
        title="Provenance",
        lead=("Recorded when the runs were made, not when this page was written.",),
        blocks=(
            frame_table(
                "Runs in this report",
                _RUNS,
                rows,
                below={"label": "condition", "ranks": "rank_states", "created": "commit"},
            ),
        ),
    )


def _states(manifest: Manifest) -> str:
    """``3 complete, 1 running``."""
    states = Counter(rank.state for rank in manifest.ranks)
    return ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "not recorded"


def provenance(frames: ReportFrames) -> list[RunRecord]:
    """Everything each manifest says."""
    return [_record(fact, str(label)) for fact, label in zip(frames.facts, frames.runs["label"], strict=True)]


def _record(fact: RunFacts, label: str) -> RunRecord:
    manifest = fact.manifest
    model, data, topology = manifest.model, manifest.data, manifest.topology
    pairs: list[tuple[str, object]] = [("directory", fact.path)]
    pairs += [(name, value) for name, value in _fields(manifest) if name not in _SHOWN_APART]
    pairs += [("created", when(manifest.created_unix_s)), ("ended", when(manifest.ended_unix_s))]
    pairs += [(f"model {name}", value) for name, value in _fields(model) if name != "moe_layers"]
    if model.expert_bytes is not None:
        pairs.append(("model expert size", bytes_text(model.expert_bytes)))
    pairs += (
        [(f"data {name}", value) for name, value in _fields(data)] if data else [("data", "not recorded")]
    )
    pairs += [(f"topology {name}", value) for name, value in _fields(topology)]
    facts = common_facts(manifest.ranks, manifest.scheduler)
    pairs += [("batch job", "none recorded")] if manifest.scheduler is None else []
    pairs += facts
    pairs += [(f"host {index + 1}", _line(host)) for index, host in enumerate(manifest.hosts)]
    pairs += [(f"device {index + 1}", _line(device)) for index, device in enumerate(manifest.devices)]
    pairs += [] if manifest.devices else [("devices", "none recorded")]
    pairs.append(
        (
            "software of rank 0",
            ", ".join(f"{name} {version}" for name, version in sorted(manifest.software.items())),
        )
    )
    pairs += _rank_lines(manifest.ranks)
    pairs.append(("cost of watching, measured by itself", _watching(manifest.ranks)))
    pairs += [
        ("mark", f"step {mark.step}, {when(mark.unix_s)}: {mark.name}")
        for status in manifest.ranks
        for mark in status.marks
    ]
    pairs += [("note", note) for note in manifest.notes]
    return RunRecord(
        title=model_on(label, fact.condition),
        pairs=tuple((plain(name), plain(_value(value))) for name, value in pairs),
        command=plain(shlex.join(manifest.argv)),
        nodes=frame_table(
            "Where the ranks ran",
            NODE_COLUMNS,
            node_rows(manifest.ranks, wall_clock_ahead_ns(manifest)),
            below={
                "nodes": "ranks",
                "machine": "memory_limit",
                "cores": "numa_nodes",
                "accelerators": "fabric",
                "others": "wall_clock",
            },
        ),
        modules=_modules(manifest),
        config=json.dumps(manifest.config, indent=2, ensure_ascii=False) if manifest.config else "",
    )


def _rank_lines(statuses: Sequence[RankStatus]) -> list[tuple[str, str]]:
    """What ranks state, those that state the same together; without what the table of nodes shows."""
    ranks_of: dict[str, list[int]] = {}
    for status in statuses:
        shown = () if status.provenance is None else ("host", "cores", "clock")
        line = _line(status, without=("rank", "provenance", "captured", "marks", "self_measured", *shown))
        ranks_of.setdefault(line, []).append(status.rank)
    return [
        (f"{'rank' if len(ranks) == 1 else 'ranks'} {as_ranges(ranks)}", line)
        for line, ranks in ranks_of.items()
    ]


def _watching(statuses: Sequence[RankStatus]) -> str:
    """What the watch cost the ranks: that of the rank with the largest share of its time."""
    measured = [
        (status.self_measured, status.rank) for status in statuses if status.self_measured is not None
    ]
    shares = [(item.share, item, rank) for item, rank in measured if item.share is not None and item.steps]
    if not shares:
        return "not measured: the run is of a schema before 1.7, of another writer, or captured no step"
    share, item, rank = max(shares, key=lambda found: found[0])
    return (
        f"{100 * share:.2g} % of the captured time on rank {rank}"
        f"{', the most of all ranks' if len(shares) > 1 else ''}: "
        f"hooks {1e3 * item.hook_s / item.steps:.3g} ms a step (compiled calls not timed), "
        f"ends of steps {1e3 * item.step_end_s / item.steps:.3g} ms a step; "
        f"writing thread {item.thread_cpu_s:.3g} s of processor time, "
        f"{bytes_text(item.bytes_written)} written"
    )


def _fields(record: BaseModel) -> list[tuple[str, object]]:
    """Fields of a record and what a newer schema added to it."""
    names = [*type(record).model_fields, *(record.model_extra or {})]
    return [(name, getattr(record, name)) for name in names]


def _line(record: BaseModel, *, without: Sequence[str] = ()) -> str:
    return ", ".join(
        f"{name} {value}"
        for name, value in _fields(record)
        if value not in (None, ()) and name not in without
    )


def _value(value: object) -> str:
    return "not recorded" if value is None or value == "" else str(value)


def _modules(manifest: Manifest) -> Table:
    return frame_table(
        "MoE layers as found in the model",
        _LAYERS,
        [
            {**layer.model_dump(), "verified": _verified(layer.verified)}
            for layer in manifest.model.moe_layers
        ],
    )


def _verified(verdict: Verified | None) -> str:
    if verdict is None:
        return "not recorded"
    by = "nothing" if verdict.by == "none" else verdict.by
    return by if verdict.reason is None else f"{by}: {verdict.reason}"
