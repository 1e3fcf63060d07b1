"""The document of ``observatory history`` and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.compare.change_points import FALSE_ALARMS
from observatory.analysis.compare.history import History, Track
from observatory.analysis.compare.metrics import METRICS
from observatory.analysis.compare.words import CompareCode, sentence
from observatory.reasons import Reason
from observatory.run.documents.printed import printed_document
from observatory.text import listing

#: Layers that a table shows at most.
_MOST_LAYERS = 12

CHANGE_COLUMNS = (
    Column(name="name", title="metric", text=True, key=True),
    Column(name="layer", title="layer", key=True, otherwise="all"),
    Column(name="at_text", title="from", text=True),
    Column(name="when", title="start", text=True, otherwise="", wide=True),
    Column(name="before", title="before"),
    Column(name="after", title="after"),
    Column(name="relative", title="change", unit="%", digits=1, signed=True),
    Column(name="adjusted_p", title="adjusted p", digits=4),
)
LEGEND = (
    "before and after: medians of the points; of series without a change at most "
    f"{100 * FALSE_ALARMS:.0f} % show one"
)


def history_document(
    histories: Sequence[History], *, left_out: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Series and their changes, as ``--json`` prints it (docs/json.md).

    Args:
        histories: the series.
        left_out: runs that could not be read, and why.
    """
    return printed_document(
        "history",
        {
            "false_alarms": FALSE_ALARMS,
            "left_out": [{"name": name, "why": why} for name, why in left_out],
            "series": [_series_document(history) for history in histories],
        },
    )


def _series_document(history: History) -> dict[str, Any]:
    return {
        "name": history.name,
        "of": history.kind,
        "order_by": history.order_by,
        "points": [{"name": point.name, "order": point.order} for point in history.points],
        "tracks": [_track_document(track, history) for track in history.tracks],
        "layers": [_track_document(track, history) for track in history.layers],
        "changes": [
            {**change, "name": track.key.name, "layer": track.key.layer, "ep": track.key.ep}
            for track in (*history.tracks, *history.layers)
            for change in _track_document(track, history)["changes"]
        ],
    }


def _track_document(track: Track, history: History) -> dict[str, Any]:
    return {
        "name": track.key.name,
        "phase": track.key.phase,
        "metric": track.key.metric,
        "unit": METRICS[track.key.metric].unit,
        "layer": track.key.layer,
        "ep": track.key.ep,
        "at": track.at_N.tolist(),
        "values": track.value_N.tolist(),
        "p": track.p,
        "adjusted_p": track.adjusted_p,
        "reason": None if track.reason is None else _reason_document(track.reason),
        "changes": [
            {
                "at": change.at,
                "from": history.points[change.at].name,
                "order": history.points[change.at].order,
                "before": change.before,
                "after": change.after,
                "relative": (change.after - change.before) / change.before if change.before > 0 else None,
                "adjusted_p": track.adjusted_p,
                "also_changed": [_reason_document(fact) for fact in change.facts],
            }
            for change in track.changes
        ],
    }


def _reason_document(reason: Reason) -> dict[str, Any]:
    return {**reason.document(), "sentence": sentence(reason)}


def history_tables(series: Mapping[str, Any]) -> list[Table]:
    """The changes of one series: of whole runs, then the largest of single layers."""
    rows = [shown_change(row, series) for row in series["changes"]]
    whole = [row for row in rows if row["layer"] is None]
    layers = sorted(
        (row for row in rows if row["layer"] is not None), key=lambda row: -abs(row["relative"] or 0.0)
    )
    tables = []
    if whole:
        columns = tuple(column for column in CHANGE_COLUMNS if column.name != "layer")
        tables.append(Table(name="changes", columns=columns, rows=whole, title="changes, all layers"))
    if layers:
        shown = layers[:_MOST_LAYERS]
        most = f", the {len(shown)} largest" if len(shown) < len(layers) else ""
        title = f"{len(layers)} changes of single layers{most}"
        tables.append(Table(name="layers", columns=CHANGE_COLUMNS, rows=shown, title=title))
    return tables


