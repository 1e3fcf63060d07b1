"""Subjects from saved results: documents of ``--json`` or ``--out``, or those that a report embeds.

A document has values and at best their intervals; only ``times``, which reports hold, has values of single
steps, whose differences can be paired. Of ``routing`` come Gini, entropy and experts without a token, of
``energy`` energy and power. What ``exchanges`` and ``scan`` print are sums and medians of another kind than
those that are compared.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from observatory.analysis.compare.metrics import METRICS, Key
from observatory.analysis.compare.series import Series, mean_of
from observatory.analysis.compare.subject import Subject
from observatory.errors import ComparisonError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json, read_at_most
from observatory.run.documents.printed import PRINTED_VERSION
from observatory.run.files import one_line
from observatory.run.manifest import PHASES

#: Largest report that is read.
_MOST_REPORT_BYTES = 32 << 20
_BLOCK = re.compile(rb'<script type="application/(json|gzip)" id="observatory-documents">([^<]*)</script>')
#: Half widths of intervals in standard errors, by their probability.
_NORMAL_95, _NORMAL_90 = 1.95996, 1.64485
_MOST_ROWS = 100_000
#: Values of single steps that a document keeps of one series.
MOST_SAMPLES = 1024


class _DamagedError(ValueError):
    """A row that no command writes."""


def load_premises(path: Path) -> list[dict[str, Any]]:
    """Whether the premise of each change holds, by model and phase, of a document of ``observatory advise``.

    Returns:
        ``model``, ``phase``, ``change``, ``holds`` (None: not known), each change once.

    Raises:
        ComparisonError: not such a document.
    """
    (document, *others) = _documents(path)
    if others or document["kind"] != "advice":
        raise ComparisonError(f"{path} is not advice", expected="the result of `observatory advise --out`")
    try:
        rows = {
            (str(run["model"]), str(phase["phase"]), str(verdict["change"])): verdict["premise"]["holds"]
            for run in document["runs"]
            for phase in run["phases"]
            for verdict in phase["verdicts"]
            if verdict["premise"] is not None and verdict["premise"]["holds"] in (True, False, None)
        }
    except (KeyError, TypeError) as error:
        raise ComparisonError(f"{path} lacks what advice has ({error})", remedy="write it again") from error
    return [
        {"model": model, "phase": phase, "change": change, "holds": holds}
        for (model, phase, change), holds in rows.items()
    ]


def load_subjects(path: Path) -> list[Subject]:
    """Subjects of a JSON document or of a report; documents of one run are one subject.

    Raises:
        ComparisonError: not readable, not such a document, of a newer schema, or without comparable values.
    """
    documents = _documents(path)
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        by_run.setdefault(str(document.get("run_id")), []).append(document)
    subjects = [_subject(path, of_run) for of_run in by_run.values()]
    comparable = [subject for subject in subjects if subject.series]
    if not comparable:
        kinds = sorted({one_line(document.get("kind"), 40) for document in documents})
        raise ComparisonError(
            f"{path} holds no values that can be compared (kind {', '.join(kinds) or 'not stated'})",
            expected=f"a document of {', '.join(_READERS)}",
        )
    return comparable


def _documents(path: Path) -> list[dict[str, Any]]:
    """The checked documents of a file."""
    is_report = path.suffix.lower() in (".html", ".htm")
    try:
        content = read_at_most(path, _MOST_REPORT_BYTES if is_report else MAX_DOCUMENT_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no file name"
        raise ComparisonError(f"{path} cannot be read ({reason})", remedy="give a run or a result") from error
    if content is None:
        raise ComparisonError(f"{path} is too large to be a result", remedy="give the run that it is of")
    if is_report:
        content = _embedded(path, content)
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise ComparisonError(f"{path} is not valid JSON ({str(error)[:200]})") from error
    documents = parsed if isinstance(parsed, list) else [parsed]
    for document in documents:
        _check(document, path)
    if not documents:
        raise ComparisonError(f"{path} holds no document", expected="the output of --json")
    return documents


def _embedded(path: Path, page: bytes) -> bytes:
    """The documents that a report holds, as JSON."""
    block = _BLOCK.search(page)
    if block is None:
        raise ComparisonError(
            f"the report {path} holds no documents that can be compared", remedy="give its runs"
        )
    if block.group(1) == b"json":
        return block.group(2)
    try:
        packed = base64.b64decode(block.group(2), validate=True)
        unpacking = zlib.decompressobj(wbits=31)
        content = unpacking.decompress(packed, MAX_DOCUMENT_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ComparisonError(f"the documents of the report {path} are damaged ({error})") from error
    if unpacking.unconsumed_tail:
        raise ComparisonError(f"the documents of the report {path} are too large", remedy="give its runs")
    return content


def _check(document: object, path: Path) -> None:
    if isinstance(document, dict) and {*document} == {"rows", "skipped"}:
        raise ComparisonError(f"{path} is the scan of a grid", remedy="give the grid's directory")
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        raise ComparisonError(
            f"{path} is not a document of an observatory command", expected="the output of --json"
        )
    version = document.get("schema_version")
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,6}\.\d{1,6}", version):
        raise ComparisonError(f"{path} states no schema_version", expected="major.minor")
    if document["kind"] in (*_READERS, "advice") and int(version.split(".")[0]) > int(
        PRINTED_VERSION.split(".")[0]
    ):
        raise ComparisonError(
            f"{path} has schema version {version}, this program reads {PRINTED_VERSION}",
            remedy="use a newer observatory",
        )


def _subject(path: Path, documents: Iterable[Mapping[str, Any]]) -> Subject:
    series: dict[Key, Series] = {}
    experts: dict[int, int] = {}
    about: dict[str, Any] = {}
    fed: tuple[Any, ...] | None = None
    try:
        for document in documents:
            about |= {name: document[name] for name in ("run_id", "model", "data") if document.get(name)}
            reader = _READERS.get(document["kind"])
            if reader is not None:
                reader(document, series, experts)
            if document["kind"] == "times":
                fed = _fed(document)
    except _DamagedError as error:
        raise ComparisonError(f"{path} is damaged: {error}", remedy="write it again") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ComparisonError(
            f"{path} lacks what its kind has ({type(error).__name__}: {one_line(error, 80)})",
            remedy="write it again",
        ) from error
    places = {layer: place for place, layer in enumerate(sorted(experts))}
    placed = {
        Key(key.metric, key.phase, None if key.layer is None else places[key.layer], key.ep): item
        for key, item in series.items()
        if key.layer is None or key.layer in places
    }
    wholes: dict[Key, list[Series]] = {}
    for key, item in placed.items():
        if key.layer is not None:
            wholes.setdefault(Key(key.metric, key.phase, None, key.ep), []).append(item)
    for key, items in wholes.items():
        placed.setdefault(key, _mean(key, items))
    name = f"{path} ({one_line(about['run_id'], 12)})" if "run_id" in about else str(path)
    return Subject(
        name=name,
        source="document",
        model=about.get("model"),
        condition=about.get("data"),
        run_id=about.get("run_id"),
        experts_L=tuple(experts[layer] for layer in sorted(experts)),
        tokens=fed,
        series=placed,
    )


def _mean(key: Key, items: list[Series]) -> Series:
    """Over layers, whose errors are taken to go together, as those of steps do; of counts the sum."""
    if key.metric == "dead_experts":
        return Series(value=sum(item.value for item in items), exact=True, tokens=items[0].tokens)
    errors = [item.error for item in items if item.error is not None]
    error = sum(errors) / len(items) if len(errors) == len(items) else None
    return Series(value=mean_of(items).value, error=error, tokens=items[0].tokens)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """A value of a row; None where it is not known.

    Raises:
        _DamagedError: it is no finite number.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _DamagedError(f"{name} is {one_line(value, 40)!r}, not a number")
    return float(value)


