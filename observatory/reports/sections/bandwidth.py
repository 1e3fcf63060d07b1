"""Benchmarked exchanges against their size, and the network model that was fitted to them."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.columns import Column, chosen
from observatory.analysis.network.documents import CASE_COLUMNS, FORM_COLUMNS
from observatory.analysis.network.features import BYTE_TERMS, FORMS, TERMS
from observatory.analysis.network.network import AlgorithmFit, Coefficient
from observatory.reports.figures.bandwidth import bandwidth_curves
from observatory.reports.frames.benchmarks import BenchmarkFrames
from observatory.reports.frames.report import each_group, each_row
from observatory.reports.page import Block, Cell, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.text import MISSING, bytes_text, count, microseconds, number, percent, plain, shorten
from observatory.run.documents.bench import BenchResult
from observatory.run.documents.writing import frame_records
from observatory.text import listing

_TITLE = "Bandwidth, latency and the fitted model"
_MOST_ROWS = 120
#: Columns of ``points`` as `bench_document` names them.
_NAMES = {
    "size_bytes": "mean_send_bytes",
    "us": "median_us",
    "algbw": "algbw_gb_per_s",
    "busbw": "busbw_gb_per_s",
}
_SIZES = (
    *chosen(CASE_COLUMNS, "algorithm", "seed", *_NAMES.values(), "p10_us", "p90_us"),
    Column(
        name="predicted_us",
        title="predicted",
        unit="us",
        interval=("low_us", "high_us"),
        otherwise="no model",
        legend="with its 90 % interval",
    ),
    Column(name="extrapolated", title="extrapolated", text=True, otherwise="-"),
)

_COEFFICIENTS = (
    Column(name="term", title="term", text=True),
    Column(name="us", title="microseconds", legend="per exchange, message, rank or MB"),
    Column(name="bandwidth", title="bandwidth", unit="GB/s"),
)

#: Words for reasons that files hold under another name.
_REASONS = {"not told apart from the terms before it": "not distinguished from the terms before it"}
_MEANING = Column(name="meaning", title="what it says", text=True)


def bandwidth_section(benchmarks: BenchmarkFrames) -> Section:
    """A figure per benchmark and pattern, and what was fitted."""
    variants = _variants(benchmarks)
    blocks: list[Block] = []
    if variants:
        blocks.append(
            FigureBlock(
                id="bandwidth-curves",
                title="Time and bus bandwidth against size",
                caption="Marks: median over repeats of the slowest rank's time. Bus bandwidth is the mean "
                "bytes of a rank over that time, times the share of bytes that leaves its rank: for equal "
                "splits nccl-tests' busbw. GB are 10⁹ bytes.",
                choice="Benchmark and splits",
                variants=variants,
            )
        )
    for given in benchmarks.files.networks:
        name = shorten(given.name, 32)
        for fit in given.document.fits:
            blocks += [_coefficient_table(name, given.document.backend, fit), _form_table(name, fit)]
    return Section(
        id="bandwidth",
        title=_TITLE,
        short="Bandwidth and model",
        lead=_lead(benchmarks),
        blocks=tuple(blocks),
    )


def _lead(benchmarks: BenchmarkFrames) -> tuple[str, ...]:
    lead: tuple[str, ...] = ()
    if benchmarks.files.bench:
        lead += (
            "Synthetic exchanges of known size and splits, every byte checked. Ranks start together; the "
            "time of an exchange runs from the last start to the last end.",
        )
    if not benchmarks.files.networks:
        return (*lead, "No network model was given: observatory fit makes one from these files (--network).")
    return (
        *lead,
        "An exchange lasts as long as its slowest rank: the model is a sum of terms per rank, of which the "
        "largest over the ranks counts. Several forms are fitted; the one that is chosen errs least on "
        "matrices that were left out of its fit, or hardly more with fewer coefficients. A coefficient "
        "that the measurements do not determine is not filled in.",
    )


def _variants(benchmarks: BenchmarkFrames) -> tuple[Variant, ...]:
    variants = []
    for (bench, pattern), points in each_group(benchmarks.points, ["bench", "pattern"]):
        sized = points[points["size_bytes"] > 0]
        if sized.empty:
            continue
        curves = benchmarks.curves[
            (benchmarks.curves["bench"] == bench) & (benchmarks.curves["pattern"] == pattern)
        ]
        variants.append(_variant(benchmarks, int(bench), str(pattern), sized, curves))
    return tuple(variants)


def _variant(
    benchmarks: BenchmarkFrames, bench: int, pattern: str, points: pd.DataFrame, curves: pd.DataFrame
) -> Variant:
    given = benchmarks.files.bench[bench]
    result = given.document
    ranks = f"{result.ranks} {'rank' if result.ranks == 1 else 'ranks'}"
    count_of = len(set(result.node_of_P))
    nodes = f"{count_of} {'node' if count_of == 1 else 'nodes'}"
    where = (
        f"{shorten(pattern, 24).capitalize()} splits, {ranks} on {nodes}, "
        f"{shorten(result.backend, 16)} ({shorten(given.name, 32)})"
    )
    best = next(each_row(points.sort_values("busbw", ascending=False)))
    return Variant(
        group=f"{shorten(given.name, 32)}: {ranks}, {shorten(result.backend, 16)}",
        label=f"{shorten(pattern, 24)}, {ranks}",
        figure=bandwidth_curves(points, curves),
        alt=f"Curves for {where}: from {microseconds(points['us'].min())} to "
        f"{microseconds(points['us'].max())}, bus bandwidth up to {number(best.busbw)} GB/s.",
        note=f"{where}. {_protocol(result)} Highest bus bandwidth {_gb(best.busbw)} at "
        f"{bytes_text(best.size_bytes)} a rank ({shorten(best.algorithm, 24)}).{_empty(benchmarks, bench)}"
        + _about_model(benchmarks, bench, points, curves),
        numbers=_numbers(points, where),
    )


def _protocol(result: BenchResult) -> str:
    rounds = f"{result.warmup} warm-up {'round' if result.warmup == 1 else 'rounds'}"
    return f"{result.repeats} repeats of {result.iterations} exchanges after {rounds}."


def _empty(benchmarks: BenchmarkFrames, bench: int) -> str:
    """What an exchange of nothing took."""
    nothing = benchmarks.points[
        (benchmarks.points["bench"] == bench) & (benchmarks.points["size_bytes"] == 0)
    ]
    latencies = [f"{microseconds(row.us)} ({shorten(row.algorithm, 24)})" for row in each_row(nothing)]
    return f" An empty exchange takes {listing(latencies)}." if latencies else ""


def _about_model(benchmarks: BenchmarkFrames, bench: int, points: pd.DataFrame, curves: pd.DataFrame) -> str:
    if not benchmarks.files.networks:
        return ""
    missing = [name for name in dict.fromkeys(points["algorithm"]) if name not in set(curves["algorithm"])]
    no_model = f" No model for {listing([shorten(name, 24) for name in missing])}." if missing else ""
    predicted = points.dropna(subset=["predicted_us"])
    if predicted.empty:
        return no_model
    error = ((predicted["predicted_us"] - predicted["us"]).abs() / predicted["us"]).median()
    network = benchmarks.files.networks[int(predicted["network"].iloc[0])]
    fitted_to_it = benchmarks.files.bench[bench].path.name in network.document.sources
    return (
        f"{no_model} Fitted model: {shorten(network.name, 32)}, median distance from these points "
        f"{percent(error)}; "
        + (
            "it was fitted to a file of this name."
            if fitted_to_it
            else "it was not fitted to a file of this name."
        )
    )


def _numbers(points: pd.DataFrame, where: str) -> Table:
    shown = points.sort_values(["algorithm", "size_bytes", "seed"]).head(_MOST_ROWS)
    return frame_table(where, _SIZES, frame_records(shown.rename(columns=_NAMES)))


def _gb(value: float) -> str:
    """Three digits that count: bandwidths here reach from kilobytes to hundreds of gigabytes."""
    return MISSING if pd.isna(value) else f"{value:.3g} GB/s"


def _coefficient_table(name: str, backend: str, fit: AlgorithmFit) -> Table:
    form = FORMS[fit.form]
    return frame_table(
        f"{shorten(fit.algorithm, 24)} over {shorten(backend, 16)}: the fitted coefficients ({name})",
        _COEFFICIENTS,
        [
            {
                "term": Cell(text=plain(item.term).replace("_", " "), detail=plain(TERMS.get(item.term, ""))),
                **dict(zip(("us", "bandwidth"), _value_cells(item), strict=True)),
            }
            for item in fit.coefficients
        ],
        note=f"Form {fit.form}: {form.meaning}. Small: 90 % bootstrap interval over matrices. MB are "
        "10⁶ bytes.",
    )


def _value_cells(item: Coefficient) -> tuple[Cell, Cell]:
    """The coefficient with its interval, and the bandwidth it means where it is one of bytes."""
    per_byte = item.term in BYTE_TERMS
    if item.us_per_unit is None:
        reason = _REASONS.get(item.reason or "", item.reason or "")
        return Cell(text=MISSING, detail=plain(reason)), Cell(text="–" if not per_byte else MISSING)
    scale = 1e6 if per_byte else 1.0
    low, high = item.low_us, item.high_us
    has_interval = low is not None and high is not None
    value = Cell(
        text=f"{item.us_per_unit * scale:.4g}",
        detail=f"{low * scale:.4g} to {high * scale:.4g}" if low is not None and high is not None else "",
    )
    if not per_byte:
        return value, Cell(text="–")
    if not item.us_per_unit > 0:
        return value, Cell(text=MISSING, detail="costs nothing measurable")
    ends = ""
    if has_interval and high:
        ends = f"{1e-3 / high:.3g} to {1e-3 / low:.3g}" if low else f"at least {1e-3 / high:.3g}"
    return value, Cell(text=f"{1e-3 / item.us_per_unit:.3g}", detail=ends)


def _form_table(name: str, fit: AlgorithmFit) -> Table:
    scores = sorted(fit.scores, key=lambda score: score.weighted_error)
    rows = [
        {
            **score.model_dump(),
            "meaning": FORMS[score.form].meaning if score.form in FORMS else None,
            "chosen": "chosen" if score.form == fit.form else "",
        }
        for score in scores
    ]
    has_other_ranks = any(score.other_ranks_error is not None for score in scores)
    return frame_table(
        f"{shorten(fit.algorithm, 24)}: the forms that were tried ({name})",
        (*FORM_COLUMNS, _MEANING),
        rows,
        note=f"{_basis(fit)} Errors are on matrices left out of the fit. Of the forms within one standard "
        "error of the smallest weighted error, the one with fewest coefficients is chosen.",
        leave_out=("algorithm",) if has_other_ranks else ("algorithm", "other_ranks_error"),
        folded=("meaning",),
    )


def _basis(fit: AlgorithmFit) -> str:
    domain = fit.domain
    low, high = domain.rank_bytes
    return (
        f"Fitted to {count(fit.cases)} matrices of {listing([str(ranks) for ranks in domain.ranks])} ranks "
        f"on {listing([str(nodes) for nodes in domain.nodes])} nodes, busiest rank {bytes_text(low)} to "
        f"{bytes_text(high)}; held out: {shorten(fit.sharing, 120)}."
    )
