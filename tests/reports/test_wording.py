"""The page's words: names that docs/metrics.md explains, and no sentence that lost its end."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import observatory.reports
from observatory.reports.outline import build_sections
from observatory.reports.page import FigureBlock, Section, Table
from observatory.reports.sections import FORMULAS
from tests.paths import ROOT
from tests.reports.sample_runs import MODELS, stated, write_grid
from tests.reports.test_report import frames_of

METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
HEADINGS = set(re.findall(r"^#+ (.+)$", METRICS, re.MULTILINE))
#: Names in backticks, and the columns listed at the end without them.
TERMS = set(re.findall(r"`([a-z_]+)`", METRICS)) | set(
    re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", METRICS.partition("## Columns")[2])
)
SOURCES = sorted(Path(observatory.reports.__file__).parent.rglob("*.py"))


def texts(section: Section) -> list[str]:
    """Everything a section says in sentences."""
    said = [*section.lead, section.reason]
    for block in section.blocks:
        said += [block.note] if isinstance(block, Table) else [block.caption]
        said += [variant.note for variant in block.variants] if isinstance(block, FigureBlock) else []
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All sentences of a report with two models, three conditions and two phases."""
    runs = write_grid(
        tmp_path_factory.mktemp("runs"),
        models={name: MODELS[name] for name in ("gqa-tiny", "mla-tiny")},
        conditions={"prose": (True, 1.0), "code": (True, 0.8), "mock": (False, 0.3)},
        layers=2,
        experts=8,
        top_k=2,
    )
    frames = frames_of(*runs)
    sections = build_sections(frames, gpus_per_node=4)
    return [*stated(frames), *(text for section in sections for text in texts(section))]


@pytest.mark.parametrize("name", [name for names, _ in FORMULAS for name in names.split(", ")])
def test_every_formula_has_an_entry_of_its_name(name: str) -> None:
    assert name in TERMS | HEADINGS


def test_every_name_that_the_page_refers_to_is_explained(said: list[str]) -> None:
    named = {name for text in said for name in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", text)}
    assert {"gini_floor", "lorenz_curve", "rank_max_over_mean_floor"} <= named
    assert named - TERMS == set()
    quoted = {name for text in said for name in re.findall(r"“([^”]+)” under Methods", text)}
    assert quoted == {"Standing committee", "Expert-parallel scan"}
    assert quoted <= HEADINGS


def test_no_sentence_lacks_a_number_or_an_end(said: list[str]) -> None:
    for text in filter(None, said):
        assert text.endswith((".", ":")), text
        assert not re.search(r"\b(from|by|of|the|and) *[;,.)]| [;,.)]|  |\bnan\b", text), text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_text_stands_alone_as_a_statement(path: Path) -> None:
    """Python runs such a line and drops it: the second half of a sentence broken without parentheses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0]) for node in ast.walk(tree) if isinstance(node, owners) and node.body}
    lost = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant | ast.JoinedStr)
        and id(node) not in docstrings
    ]
    assert lost == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_table_is_made_of_columns_by_the_one_function(path: Path) -> None:
    """So each of them sorts, copies and saves alike, and its numbers have one format."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = [
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("Table", "Head")
    ]
    assert made == (["Table", "Head"] if path.name == "page.py" else [])


def test_the_templates_hold_one_table() -> None:
    templates = SOURCES[0].parent.glob("templates/*.j2")
    assert sum(template.read_text(encoding="utf-8").count("<table") for template in templates) == 1
