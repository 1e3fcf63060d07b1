"""One offline HTML file for one or several runs."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import observatory
from observatory.devices.simulated import SIMULATED_UUID
from observatory.errors import PlaceTakenError, RunError
from observatory.reports.documents import report_documents
from observatory.reports.embed import content_security_policy, packed_json, script_json, script_text
from observatory.reports.frames.benchmark_files import read_benchmark_files
from observatory.reports.frames.collect import collect
from observatory.reports.frames.frequency import collect_clocks
from observatory.reports.frames.plan import collect_plans
from observatory.reports.frames.report import NOT_STATED, ReportFrames, condition_order, phases_of
from observatory.reports.frames.route_fetch import collect_route_fetch
from observatory.reports.markdown import markdown
from observatory.reports.outline import absent_parts, build_sections, questions
from observatory.reports.page import FigureBlock, Table, Variant
from observatory.reports.sections import (
    FORMULAS,
    answer,
    file_records,
    findings,
    formula_anchor,
    key_figure,
    overview,
    problems,
    provenance,
    run_table,
    setting,
    three_numbers,
    verdicts,
)
from observatory.reports.svg import draw
from observatory.reports.text import bytes_text, plain, shorten, unbroken
from observatory.reports.theme import FONT, css_variables
from observatory.run import Run, open_run
from observatory.run.files import committed
from observatory.text import listing

#: A number of a sentence with its unit; numbers of layers and ranks are names.
_NUMBER = re.compile(
    r"\d+(?:,\d{3})*(?:\.\d+)?[ \u00a0](?:%|ms|us|µs|s|[mk]?J|MHz|times|devices?|tokens/s)(?!\w)|\d+\.\d+"
)
#: Widths of pictures in pixels: over the page, near square ones, and on a phone.
_WIDE_PX, _NARROW_PX, _PHONE_PX = 860, 620, 350
#: More ranks than these are not offered one by one.
_MOST_RANKS = 512
_CODE = re.compile(r"`([^`]{1,200})`")
Form = Literal["html", "md", "json"]
#: A report larger than this cannot be mailed around; it is refused rather than written.
MOST_BYTES = 15_000_000


def write_report(
    runs: Sequence[str | os.PathLike[str] | Run],
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
    ep_degrees: Sequence[int] = (4, 8, 16, 32),
    gpus_per_node: int = 4,
    bench: Sequence[str | os.PathLike[str]] = (),
    replays: Sequence[str | os.PathLike[str]] = (),
    networks: Sequence[str | os.PathLike[str]] = (),
    clocks: Sequence[str | os.PathLike[str]] = (),
    route_fetch: Sequence[str | os.PathLike[str]] = (),
    plans: Sequence[str | os.PathLike[str]] = (),
    missing: Sequence[tuple[str, str]] = (),
    max_slowdown: float = 0.02,
    form: Form = "html",
    overwrite: bool = False,
) -> Path:
    """Write the report of ``runs`` as one file that needs no network.

    Args:
        runs: run directories or open runs; models and conditions keep this order.
        out: file to write; it appears whole or not at all.
        title: heading of the page; made from the models and conditions when None.
        ep_degrees: expert-parallel degrees of the scan.
        gpus_per_node: ranks per node of the scan.
        bench: results of ``observatory bench``.
        replays: results of ``observatory replay``; one of a run that is not in ``runs`` is left out and
            named.
        networks: network models of ``observatory fit``.
        clocks: clock sweeps, or clock models of ``observatory clocks fit``.
        route_fetch: measurements of ``observatory bench route-fetch``.
        plans: what ``observatory plan --out`` wrote.
        missing: what should be among ``runs`` and is not, each with the reason in words.
        max_slowdown: how much longer an iteration may take at a recommended clock, as a share.
        form: a page; Markdown, without figures; or the documents that a page holds.
        overwrite: replace an existing file.

    Raises:
        RunError: no runs, a run cannot be opened, ``out`` exists or cannot be written, or the page would be
            larger than 15 MB.
        BenchmarkError: a benchmark file cannot be read or is of another kind.
        ClockError: likewise a clock file, or the budget is none.
        PlanError: likewise a plan.
    """
    if not runs:
        raise RunError("a report needs at least one run directory; none was given")
    target = check_target(out, overwrite=overwrite)
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    files = read_benchmark_files(bench=bench, replays=replays, networks=networks)
    given = collect_clocks(clocks, max_slowdown=max_slowdown)
    measured = collect_route_fetch(route_fetch)
    planned = collect_plans(plans)
    frames = collect(opened, ep_degrees=ep_degrees, gpus_per_node=gpus_per_node, files=files, clocks=given)
    frames = replace(frames, route_fetch=measured, plans=planned, missing=tuple(missing))
    page = render(
        frames, title=title, ep_degrees=ep_degrees, gpus_per_node=gpus_per_node, out=target, form=form
    )
    size = len(page.encode("utf-8", "replace"))
    if size > MOST_BYTES:
        raise RunError(
            f"the report of {len(runs)} runs would have {bytes_text(size)}, more than "
            f"{bytes_text(MOST_BYTES)}; report fewer runs at once"
        )
    write_page(target, page)
    return target


def check_target(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The file of a page.

    Raises:
        RunError: it exists and is not to be replaced, or cannot be.
    """
    target = Path(out)
    if target.is_dir():
        raise RunError(f"{target} is a directory; give the name of a file, such as {target / 'report.html'}")
    if target.exists() and not target.is_file():
        raise RunError(f"{target} is a pipe or device and is not replaced; give the name of a file")
    if target.exists() and not overwrite:
        raise PlaceTakenError(f"{target} exists")
    return target


