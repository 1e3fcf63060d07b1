"""The page as a whole: what it says, what it refuses, what it keeps out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from observatory.errors import RunError
from observatory.reports import write_report
from observatory.reports.frames.collect import collect
from observatory.reports.frames.report import ReportFrames
from observatory.reports.html import MOST_BYTES
from observatory.reports.sections import heatmap_section, problems, scan_section
from observatory.reports.sections.common import NO_LOADS
from observatory.run import RunWriter, open_run
from observatory.run.manifest import CapturedSteps, Manifest, StepMark, Verified
from observatory.run.manifest_files import read_rank_status, write_rank_status
from tests.analysis.exchange.runs import exchange_run
from tests.analysis.exchange.tables import collective
from tests.analysis.provenance.made import place_ranks, placed_rank
from tests.reports.sample_runs import MODELS, manifest, steady_run, write_grid, write_run

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=hit()><a href=javascript:hit()>%{x}"


def hostile(value: object) -> object:
    """The same structure with every free text replaced."""
    if isinstance(value, dict):
        fixed = {"schema_version", "state", "kind_of"}
        return {name: item if name in fixed else hostile(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


class Tags(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def frames_of(*paths: Path, ep: tuple[int, ...] = (4, 8)) -> ReportFrames:
    return collect([open_run(path) for path in paths], ep_degrees=ep, gpus_per_node=4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One model on prose, code and mock."""
    return write_grid(
        tmp_path_factory.mktemp("pair"),
        models={"gqa-tiny": MODELS["gqa-tiny"]},
        conditions={"prose": (True, 1.0), "code": (True, 0.8), "mock": (False, 0.3)},
        layers=2,
        experts=8,
        top_k=2,
    )


@pytest.mark.slow
def test_thirty_runs_fit_and_every_section_is_there(tmp_path: Path) -> None:
    page = write_report(write_grid(tmp_path / "runs", layers=2), tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 8_000_000
    for section in (
        "findings",
        "grid",
        "mock",
        "experts",
        "lorenz",
        "committee",
        "ep",
        "steps",
        "layers",
        "provenance",
        "methods",
        "which-experts",
        "what-if",
    ):
        assert f'<section id="{section}"' in text
    absent = dict(
        re.findall(r"<dt>([^<]*)</dt><dd>(.*?)</dd>", text.split('id="absent"')[1].split("</section>")[0])
    )
    assert set(absent) == {
        "How long a step takes",
        "Which change is worth making",
        "Power and clocks over time",
        "Capacity plan",
    }
    assert "observatory advise" in absent["Which change is worth making"]
    why = absent["Power and clocks over time"]
    assert why.startswith("No run here shows power: it holds no power samples: none were asked for")
    assert "plotly" not in text


def test_free_text_of_a_manifest_stays_text(tmp_path: Path) -> None:
    described = Manifest.model_validate(
        hostile(
            manifest(layers=2, experts=8, top_k=2).model_dump(mode="json") | {"notes": ["a"], "extra": "b"}
        )
    )
    run = write_run(tmp_path / "run", described, steps=6)
    page = write_report([run], tmp_path / "report.html", title=HOSTILE)
    parsed = Tags()
    parsed.feed(page.read_text(encoding="utf-8"))
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert [each for each in scripts if "type" not in each] == [{}, {}]  # tables.js, page.js
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "object", "link")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert links
    assert all(str(link).startswith("#") for link in links)


