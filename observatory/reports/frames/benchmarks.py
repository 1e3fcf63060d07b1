"""Frames about benchmarks, replays and network models: what the files of a report say about its runs.

``realism``   replay, run, and the columns of ``observatory.analysis.network.realism``
``checked``   network, replay (missing: the run's own exchanges), run, and the columns of
              ``check_predictions``; pattern is ``captured``, ``uniform`` or ``own``
``points``    bench, algorithm, pattern, seed, size_bytes, us, p10_us, p90_us, repeats, algbw, busbw (GB/s),
              leaving (share of the bytes that leave their rank), and network, predicted_us, low_us, high_us,
              extrapolated where a model of the backend knows the exchange
``curves``    bench, network, algorithm, pattern, leaving, size_bytes, us, low_us, high_us: the model between
              the points
``left_out``  network, replay, run, reason, exchanges: why there is no prediction

``replay``, ``bench``, ``network`` and ``run`` are positions among the files of that kind and among the runs.
A file that does not belong to the runs, or whose bytes arrived wrong, is left out and stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from observatory.analysis.network import NetworkModel, predict_us, realism
from observatory.analysis.network.checking import CHECK_COLUMNS, check_predictions
from observatory.analysis.network.run_exchanges import check_run_exchanges
from observatory.analysis.network.words import sentence
from observatory.errors import BenchmarkError, ExchangeError, ObservatoryError
from observatory.reports.frames.benchmark_files import BenchmarkFiles
from observatory.run import Run
from observatory.run.documents.bench import BenchCase, BenchResult

#: Replayed exchanges of one algorithm and pattern that are predicted, evenly chosen.
_MOST_CHECKED = 2000
#: Points of a model's curve between two measured sizes.
_BETWEEN = 3

_CHECKED = ("network", "replay", "run", *CHECK_COLUMNS)
_POINTS = (
    "bench", "algorithm", "pattern", "seed", "size_bytes", "us", "p10_us", "p90_us", "repeats", "algbw",
    "busbw", "leaving", "network", "predicted_us", "low_us", "high_us", "extrapolated",
)  # fmt: skip
_CURVES = (
    "bench", "network", "algorithm", "pattern", "leaving", "size_bytes", "us", "low_us", "high_us",
)  # fmt: skip
_LEFT_OUT = ("network", "replay", "run", "reason", "exchanges")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFrames:
    """Frames (columns in the module's docstring), the files they are from, and what was left out.

    Attributes:
        gaps: (name of a file, why it or a part of it is left out).
    """

    files: BenchmarkFiles
    realism: pd.DataFrame
    checked: pd.DataFrame
    points: pd.DataFrame
    curves: pd.DataFrame
    left_out: pd.DataFrame
    gaps: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Found:
    """What was collected so far."""

    realism: list[pd.DataFrame] = field(default_factory=list)
    checked: list[pd.DataFrame] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[tuple[str, str]] = field(default_factory=list)


def collect_benchmarks(runs: Sequence[Run], files: BenchmarkFiles) -> BenchmarkFrames | None:
    """Join the files with the runs; None when there are no files."""
    if not files:
        return None
    collected = _Found()
    for index, replay in enumerate(files.replays):
        _add_replay(collected, files, index, replay.name, replay.document, runs)
    for index, bench in enumerate(files.bench):
        _add_bench(collected, files, index, bench.name, bench.document)
    for index, network in enumerate(files.networks):
        for run_index, run in enumerate(runs):
            _add_own(collected, index, network.document, run_index, run)
    _state_idle_networks(collected, files)
    return BenchmarkFrames(
        files=files,
        realism=_joined(collected.realism, ("replay", "run", "algorithm", "phase", "layer", "role")),
        checked=_joined(collected.checked, _CHECKED).astype({"replay": "Int64", "layer": "Int64"}),
        points=pd.DataFrame(collected.points, columns=list(_POINTS)),
        curves=pd.DataFrame(collected.curves, columns=list(_CURVES)),
        left_out=pd.DataFrame(collected.left_out, columns=list(_LEFT_OUT)).astype({"replay": "Int64"}),
        gaps=tuple(collected.gaps),
    )


def _add_replay(
    collected: _Found, files: BenchmarkFiles, index: int, name: str, result: BenchResult, runs: Sequence[Run]
) -> None:
    """A replay and its run: what realism costs, and what the models predict for it."""
    ids = [run.manifest.run_id for run in runs]
    if result.run_id not in ids:
        of = "does not say of which run it is" if result.run_id is None else f"is of run {result.run_id}"
        collected.gaps.append((name, f"the replay {of}, which is none of the runs in this report: left out"))
        return
    wrong = _wrong(result)
    if wrong:
        collected.gaps.append((name, wrong))
        return
    run = ids.index(result.run_id)
    try:
        collected.realism.append(realism(result).assign(replay=index, run=run))
    except BenchmarkError as error:
        collected.gaps.append((name, f"captured and uniform traffic are not compared: {error}"))
    models = _models_of(files, result.backend)
    if files.networks and not models:
        collected.gaps.append((name, _other_backend(result.backend, files)))
    for network, model in models:
        for cases in _evenly_by_kind(result):
            try:
                checked = check_predictions(model, result.model_copy(update={"cases": tuple(cases)}))
            except (BenchmarkError, ExchangeError) as error:
                reason = {"reason": str(error), "exchanges": len(cases)}
                collected.left_out.append({"network": network, "replay": index, "run": run, **reason})
                continue
            collected.checked.append(checked.assign(network=network, replay=index, run=run))


def _add_bench(collected: _Found, files: BenchmarkFiles, index: int, name: str, result: BenchResult) -> None:
    """A benchmark's points, and the first model of its backend between them."""
    wrong = _wrong(result)
    if wrong:
        collected.gaps.append((name, wrong))
        return
    models = _models_of(files, result.backend)
    if files.networks and not models:
        collected.gaps.append((name, _other_backend(result.backend, files)))
    if len(models) > 1:
        shown = files.networks[models[0][0]].name
        collected.gaps.append(
            (name, f"several network models of {result.backend}: the curves are of {shown}")
        )
    series: dict[tuple[str, str, int], list[BenchCase]] = {}
    for case in result.cases:
        series.setdefault((case.algorithm, case.pattern, case.seed), []).append(case)
    drawn: set[tuple[str, str]] = set()
    for (algorithm, pattern, seed), cases in series.items():
        common = {"bench": index, "algorithm": algorithm, "pattern": pattern}
        for case in cases:
            point = {**common, "seed": seed, **_point(case)}
            if models:
                network, model = models[0]
                point |= {
                    "network": network,
                    **_predicted(model, case.bytes_PP, result, algorithm, case.role),
                }
            collected.points.append(point)
        # Splits of other seeds are other matrices: one curve would not be theirs.
        if models and (algorithm, pattern) not in drawn:
            drawn.add((algorithm, pattern))
            network, model = models[0]
            curve = _curve(model, cases, result)
            collected.curves += [{**common, "network": network, **place} for place in curve]


def _add_own(collected: _Found, network: int, model: NetworkModel, index: int, run: Run) -> None:
    """A run's own exchanges under one model; a run without any says nothing."""
    if not run.row_count("exchange"):
        return
    try:
        checked, reasons = check_run_exchanges(model, run)
    except ObservatoryError:
        return  # the sections on exchanges say that they cannot be read
    if len(checked):
        collected.checked.append(checked.assign(network=network, replay=None, run=index))
    collected.left_out += [
        {"network": network, "replay": None, "run": index, "reason": row.reason, "exchanges": row.exchanges}
        for row in reasons.itertuples()
    ]


def _state_idle_networks(collected: _Found, files: BenchmarkFiles) -> None:
    """Name the models with which nothing here was compared."""
    used = {int(frame["network"].iloc[0]) for frame in collected.checked if len(frame)}
    used |= {int(place["network"]) for place in collected.curves}
    for index, network in enumerate(files.networks):
        if index not in used:
            collected.gaps.append(
                (
                    network.name,
                    f"nothing in this report was measured over {network.document.backend} in a way that this "
                    "model knows: only its coefficients are shown",
                )
            )


def _models_of(files: BenchmarkFiles, backend: str) -> list[tuple[int, NetworkModel]]:
    return [
        (index, network.document)
        for index, network in enumerate(files.networks)
        if network.document.backend == backend
    ]


def _other_backend(backend: str, files: BenchmarkFiles) -> str:
    backends = ", ".join(sorted({network.document.backend for network in files.networks}))
    return f"measured over {backend}, the network models given are of {backends}: nothing is predicted for it"


def _wrong(result: BenchResult) -> str | None:
    """Why the times of a result mean nothing; None when every byte arrived where it belongs."""
    wrong = [case for case in result.cases if not case.correct]
    if not wrong:
        return None
    return (
        f"left out: {len(wrong)} of {len(result.cases)} exchanges delivered wrong bytes, so its times mean "
        "nothing; mend the fabric and measure again"
    )


def _evenly_by_kind(result: BenchResult) -> list[list[BenchCase]]:
    """Cases by algorithm and pattern, at most so many of each as are predicted."""
    kinds: dict[tuple[str, str], list[BenchCase]] = {}
    for case in result.cases:
        kinds.setdefault((case.algorithm, case.pattern), []).append(case)
    chosen = []
    for cases in kinds.values():
        places = np.linspace(0, len(cases) - 1, min(len(cases), _MOST_CHECKED)).round().astype(int)
        chosen.append([cases[place] for place in places])
    return chosen


def _point(case: BenchCase) -> dict[str, Any]:
    total = int(case.bytes_PP.sum())
    return {
        "size_bytes": total / case.ranks,
        "us": case.median_us,
        "p10_us": case.p10_us,
        "p90_us": case.p90_us,
        "repeats": len(case.rank_us_RP),
        "algbw": case.algbw_gb_per_s,
        "busbw": case.busbw_gb_per_s,
        "leaving": _leaving(case),
    }


def _leaving(case: BenchCase) -> float:
    """Share of the bytes that leave their rank; 0 for an empty exchange."""
    total = int(case.bytes_PP.sum())
    return 1 - int(np.trace(case.bytes_PP)) / total if total else 0.0


def _predicted(
    model: NetworkModel, bytes_PP: Any, result: BenchResult, algorithm: str, role: str | None
) -> dict[str, Any]:
    """Prediction of one exchange; missing where the model does not know such."""
    try:
        prediction = predict_us(model, bytes_PP, result.node_of_P, algorithm=algorithm, role=role)
    except (BenchmarkError, ExchangeError):
        return {}
    return {
        "predicted_us": prediction.us,
        "low_us": prediction.low_us,
        "high_us": prediction.high_us,
        "extrapolated": "; ".join(map(sentence, prediction.extrapolated)) or None,
    }


def _curve(model: NetworkModel, cases: Sequence[BenchCase], result: BenchResult) -> list[dict[str, Any]]:
    """The model at the measured sizes and between them: there, the next larger matrix scaled down."""
    sized = sorted(
        ((int(case.bytes_PP.sum()) / case.ranks, case) for case in cases if case.bytes_PP.any()),
        key=lambda pair: pair[0],
    )
    places: list[dict[str, Any]] = []
    before: float | None = None
    for size, case in sized:
        between = [] if before is None else np.geomspace(before, size, _BETWEEN + 2)[1:-1].tolist()
        for place in (*between, size):
            scaled_PP = np.rint(case.bytes_PP * (place / size)).astype(np.int64)
            predicted = _predicted(model, scaled_PP, result, case.algorithm, case.role)
            if predicted:
                ends = {name: predicted[name] for name in ("low_us", "high_us")}
                common = {"size_bytes": place, "leaving": _leaving(case)}
                places.append({**common, "us": predicted["predicted_us"], **ends})
        before = size
    return places


def _joined(frames: list[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(columns))
