"""Send rows to the data, or bring the data here: what was measured, and from where on which costs less."""

from __future__ import annotations

from observatory.analysis.route_fetch.document import ACCURACY_COLUMNS, BREAK_EVEN_COLUMNS, EDIT_COLUMNS
from observatory.reports.figures.decision_map import decision_map
from observatory.reports.frames.report import ReportFrames
from observatory.reports.frames.route_fetch import RouteFetchFile
from observatory.reports.page import Block, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.text import percent, plain, shorten

_TITLE = "Route, fetch or local"


def route_fetch_section(frames: ReportFrames) -> Section:
    """A map for each measured shape, and how well its costs are predicted."""
    variants = tuple(
        _variant(file, shape.name) for file in frames.route_fetch for shape in file.result.shapes
    )
    blocks: list[Block] = []
    if variants:
        blocks.append(
            FigureBlock(
                id="decision-map",
                title="Where routing and fetching cost the same",
                caption="Colour: predicted cost of sending the rows to the data, over that of bringing the "
                "data here (all layers, used once). Blue: send the rows. Red: bring the data. Line: equal "
                "costs, with its 90 % interval: of the coefficients, and of the errors at held-out points.",
                choice="Measurement and shape",
                narrow=True,
                variants=variants,
            )
        )
    for file in frames.route_fetch:
        blocks += _tables(file)
    return Section(
        id="route-fetch",
        title=_TITLE,
        lead=(
            "Attention over keys and values that another rank holds, or an expert on another rank: rows "
            "there and results back, against the data here. Both were measured and gave the result of one "
            "rank alone; costs are sums of measured stages.",
        )
        if variants
        else (),
        blocks=tuple(blocks),
    )


def _variant(file: RouteFetchFile, shape: str) -> Variant:
    document = file.document
    cells, even = ([row for row in document[name] if row["shape"] == shape] for name in ("map", "break_even"))
    of_expert = shape.startswith("expert")
    x_title, y_title = ("tokens", "inner width") if of_expert else ("query rows", "chunk tokens")
    layers = 1 if of_expert else document["layers"]
    middle = even[len(even) // 2]
    where = (
        "routing costs less for any number of them"
        if middle["rows"] is None
        else f"fetching costs less from {middle['rows']:.0f} {x_title} on"
        if middle["rows"] >= 1
        else f"fetching costs less for any number of {x_title}"
    )
    local = sum(cell["option"] == "local" for cell in cells)
    made = (
        f" Making the chunk here costs least at {percent(local / len(cells), 0)} of the map." if local else ""
    )
    name = shorten(file.path.name, 32)
    return Variant(
        group=name,
        label=shape,
        figure=decision_map(cells, even, x_title=x_title, y_title=y_title),
        alt=f"Map of routing against fetching for {shape}; at {middle['size']:.0f} {y_title}, {where}.",
        note=f"{shape} over {plain(document['backend'])}, {document['ranks']} ranks, {layers} "
        f"{'layer' if layers == 1 else 'layers'}. At {middle['size']:.0f} {y_title}, {where}.{made}",
        numbers=frame_table(
            f"{shape}: from where on fetching costs less ({name})",
            BREAK_EVEN_COLUMNS,
            even,
            leave_out=("shape", "local_mj"),
        ),
    )


def _tables(file: RouteFetchFile) -> list[Table]:
    name = shorten(file.path.name, 32)
    tables = [
        frame_table(
            f"Predicted by fits that did not see the point ({name})",
            ACCURACY_COLUMNS,
            file.document["accuracy"],
        )
    ]
    if file.document["edits"]:
        tables.append(frame_table(f"Editing a cache in place ({name})", EDIT_COLUMNS, file.document["edits"]))
    return tables
