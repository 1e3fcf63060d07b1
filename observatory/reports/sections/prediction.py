"""How well the fitted network model predicts exchanges that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from observatory.analysis.columns import Column, chosen
from observatory.analysis.exchange.document import LAYER_COLUMNS
from observatory.analysis.network.checking import errors_of
from observatory.analysis.network.comparison import compare_times
from observatory.analysis.network.documents import CHECK_COLUMNS
from observatory.analysis.network.words import misfit_sentence, verdict_sentence
from observatory.reports.figures.prediction import predicted_and_measured
from observatory.reports.frames.benchmarks import BenchmarkFrames
from observatory.reports.frames.report import ReportFrames, each_group, each_row
from observatory.reports.page import Block, Cell, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import model_on, phases_in, replay_name, run_choice, run_keys
from observatory.reports.text import count, microseconds, percent, plain, shorten, times
from observatory.run.documents.bench import BenchResult
from observatory.run.documents.writing import frame_records
from observatory.text import listing

_TITLE = "Measured against predicted"
#: What a row of ``checked`` is called.
PATTERN_NAMES = {"captured": "captured, replayed", "uniform": "uniform, replayed", "own": "own"}
#: Points of one picture; the numbers are of all.
_MOST_POINTS = 1500
_MOST_ROWS = 120
_MOST_MISFITS = 8
#: A model fitted longer before or after than this is said to be so.
_LONG_S = 2 * 3600.0
_TRAFFIC = Column(name="place", title="traffic and phase", text=True)
_MEASURED_IN = Column(name="place", title="measured in", text=True)
_MODEL = Column(name="model", title="model", text=True)
_VERDICTS = (
    _MODEL,
    Column(name="verdict", title="verdict", text=True, otherwise="not recorded"),
    Column(name="why", title="why", text=True),
)
_COMPARISONS = (
    _MEASURED_IN,
    Column(
        name="ratio",
        title="captured ÷ uniform, predicted",
        digits=2,
        interval=("low", "high"),
        legend="with its 90 % interval",
    ),
    Column(name="distinguished", title="distinguished", text=True),
)
_LEFT_OUT = (
    _MEASURED_IN,
    _MODEL,
    Column(name="reason", title="reason", text=True),
    Column(name="exchanges", title="exchanges"),
)
_PLACE = ["phase", "layer", "role"]
_KEYS = ["network", "replay", "run", "algorithm"]


def prediction_section(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Section:
    """A scatter per model and source of measurements, and a table of all errors."""
    variants = tuple(_variants(frames, benchmarks))
    left_out = _left_out_table(frames, benchmarks)
    if not variants and left_out is None:
        return Section(id="prediction", title=_TITLE)
    blocks: list[Block] = []
    if variants:
        blocks += [
            FigureBlock(
                id="prediction-scatter",
                title="Predicted against measured time of single exchanges",
                caption="One mark per exchange, both axes logarithmic and equal: on the line, the model is "
                "right; below it, the exchange took longer than predicted. Open marks lie outside what the "
                "model was fitted to. Upright lines: 90 % intervals of the predictions, cut off at the "
                "edge of the picture.",
                choice="Measured in",
                narrow=True,
                variants=variants,
            ),
            _error_table(frames, benchmarks),
            _verdict_table(benchmarks),
        ]
    compared = _apart_table(frames, benchmarks)
    blocks += [] if compared is None else [compared]
    blocks += [] if left_out is None else [left_out]
    return Section(
        id="prediction",
        title=_TITLE,
        short="Measured, predicted",
        lead=(
            "The network model (below) predicts every exchange from its traffic matrix and the ranks' nodes "
            "alone. Replayed exchanges begin together and last until their slowest rank is done. For the "
            "run's own exchanges, measured is what is left when waiting is taken off: from the last arrival "
            "to the last end. Bytes that had already gone when the last rank arrived are missing from that "
            "time, and ranks that have just computed are not as ready as those of a benchmark: these errors "
            "are not the model's alone.",
            "Error is |predicted − measured| ÷ measured. Bias is the median of predicted ÷ measured.",
        ),
        blocks=tuple(blocks),
    )


def _verdict_table(benchmarks: BenchmarkFrames) -> Table:
    """What each model is good for, and what of the fabric it does not describe."""
    rows: list[dict[str, Any]] = []
    for network in benchmarks.files.networks:
        model = network.document
        for fit in model.fits:
            said = [
                verdict_sentence(fit, model.backend),
                *(misfit_sentence(one) for one in fit.misfits[:_MOST_MISFITS]),
            ]
            more = len(fit.misfits) - _MOST_MISFITS
            said += [f"{more} more parts that differ are in the file"] if more > 0 else []
            rows.append(
                {
                    "model": Cell(text=shorten(network.name, 32), detail=shorten(fit.algorithm, 24)),
                    "verdict": None if fit.verdict is None else fit.verdict.code.replace("_", " "),
                    "why": Cell(text=plain(". ".join(said))),
                }
            )
    return frame_table("Whether the models hold", _VERDICTS, rows)


def _apart_table(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Table | None:
    """Whether the models distinguish captured from uniform traffic of one replay."""
    rows: list[dict[str, Any]] = []
    replayed = benchmarks.checked[benchmarks.checked["replay"].notna()]
    for key, group in each_group(replayed, [*_KEYS, "phase"]):
        network, replay, run, algorithm, phase = key
        us = group.groupby("pattern")["predicted_us"].sum()
        if not {"captured", "uniform"} <= set(us.index) or not us.min() > 0:
            continue
        ranks = benchmarks.files.replays[int(replay)].document.ranks
        model = benchmarks.files.networks[int(network)]
        compared = compare_times(
            model.document.of(str(algorithm)),
            float(us["captured"]),
            float(us["uniform"]),
            ranks=(ranks, ranks),
            same_ranks=True,
        )
        rows.append(
            {
                "place": Cell(
                    text=f"{_source(frames, benchmarks, replay, int(run))}, {shorten(phase, 24)}",
                    detail=f"{shorten(algorithm, 24)}, by {shorten(model.name, 32)}",
                ),
                "ratio": compared.ratio,
                "low": compared.low,
                "high": compared.high,
                "distinguished": {"apart": "yes", "within_error": "no", "unknown": "error not known"}[
                    compared.code
                ],
            }
        )
    if not rows:
        return None
    return frame_table(
        "Whether predicted times distinguish captured from uniform traffic",
        _COMPARISONS,
        rows,
        note="The interval is that of the ratio: what the model gets wrong about both alike does not "
        "count. A difference within it is none.",
    )


def _variants(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Iterator[Variant]:
    shown = benchmarks.checked[benchmarks.checked["pattern"] != "uniform"]
    for key, rows in each_group(shown, _KEYS):
        network, replay, run, algorithm = key
        of_run = frames.runs.iloc[int(run)]
        label, condition = of_run["label"], of_run["condition"]
        source = _source(frames, benchmarks, replay, int(run))
        model = benchmarks.files.networks[int(network)]
        where = f"{source}, {shorten(algorithm, 24)}, predicted by {shorten(model.name, 32)}"
        drawn = rows.iloc[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_POINTS)).round().astype(int)]
        kind = "own exchanges" if pd.isna(replay) else "replayed"
        yield Variant(
            group=shorten(label),
            label=f"{run_choice(label, condition, kind)} · {shorten(algorithm, 24)}"
            + (f" · {shorten(model.name, 24)}" if len(benchmarks.files.networks) > 1 else ""),
            keys=run_keys(label, condition),
            figure=predicted_and_measured(drawn),
            alt=f"Scatter of {len(drawn)} exchanges for {where}: median error "
            f"{percent(errors_of(rows)['median_error'])}, times from "
            f"{microseconds(rows['measured_us'].min())} to {microseconds(rows['measured_us'].max())}.",
            note=f"{where}. {_sentences(rows)}"
            + (f" {len(drawn)} of {len(rows)} exchanges are drawn." if len(drawn) < len(rows) else "")
            + _reservations(benchmarks, int(network), replay, frames, int(run)),
            numbers=_numbers(rows, where),
        )


def _source(frames: ReportFrames, benchmarks: BenchmarkFrames, replay: Any, run: int) -> str:
    if not pd.isna(replay):
        return f"Replay of {replay_name(frames, benchmarks, int(replay))}"
    label, condition, ranks = frames.runs.loc[run, ["label", "condition", "ranks"]]
    return f"Own exchanges of {model_on(label, condition)}, {ranks} ranks"


def _sentences(rows: pd.DataFrame) -> str:
    sentences = []
    for phase in phases_in(rows):
        of_phase = rows[rows["phase"] == phase]
        errors = errors_of(of_phase)
        outside = errors["extrapolated"]
        sentences.append(
            f"{shorten(phase, 24).capitalize()}: median error {percent(errors['median_error'])}, 90th "
            f"percentile {percent(errors['p90_error'])}, bias {times(errors['median_ratio'])}, "
            f"{percent(errors['inside_interval'], 0)} of {count(len(of_phase))} exchanges inside the interval"
            + (f", {percent(outside, 0)} extrapolated" if outside else "")
            + (
                f", {percent(errors['through_misfits'], 0)} through what the model does not describe"
                if errors["through_misfits"]
                else ""
            )
            + "."
        )
    return " ".join(sentences)


def _reservations(
    benchmarks: BenchmarkFrames, network: int, replay: Any, frames: ReportFrames, run: int
) -> str:
    """What makes these errors look better or worse than the model is."""
    model = benchmarks.files.networks[network].document
    text = ""
    doubted = [fit for fit in model.fits if fit.verdict is not None and fit.verdict.code != "valid"]
    if doubted:
        text += " The verdict of its fit is that it is not to be relied on (table below)."
    if pd.isna(replay):
        hosts = {host.name for host in frames.facts[run].manifest.hosts}
        measured_unix_s = frames.facts[run].manifest.created_unix_s
    else:
        given = benchmarks.files.replays[int(replay)]
        hosts = _hosts(given.document)
        measured_unix_s = given.document.created_unix_s
        if given.path.name in model.sources:
            text += (
                f" The model was fitted to a file of this name ({shorten(given.path.name, 32)}): these are "
                "not errors on traffic that it had not seen."
            )
    apart_s = abs(model.created_unix_s - measured_unix_s)
    if _LONG_S < apart_s < np.inf:
        when = "after" if model.created_unix_s > measured_unix_s else "before"
        text += (
            f" The model was fitted {_duration(apart_s)} {when} this was measured, perhaps in another state "
            "of the machine."
        )
    fitted = set(model.hosts)
    if hosts and fitted and not hosts & fitted:
        text += f" Measured on {_names(hosts)}, the model was fitted on {_names(fitted)}."
    return text


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def _hosts(result: BenchResult) -> set[str]:
    return {host.name for host in result.hosts}


def _names(hosts: set[str]) -> str:
    return listing([shorten(host, 32) for host in sorted(hosts)])


def _error_table(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Table:
    rows = []
    for key, group in each_group(benchmarks.checked, [*_KEYS, "pattern"]):
        network, replay, run, algorithm, pattern = key
        for phase in phases_in(group):
            what = f"{PATTERN_NAMES.get(str(pattern), shorten(pattern, 24))}, {shorten(phase, 24)}"
            where = [shorten(frames.runs.loc[int(run), "label"]), shorten(algorithm, 24)]
            if len(benchmarks.files.replays) > 1 and not pd.isna(replay):
                where.append(shorten(benchmarks.files.replays[int(replay)].name, 32))
            if len(benchmarks.files.networks) > 1:
                where.append(f"by {shorten(benchmarks.files.networks[int(network)].name, 32)}")
            place = Cell(text=what, detail=", ".join(where))
            rows.append({"place": place, **errors_of(group[group["phase"] == phase])})
    return frame_table(
        "How far off the predictions are",
        (_TRAFFIC, *(column for column in CHECK_COLUMNS if not column.key)),
        rows,
        note="Own: the run's own exchanges, waiting taken off. A 90 % interval that is right holds nine of "
        "ten measurements.",
    )


def _left_out_table(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Table | None:
    keys = ["network", "replay", "run", "reason"]
    counts = benchmarks.left_out.groupby(keys, sort=False, dropna=False)["exchanges"].sum().reset_index()
    rows = [
        {
            "place": _source(frames, benchmarks, row.replay, int(row.run)),
            "model": shorten(benchmarks.files.networks[int(row.network)].name, 32),
            "reason": row.reason,
            "exchanges": row.exchanges,
        }
        for row in each_row(counts)
    ]
    if not rows:
        return None
    return frame_table("Exchanges without a prediction, and why", _LEFT_OUT, rows)


def _numbers(rows: pd.DataFrame, where: str) -> Table:
    groups = list(each_group(rows.sort_values(["layer", "role"], ascending=[True, False]), _PLACE))
    shown = [
        {
            **dict(zip(_PLACE, place, strict=True)),
            **errors_of(group),
            "measured_us": group["measured_us"].median(),
            "predicted_us": group["predicted_us"].median(),
        }
        for place, group in groups[:_MOST_ROWS]
    ]
    return frame_table(
        f"{where}: by layer, medians of one exchange",
        (
            *chosen(LAYER_COLUMNS, *_PLACE),
            *chosen(CHECK_COLUMNS, "exchanges"),
            Column(name="measured_us", title="measured", unit="us"),
            Column(name="predicted_us", title="predicted", unit="us"),
            *chosen(CHECK_COLUMNS, "median_error", "p90_error"),
        ),
        frame_records(pd.DataFrame(shown)),
        note=f"{len(groups) - _MOST_ROWS} more rows are left out." if len(groups) > _MOST_ROWS else "",
    )