def history_csv(document: Mapping[str, Any]) -> list[Table]:
    """Changes and values, for programs."""
    changes = [
        {"series": series["name"], **{name: row[name] for name in row if name != "also_changed"},
         "also_changed": [fact["code"] for fact in row["also_changed"]]}
        for series in document["series"]
        for row in series["changes"]
    ]  # fmt: skip
    values = [
        {
            "series": series["name"],
            "point": series["points"][at]["name"],
            "order": series["points"][at]["order"],
            "name": track["name"],
            "layer": track["layer"],
            "ep": track["ep"],
            "value": value,
        }
        for series in document["series"]
        for track in (*series["tracks"], *series["layers"])
        for at, value in zip(track["at"], track["values"], strict=True)
    ]
    return [
        Table(name="changes", columns=(), rows=changes),
        Table(name="values", columns=(), rows=values),
    ]


def heading(series: Mapping[str, Any]) -> str:
    """What a series is of."""
    points = series["points"]
    ends = f"{_place(points[0], series)} to {_place(points[-1], series)}" if points else "nothing"
    what = series["of"] if len(points) != 1 else series["of"].removesuffix("s")
    return f"{series['name']}: {len(points)} {what}, {ends}"


def history_sentences(series: Mapping[str, Any]) -> Iterator[str]:
    """What did not change, what else changed where something did, and what could not be tested."""
    tested = [track for track in series["tracks"] if track["adjusted_p"] is not None]
    steady = [_name(track) for track in tested if not track["changes"]]
    if steady:
        yield f"no change: {', '.join(steady)}"
    also: dict[int, list[str]] = {}
    for row in series["changes"]:
        also[row["at"]] = [fact["sentence"] for fact in row["also_changed"]]
    for at in sorted(also):
        if also[at]:
            yield f"at {series['points'][at]['name']} also changed: {'; '.join(also[at])}"
    refused: dict[str, list[str]] = {}
    if not tested and series["tracks"]:
        first = max(
            (track["reason"] for track in series["tracks"]), key=lambda reason: reason.get("points", 0)
        )
        yield f"nothing was tested: {first['sentence']}"
        return
    for track in series["tracks"]:
        if track["reason"] is not None:
            refused.setdefault(track["reason"]["sentence"], []).append(_name(track))
    for text, names in refused.items():
        yield f"not tested, {text}: {listing(names, most=8)}"
    in_training = series["order_by"] == "training_step" or any(
        row["phase"] == "train_forward" for row in series["tracks"]
    )
    if in_training and not any(row["metric"] == "router_bias" for row in series["tracks"]):
        yield f"not tested, {sentence(Reason(CompareCode.NO_ROUTER_BIAS))}"


def _name(row: Mapping[str, Any]) -> str:
    return row["name"] if row["ep"] is None else f"{row['name']} EP {row['ep']}"


def shown_change(row: Mapping[str, Any], series: Mapping[str, Any]) -> dict[str, Any]:
    """A change with its name and place in words."""
    point = series["points"][row["at"]]
    by_time = series["order_by"] == "time"
    when = f"{datetime.fromtimestamp(point['order'], UTC):%Y-%m-%d %H:%M} UTC" if by_time else None
    at_text = point["name"] if by_time else _place(point, series)
    return {**row, "name": _name(row), "at_text": at_text, "when": when}


def _place(point: Mapping[str, Any], series: Mapping[str, Any]) -> str:
    """A point by what orders it."""
    if series["order_by"] == "time":
        return f"{point['name']} ({datetime.fromtimestamp(point['order'], UTC):%Y-%m-%d %H:%M})"
    if series["order_by"] == "training_step":
        return f"training step {point['order']:.0f}"
    return f"step {point['order']:.0f}"