def page_parts() -> tuple[Environment, dict[str, Any]]:
    """Templates, and the values that every page has: its look, its scripts, and who made it when."""
    environment = _environment()
    tables_js, page_js = (_asset(environment, name) for name in ("tables.js", "page.js"))
    return environment, {
        "version": observatory.__version__,
        "policy": content_security_policy(tables_js, page_js),
        "font": Markup(FONT),
        "light_variables": Markup(css_variables(dark=False)),
        "dark_variables": Markup(css_variables(dark=True)),
        "stylesheet": Markup(_asset(environment, "page.css")),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tables_js": script_text(tables_js),
        "page_js": script_text(page_js),
    }


def render(
    frames: ReportFrames,
    *,
    title: str | None,
    ep_degrees: Sequence[int],
    gpus_per_node: int,
    out: Path,
    form: Form = "html",
) -> str:
    """The file as text."""
    built = build_sections(frames, gpus_per_node=gpus_per_node)
    concluded = verdicts(frames)
    head: dict[str, Any] = {
        "title": shorten(title or _title(frames), 200),
        "answer": answer(concluded),
        "numbers": three_numbers(frames, concluded),
        "verdicts": concluded,
    }
    if form == "md":
        return markdown(frames, built, **head)
    documents = report_documents(frames, **head)
    if form == "json":
        return json.dumps(documents, indent=1, allow_nan=False) + "\n"
    sections = [section for section in built if section.blocks]
    figure = key_figure(sections, concluded)
    anchors = {section.id for section in sections}
    anchors |= {
        block.id for section in sections for block in section.blocks if isinstance(block, FigureBlock)
    }
    head["verdicts"] = [each if each.figure in anchors else replace(each, figure="") for each in concluded]
    environment, values = page_parts()
    paths = [str(fact.path) for fact in frames.facts]
    given = frames.benchmarks.files.options() if frames.benchmarks else []
    given += frames.clocks.options() if frames.clocks else []
    given += [word for file in frames.route_fetch for word in ("--route-fetch", str(file.path))]
    given += [word for file in frames.plans for word in ("--plan", str(file.path))]
    return environment.get_template("report.html.j2").render(
        **values,
        **head,
        documents=packed_json(documents),
        kind=_kind(frames),
        setting=setting(frames),
        key_figure=figure,
        overview=overview(frames),
        problems=problems(frames),
        findings=findings(frames),
        choices=_choices(frames),
        runs=run_table(frames),
        questions=questions(sections),
        anchors=anchors,
        absent=absent_parts(built),
        formulas=FORMULAS,
        records=provenance(frames),
        file_records=file_records(frames),
        reproduce=plain(
            shlex.join(
                ["observatory", "report", *paths, *given, "--out", str(out), "--ep",
                 ",".join(map(str, ep_degrees)), "--gpus-per-node", str(gpus_per_node)]
            )
        ),
    )  # fmt: skip


def _choices(frames: ReportFrames) -> dict[str, list[str]]:
    """What the page can be filtered by: values of each key, those with several."""
    ranks = int(frames.runs["ranks"].max())
    choices = {
        "model": list(dict.fromkeys(shorten(label) for label in frames.runs["label"])),
        "condition": [shorten(name, 24) for name in condition_order(frames.runs) if name != NOT_STATED],
        "phase": phases_of(frames.cells) if len(frames.cells) else [],
        "rank": [str(rank) for rank in range(ranks)] if ranks <= _MOST_RANKS else [],
    }
    return {key: values for key, values in choices.items() if len(values) > 1}


