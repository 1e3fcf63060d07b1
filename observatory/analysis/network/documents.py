"""The documents of ``bench``, ``replay`` and ``fit``, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.network.network import NetworkModel
from observatory.run.documents.bench import BenchResult
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records
from observatory.run.usable_cores import share_document, short_of_cores

#: Of `bench_document`.
CASE_COLUMNS = (
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="pattern", title="pattern", text=True, key=True),
    Column(name="seed", title="seed", wide=True),
    Column(name="mean_send_bytes", title="size", unit="B", key=True, legend="mean bytes that a rank sends"),
    Column(name="median_us", title="time", unit="us"),
    Column(name="p10_us", title="p10", unit="us", wide=True, legend="of the repeats, as is p90"),
    Column(name="p90_us", title="p90", unit="us"),
    Column(name="algbw_gb_per_s", title="algbw", unit="GB/s"),
    Column(name="busbw_gb_per_s", title="busbw", unit="GB/s", legend="of the bytes that leave their rank"),
    Column(name="correct", title="correct", text=True),
)

#: Of `realism`.
REALISM_COLUMNS = (
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="phase", title="phase", text=True, key=True, otherwise="all"),
    Column(name="layer", title="layer", key=True, otherwise="all"),
    Column(name="role", title="role", text=True, key=True, otherwise="all"),
    Column(name="exchanges", title="pairs", wide=True, legend="exchanges of captured and uniform traffic"),
    Column(name="captured_us", title="captured", unit="us"),
    Column(name="uniform_us", title="uniform", unit="us"),
    Column(
        name="ratio",
        title="ratio",
        digits=2,
        interval=("ratio_low", "ratio_high"),
        legend="time of captured over uniform traffic, with its 90 % interval over steps",
    ),
    Column(
        name="extra_us",
        title="extra",
        unit="us",
        signed=True,
        interval=("extra_low_us", "extra_high_us"),
        wide=True,
        legend="what captured traffic takes more per exchange",
    ),
)

#: Of the fits' ``scores``.
FORM_COLUMNS = (
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="form", title="form", text=True, key=True),
    Column(name="parameters", title="parameters"),
    Column(
        name="weighted_error",
        title="weighted error",
        unit="%",
        digits=1,
        wide=True,
        legend="decides which form is chosen",
    ),
    Column(
        name="median_error",
        title="median error",
        unit="%",
        digits=1,
        legend="of predictions of held-out matrices",
    ),
    Column(name="p90_error", title="p90 error", unit="%", digits=1),
    Column(
        name="other_ranks_error",
        title="other ranks",
        unit="%",
        digits=1,
        legend="median error on numbers of ranks left out",
    ),
    Column(name="chosen", title="chosen", text=True),
)

#: Of the fits' ``held_out_ranks``.
RANKS_COLUMNS = (
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="ranks", title="ranks left out", key=True),
    Column(name="median_error", title="median error", unit="%", digits=1),
    Column(name="p90_error", title="p90 error", unit="%", digits=1),
    Column(name="median_ratio", title="predicted / measured", digits=2),
)

#: Of the fits' ``coefficients``.
TERM_COLUMNS = (
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="term", title="term", text=True, key=True),
    Column(
        name="us_per_unit",
        title="us per unit",
        interval=("low_us", "high_us"),
        legend="a unit is an exchange, a message or a byte; with its 90 % interval",
    ),
    Column(name="gb_per_s", title="GB/s"),
    Column(name="reason", title="why not", text=True, otherwise=""),
)

#: Of ``checked``.
CHECK_COLUMNS = (
    Column(name="result", title="result", text=True, key=True),
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="pattern", title="pattern", text=True, key=True),
    Column(name="exchanges", title="exchanges", wide=True),
    Column(name="median_error", title="median error", unit="%", digits=1),
    Column(name="p90_error", title="p90 error", unit="%", digits=1),
    Column(name="median_ratio", title="bias", digits=2, legend="predicted over measured, median"),
    Column(
        name="inside_interval",
        title="inside",
        unit="%",
        digits=0,
        legend="measurements inside the predicted 90 % interval",
    ),
    Column(
        name="extrapolated",
        title="extrapolated",
        unit="%",
        digits=0,
        wide=True,
        legend="exchanges outside what the model was fitted to",
    ),
    Column(
        name="through_misfits",
        title="misfits",
        unit="%",
        digits=0,
        wide=True,
        legend="exchanges through parts of the fabric that the model does not describe",
    ),
)


def bench_document(result: BenchResult) -> dict[str, Any]:
    """What a benchmark measured, as ``--json`` prints it (docs/json.md)."""
    rows = [
        {
            "algorithm": case.algorithm,
            "pattern": case.pattern,
            "seed": case.seed,
            "mean_send_bytes": int(case.bytes_PP.sum()) // case.ranks,
            "median_us": case.median_us,
            "p10_us": case.p10_us,
            "p90_us": case.p90_us,
            "algbw_gb_per_s": case.algbw_gb_per_s,
            "busbw_gb_per_s": case.busbw_gb_per_s,
            "correct": case.correct,
        }
        for case in result.cases
    ]
    content = {
        "backend": result.backend,
        "ranks": result.ranks,
        "node_of_rank": list(result.node_of_P),
        "timing": result.timing,
        "repeats": result.repeats,
        "notes": list(result.notes),
        "short_of_cores": [share_document(share) for share in short_of_cores(result.cores_P or ())],
        "rows": rows,
    }
    return printed_document("bench", content)


def bench_tables(document: dict[str, Any]) -> list[Table]:
    """The exchanges of a benchmark."""
    title = (
        f"all-to-all of {document['ranks']} ranks over {document['backend']}: last start to last end, median "
        f"of {document['repeats']}"
    )
    return [Table(name="rows", columns=CASE_COLUMNS, rows=document["rows"], title=title)]


def replay_document(result: BenchResult) -> dict[str, Any]:
    """What captured traffic costs, as ``--json`` prints it (docs/json.md).

    Raises:
        BenchmarkError: the result is no replay, or a captured matrix lacks its uniform companion.
    """
    from observatory.analysis.network.realism import realism

    content = {
        "run_id": result.run_id,
        "backend": result.backend,
        "ranks": result.ranks,
        "timing": result.timing,
        "notes": list(result.notes),
        "short_of_cores": [share_document(share) for share in short_of_cores(result.cores_P or ())],
        "rows": frame_records(realism(result)),
    }
    return printed_document("replay", content)


def replay_tables(document: dict[str, Any], model: str) -> list[Table]:
    """Captured against uniform traffic of a model's run."""
    title = (
        f"{model} on {document['ranks']} ranks over {document['backend']}: captured traffic against uniform "
        "traffic of equal volume"
    )
    return [Table(name="rows", columns=REALISM_COLUMNS, rows=document["rows"], title=title)]