def test_the_verdict_on_each_layer_is_in_the_provenance(tmp_path: Path) -> None:
    described = manifest(layers=3, experts=8, top_k=2)
    verdicts = (Verified(by="rows"), Verified(by="none", reason="<b>compiled</b>"), None)
    layers = tuple(
        layer.model_copy(update={"verified": verdict})
        for layer, verdict in zip(described.model.moe_layers, verdicts, strict=True)
    )
    described = described.model_copy(
        update={"model": described.model.model_copy(update={"moe_layers": layers})}
    )
    page = write_report([write_run(tmp_path / "run", described, steps=6)], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    table = text[text.index("MoE layers as found") :]
    cells = re.findall(r"<bdi>(rows|nothing[^<]*|not recorded)</bdi>", table)
    assert cells == ["rows", "nothing: &lt;b&gt;compiled&lt;/b&gt;", "not recorded"]


def test_captured_steps_and_named_moments_are_in_the_provenance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", manifest(layers=1, experts=8, top_k=2), steps=6)
    status = read_rank_status(run, 0)
    assert status is not None
    mark = StepMark(name="<i>warm</i>", step=3, time_ns=5, unix_s=1_790_000_100.0)
    captured = (CapturedSteps(first_step=0, end_step=6),)
    write_rank_status(run, status.model_copy(update={"marks": (mark,), "captured": captured}))
    text = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "step 3, 2026-09-21 14:15 UTC: &lt;i&gt;warm&lt;/i&gt;" in text
    assert "captured were steps 0 to 5, as was asked for; no other step is in this run" in text


def test_where_ranks_ran_is_one_small_table_and_differences_are_named(tmp_path: Path) -> None:
    described = manifest(layers=1, experts=8, top_k=2, ranks=64)
    plain_page = write_report([write_run(tmp_path / "run", described, steps=2)], tmp_path / "plain.html")
    assert "Where the ranks ran" not in plain_page.read_text(encoding="utf-8")
    old = {"ahead_ms": -90.0, "versions": {"nccl": "<b>2.26"}}
    new = {"versions": {"nccl": "2.27"}, "environment": {"NCCL_ALGO": "<i>Ring</i>"}}
    ranks = [placed_rank(rank, node=rank // 4, **(old if rank == 9 else new)) for rank in range(64)]
    run = place_ranks(tmp_path / "run", *ranks)
    page = write_report([run], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert "ranks ran different versions of nccl: 2.27 on n0, n1, n2 and 13 more" in text
    assert "the wall clock of n2 (rank 9) was 90 ms behind that of the first rank" in text
    assert "<i>Ring" not in text
    assert "<b>2.26" not in text
    table = text[text.index("Where the ranks ran") :]
    assert table[: table.index("</table>")].count("<tr") == 2  # the head, and nodes that are alike
    assert page.stat().st_size - plain_page.stat().st_size < 20_000
    (stated,) = [lines for _, lines in problems(frames_of(run))]
    assert any("different versions of nccl" in line for line in stated)


def test_an_existing_report_is_kept_unless_told(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(RunError, match="exists; choose another place"):
        write_report(pair, out)
    assert out.read_text() == "mine"
    write_report(pair, out, overwrite=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_report_that_cannot_be_written_leaves_nothing(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(pair[:1], tmp_path / "file" / "report.html")
    with pytest.raises(RunError, match="is a directory"):
        write_report(pair[:1], tmp_path)
    with pytest.raises(RunError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_page_over_the_limit_is_refused(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observatory.reports.html.MOST_BYTES", 100_000)
    with pytest.raises(RunError, match="report fewer runs"):
        write_report(pair, tmp_path / "report.html")
    assert MOST_BYTES == 15_000_000
    assert not list(tmp_path.iterdir())


def test_an_empty_run_says_why_there_is_nothing(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest()):
        pass
    text = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no routing rows: the run is left out of every figure" in text
    absent = text.split('id="absent"')[1].split("</section>")[0]
    assert "Imbalance by model and data; Mock tokens against real text; " in absent
    assert absent.count(NO_LOADS) == 1


def test_gaps_that_the_reader_states_are_in_the_page(tmp_path: Path) -> None:
    path = steady_run(tmp_path / "run", "gqa-tiny", "prose", [100, 100, 100, 300], ranks=2)
    frames = frames_of(path)
    assert frames.facts[0].problems
    ((name, lines),) = problems(frames)
    assert name == "gqa-tiny on prose"
    assert any("rank 1" in line for line in lines)
    assert set(frames.facts[0].problems) <= set(lines)


def test_degrees_that_do_not_divide_are_left_out_and_said(pair: list[Path]) -> None:
    frames = frames_of(pair[0], ep=(3, 4, 16))
    assert set(frames.scan["ep"]) == {4}
    assert [gap for gap in frames.facts[0].gaps if "EP" in gap] == [
        "EP 3 is left out of the scan: it does not divide 8 experts",
        "EP 16 is left out of the scan: it does not divide 8 experts",
    ]
    section = scan_section(frames_of(pair[0], ep=(3,)), gpus_per_node=4)
    assert section.blocks == ()
    assert "EP 3 is left out" in section.reason


def test_the_same_model_and_data_on_other_ranks_is_distinguished(tmp_path: Path) -> None:
    shape = {"layers": 1, "experts": 8, "top_k": 2}
    one = write_run(tmp_path / "one", manifest(**shape), steps=6)
    two = write_run(tmp_path / "two", manifest(ranks=2, **shape), steps=6)
    assert list(frames_of(one, two).runs["label"]) == ["gqa-tiny", "gqa-tiny (2 ranks)"]
    assert list(frames_of(one, one).runs["label"]) == ["gqa-tiny (run 1)", "gqa-tiny (run 2)"]


def test_families_of_different_shape_share_a_report(tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", manifest("small", layers=1, experts=8, top_k=2), steps=6)
    wide = write_run(tmp_path / "wide", manifest("wide", ranks=2, layers=3, experts=64, top_k=8), steps=6)
    frames = frames_of(small, wide, ep=(8, 32))
    assert frames.scan.groupby("run")["ep"].unique().map(list).tolist() == [[8], [8, 32]]
    assert len(heatmap_section(frames).blocks[0].variants) == 4
    write_report([small, wide], tmp_path / "report.html", ep_degrees=(8, 32))


def test_a_damaged_run_keeps_its_place_with_the_reason(pair: list[Path], tmp_path: Path) -> None:
    path = steady_run(tmp_path / "run", "broken", "prose", [100] * 5)  # its manifest says 4 experts
    frames = frames_of(pair[0], path)
    assert frames.runs["label"].tolist() == ["gqa-tiny", "broken"]
    assert set(frames.summary["run"]) == {0}
    ((name, lines),) = [entry for entry in problems(frames) if entry[0].startswith("broken")]
    assert name == "broken on prose"
    assert any("left out of figures" in line and "5 experts" in line for line in lines)


MakeRun = Callable[..., Path]


def test_hand_made_loads_reach_the_page_unchanged(make_run: MakeRun, tmp_path: Path) -> None:
    # loads 1, 1, 2, 4 in each of 6 steps: Gini = (2*(1*1+2*1+3*2+4*4))/(4*8) - 5/4 = 0.3125
    text = write_report([make_run()], tmp_path / "report.html", ep_degrees=(2,)).read_text(encoding="utf-8")
    assert ">0.312<small>" in text
    assert ">2.00<small>" in text  # busiest expert 4 over mean 2


def test_models_with_and_without_a_band_stand_in_one_report(tmp_path: Path) -> None:
    """Two real texts give a band, one does not; the model without one says so."""
    runs = [
        steady_run(tmp_path / "a", "banded", "prose", [1, 1, 2, 4]),
        steady_run(tmp_path / "b", "banded", "code", [1, 1, 2, 4]),
        steady_run(tmp_path / "c", "single", "prose", [1, 1, 2, 4]),
    ]
    bands = frames_of(*runs, ep=(2,)).bands.set_index("label")["band"]
    assert bands["banded"] is not None
    assert bands["single"] is None
    page = write_report(runs, tmp_path / "report.html", ep_degrees=(2,)).read_text(encoding="utf-8")
    assert "no band" in page


@pytest.mark.slow
def test_sixty_four_ranks_of_a_large_model_fit(tmp_path: Path) -> None:
    """61 layers of 256 experts, and the exchanges of 64 ranks in each."""
    ranks, layers = 64, 61
    described = manifest("large", layers=layers, experts=256, top_k=8, ranks=4)
    routed = write_run(tmp_path / "routed", described, steps=4)
    random = np.random.default_rng(0)
    rows = []
    for layer in range(layers):
        for order, role in enumerate(("dispatch", "combine")):
            start_us = 1000 * (2 * layer + order) + random.integers(0, 200, ranks)
            send = random.integers(1, 100_000, (ranks, ranks)).tolist()
            rows.append(
                collective(
                    start_us.tolist(), (start_us + 300).tolist(), send, layer=layer, role=role,
                    sequence=2 * layer + order,
                )
            )  # fmt: skip
    spread = exchange_run(
        tmp_path / "spread", *rows, ranks=ranks, node_of_rank=[r // 8 for r in range(ranks)]
    )
    page = write_report([routed, spread], tmp_path / "report.html", ep_degrees=(8, 64))
    assert page.stat().st_size <= 15_000_000, page.stat().st_size
    text = page.read_text(encoding="utf-8")
    assert 'id="traffic-map"' in text
    assert 'id="expert-map"' in text
