"""Where the numbers come from: everything the manifests say, the formulas, how to do it again."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel

from observatory.reports.frames.report import ReportFrames, RunFacts
from observatory.reports.page import Section, Table, table
from observatory.reports.sections.overview import when
from observatory.reports.text import bytes_text, count, plain, shorten
from observatory.run.manifest import Manifest, Verified

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
        modules: table of the MoE layers.
        config: options of the run, indented JSON.
    """

    title: str
    pairs: tuple[tuple[str, str], ...]
    command: str
    modules: Table
    config: str


def run_table(frames: ReportFrames) -> Section:
    """One row per run."""
    rows = [
        [
            str(fact.run + 1),
            shorten(label),
            shorten(fact.condition),
            fact.manifest.state,
            plain(fact.path),
            count(fact.manifest.topology.ranks),
            _states(fact.manifest),
            when(fact.manifest.created_unix_s),
            plain(fact.manifest.git_sha or "not recorded")[:12],
        ]
        for fact, label in zip(frames.facts, frames.runs["label"], strict=True)
    ]
    return Section(
        id="provenance",
        title="Provenance",
        lead=("Recorded when the runs were made, not when this page was written.",),
        blocks=(
            table(
                "Runs in this report",
                [
                    "Run",
                    "Model",
                    "Condition",
                    "State",
                    "Directory",
                    "Ranks",
                    "Rank states",
                    "Created",
                    "Commit",
                ],
                rows,
                text=9,
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
    pairs += [("scheduler", _line(manifest.scheduler) if manifest.scheduler else "none recorded")]
    pairs += [(f"host {index + 1}", _line(host)) for index, host in enumerate(manifest.hosts)]
    pairs += [(f"device {index + 1}", _line(device)) for index, device in enumerate(manifest.devices)]
    pairs += [] if manifest.devices else [("devices", "none recorded")]
    pairs.append(
        ("software", ", ".join(f"{name} {version}" for name, version in sorted(manifest.software.items())))
    )
    pairs += [(f"rank {rank.rank}", _line(rank)) for rank in manifest.ranks]
    pairs += [("note", note) for note in manifest.notes]
    return RunRecord(
        title=f"{shorten(label, 60)} on {shorten(fact.condition)}",
        pairs=tuple((plain(name), plain(_value(value))) for name, value in pairs),
        command=plain(shlex.join(manifest.argv)),
        modules=_modules(manifest),
        config=json.dumps(manifest.config, indent=2, ensure_ascii=False) if manifest.config else "",
    )


def _fields(record: BaseModel) -> list[tuple[str, object]]:
    """Fields of a record and what a newer schema added to it."""
    names = [*type(record).model_fields, *(record.model_extra or {})]
    return [(name, getattr(record, name)) for name in names]


def _line(record: BaseModel) -> str:
    return ", ".join(f"{name} {value}" for name, value in _fields(record) if value is not None)


def _value(value: object) -> str:
    return "not recorded" if value is None or value == "" else str(value)


def _modules(manifest: Manifest) -> Table:
    return table(
        "MoE layers as found in the model",
        ["Layer", "Module", "Counts verified by", "Experts", "Top-k", "Shared experts", "Null experts"],
        [
            [
                str(layer.layer),
                plain(layer.module),
                plain(_verified(layer.verified)),
                count(layer.experts),
                "varies" if layer.top_k is None else str(layer.top_k),
                count(layer.shared_experts),
                count(layer.null_experts),
            ]
            for layer in manifest.model.moe_layers
        ],
        text=3,
    )


def _verified(verdict: Verified | None) -> str:
    if verdict is None:
        return "not recorded"
    by = "nothing" if verdict.by == "none" else verdict.by
    return by if verdict.reason is None else f"{by}: {verdict.reason}"