def fit_document(model: NetworkModel, checked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A fitted network model, as ``--json`` prints it (docs/json.md).

    Args:
        model: the model.
        checked: rows of `error_summary`, with the name of their result as ``result``.
    """
    content = {
        "backend": model.backend,
        "notes": list(model.notes),
        "short_of_cores": [share_document(share) for share in model.short_of_cores],
        "fits": [item.model_dump(mode="json", exclude={"samples_BF", "ratio_Q"}) for item in model.fits],
        "checked": list(checked),
    }
    return printed_document("fit", content)


def fit_tables(document: dict[str, Any]) -> list[Table]:
    """Terms, tried forms, ranks left out and checks, those of all algorithms together."""
    about = "; ".join(
        f"{fit['algorithm']} over {document['backend']}: {fit['cases']} matrices, {fit['sharing']}"
        for fit in document["fits"]
    )
    scores = [
        {"algorithm": fit["algorithm"], **score, "chosen": score["form"] == fit["form"]}
        for fit in document["fits"]
        for score in fit["scores"]
    ]
    tables = [
        Table(
            name="coefficients",
            columns=TERM_COLUMNS,
            rows=_of_all(document, "coefficients"),
            title="terms of the chosen form",
        ),
        Table(name="scores", columns=FORM_COLUMNS, rows=scores, title=f"forms tried; {about}"),
        Table(
            name="held_out_ranks",
            columns=RANKS_COLUMNS,
            rows=_of_all(document, "held_out_ranks"),
            title="errors on a number of ranks that the fit did not see",
        ),
        Table(
            name="checked",
            columns=CHECK_COLUMNS,
            rows=document["checked"],
            title="predicted against measured, not in the fit",
        ),
    ]
    return [table for table in tables if table.rows]


def _of_all(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [{"algorithm": fit["algorithm"], **row} for fit in document["fits"] for row in fit[name]]