def _count(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    number = _number(row, name)
    if number is None or number < 0 or not number.is_integer():
        raise _DamagedError(f"{name} is {one_line(value, 40)!r}, not a count")
    return int(number)


def _half_width(row: Mapping[str, Any], low: str, high: str) -> float | None:
    """Half of an interval; None where it is not known."""
    ends = _number(row, low), _number(row, high)
    if ends[0] is None or ends[1] is None:
        return None
    if ends[0] > ends[1]:
        raise _DamagedError(f"{low} is above {high}")
    return (ends[1] - ends[0]) / 2


def _rows(document: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = [row for row in document[name] if row["phase"] in PHASES]
    if len(rows) > _MOST_ROWS:
        raise _DamagedError(f"it has {len(rows)} rows")
    for row in rows:
        for counted in ("steps", "tokens"):
            if row.get(counted) is not None:
                _count(row, counted)
    return rows


def _put(
    series: dict[Key, Series], key: Key, row: Mapping[str, Any], name: str, *, half: float | None = None
) -> None:
    value = _number(row, name)
    width = _half_width(row, f"{name}_low", f"{name}_high")
    if value is None:
        return
    if value < 0 and key.layer is not None:
        raise _DamagedError(f"{name} is below 0")
    error = None if half is None or width is None else width / half
    tokens = _number(row, "tokens")
    series[key] = Series(
        value=value,
        error=error,
        exact=name == "idle_experts",
        tokens=None if tokens is None or key.metric == "mj_per_token" else int(tokens),
    )


def _routing(document: Mapping[str, Any], series: dict[Key, Series], experts: dict[int, int]) -> None:
    places: set[tuple[str, int]] = set()
    for row in _rows(document, "layers"):
        layer = _count(row, "layer")
        experts[layer] = _count(row, "experts")
        at = str(row["phase"]), layer
        if at in places:
            raise _DamagedError(f"layer {layer} in {at[0]} is there twice")
        places.add(at)
        _put(series, Key("gini", *at), row, "gini", half=_NORMAL_95)
        _put(series, Key("entropy_bits", *at), row, "entropy_bits")
        _put(series, Key("dead_experts", *at), row, "idle_experts")


def _times(document: Mapping[str, Any], series: dict[Key, Series], _: dict[int, int]) -> None:
    for row in _rows(document, "metrics"):
        metric, value = str(row["metric"]), _number(row, "value")
        if metric not in METRICS or value is None or value < 0:
            raise _DamagedError(f"{one_line(metric, 40)} is no time")
        samples, steps = row["samples"], row["at"]
        if samples is not None:
            if not 0 < len(samples) == len(steps) <= MOST_SAMPLES:
                raise _DamagedError(f"{metric} has {len(samples)} samples of {len(steps)} steps")
            samples = [_number({"samples": each}, "samples") for each in samples]
            steps = [_count({"at": each}, "at") for each in steps]
        series[Key(metric, str(row["phase"]))] = Series(
            value=value,
            sample_N=None if samples is None else np.array(samples, np.float64),
            step_N=None if samples is None else np.array(steps, np.int64),
            error=_number(row, "error"),
        )


def _fed(document: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What names the tokens that a run was fed; None where that is not known."""
    fed = document["fed"]
    if fed is None:
        return None
    if not isinstance(fed, list) or not all(each is None or isinstance(each, str | int) for each in fed):
        raise _DamagedError("fed is no list of options")
    return tuple(fed)


def _energy(document: Mapping[str, Any], series: dict[Key, Series], _: dict[int, int]) -> None:
    add_energy(document, series)


def add_energy(document: Mapping[str, Any], series: dict[Key, Series]) -> None:
    """Energy per token and power of a document of ``energy``, all devices together."""
    totals = document.get("totals") or document["tokens"]
    for row in totals:
        if row["phase"] in PHASES:
            if document.get("totals") and Key("mj_per_token", str(row["phase"])) in series:
                raise _DamagedError(f"energy of {row['phase']} is there twice")
            _put(series, Key("mj_per_token", str(row["phase"])), row, "mj_per_token", half=_NORMAL_90)
    watts: dict[str, list[tuple[float, float | None]]] = {}
    places: set[tuple[str, ...]] = set()
    for row in _rows(document, "phases"):
        place = tuple(str(row.get(name)) for name in ("phase", "source_rank", "device_uuid", "span", "layer"))
        if place in places:
            raise _DamagedError(f"power of a device in {place[0]} is there twice")
        places.add(place)
        value = _number(row, "power_mw")
        if row.get("span") is None and value is not None:
            width = _half_width(row, "power_low_mw", "power_high_mw")
            error = None if width is None else width / _NORMAL_90
            watts.setdefault(str(row["phase"]), []).append((value, error))
    for phase, parts in watts.items():
        errors = [error for _, error in parts if error is not None]
        joint = sum(error**2 for error in errors) ** 0.5 / 1e3 if len(errors) == len(parts) else None
        series[Key("power_w", phase)] = Series(value=sum(value for value, _ in parts) / 1e3, error=joint)


_READERS: dict[str, Callable[[Mapping[str, Any], dict[Key, Series], dict[int, int]], None]] = {
    "routing": _routing,
    "energy": _energy,
    "times": _times,
}