def _kind(frames: ReportFrames) -> str:
    """What the page is about, in three words or so."""
    about = [] if frames.layers.empty else ["routing"]
    about += ["exchange"] if frames.exchanges or frames.benchmarks else []
    about += ["power"] if (frames.power and frames.power.runs) or frames.clocks else []
    text = listing(about or ["routing"])
    return f"{text[0].upper()}{text[1:]} report"


def _title(frames: ReportFrames) -> str:
    models = list(dict.fromkeys(shorten(fact.manifest.model.name, 60) for fact in frames.facts))
    stated = [fact.condition for fact in frames.facts if fact.condition != NOT_STATED]
    conditions = list(dict.fromkeys(shorten(condition, 40) for condition in stated))
    left = models[0] if len(models) == 1 else f"{len(models)} models"
    right = listing(conditions) if len(conditions) <= 2 else f"{len(conditions)} data conditions"
    if frames.layers.empty and frames.power is not None and frames.power.runs:
        return f"Power of {left}"
    return f"Expert routing of {left} on {right}" if conditions else f"Expert routing of {left}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Neighbouring variants of one group."""

    name: str
    members: list[Variant]


def _grouped(variants: Iterable[Variant], attribute: str) -> list[_Group]:
    """Variants by group, both in the order given, so that options count as the variants do."""
    groups: list[_Group] = []
    for variant in variants:
        name = str(getattr(variant, attribute))
        if not groups or groups[-1].name != name:
            groups.append(_Group(name=name, members=[]))
        groups[-1].members.append(variant)
    return groups


def _pictures(variant: Variant, block: FigureBlock) -> dict[str, Markup]:
    """The picture for a page and for a phone."""
    wide = _NARROW_PX if block.narrow else _WIDE_PX
    mark = SIMULATED_UUID if SIMULATED_UUID in variant.keys.get("model", "") else ""
    return {name: draw(variant.figure, px, mark=mark) for name, px in (("wide", wide), ("small", _PHONE_PX))}


def _packed(block: FigureBlock, tables: Callable[[Table], Markup]) -> Markup:
    """All variants of a figure as its script shows them, the first one as well."""
    return packed_json(
        [
            {
                "alt": variant.alt,
                "note": _prose(variant.note),
                "numbers": tables(variant.numbers),
                **_pictures(variant, block),
            }
            for variant in block.variants
        ]
    )


def _keys(block: FigureBlock) -> Markup:
    """What each variant is of, and what it is called, for the page's filter."""
    return script_json([{"label": variant.label, "keys": dict(variant.keys)} for variant in block.variants])


def _prose(text: str) -> Markup:
    """Text with what stands between backticks as code, and no number apart from its unit."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(unbroken(text)))))


def _joints(name: str) -> Markup:
    """A name that may be broken behind its underscores, rather than anywhere."""
    return Markup("_<wbr>").join(name.split("_"))


def _linked(sentence: str, href: str, where: Mapping[str, str]) -> Markup:
    """A sentence whose numbers lead to the rows they are from."""
    sentence = unbroken(sentence)
    link = Markup('<a href="{}" data-where="{}">{}</a>')
    parts, end = [], 0
    for match in _NUMBER.finditer(sentence):
        parts += [escape(sentence[end : match.start()]), link.format(href, json.dumps(where), match.group())]
        end = match.end()
    return Markup("").join([*parts, escape(sentence[end:])])


def _environment() -> Environment:
    """Templates with every value escaped, and an error for every name they do not get."""
    environment = Environment(
        loader=PackageLoader("observatory.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["groupby_in_order"] = _grouped
    environment.filters["packed"] = _packed
    environment.filters["pictures"] = _pictures
    environment.filters["prose"] = _prose
    environment.filters["joints"] = _joints
    environment.filters["linked"] = _linked
    environment.filters["keys"] = _keys
    environment.filters["anchor"] = lambda names: formula_anchor(names.split(", ")[0])
    return environment


def _asset(environment: Environment, name: str) -> str:
    """A file next to the templates, unchanged."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def write_page(target: Path, page: str) -> None:
    """Write the whole file, or leave what is there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with committed(target) as temporary:
            temporary.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {target}: {error.strerror or error}; choose a writable place"
        ) from error
