"""Printed documents against their description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from observatory.analysis.network.documents import bench_document, replay_document
from observatory.analysis.route_fetch.document import measured_document
from observatory.cli import main
from observatory.run.documents.printed import PRINTED_VERSION
from tests.advice.mitigations.runs import sized_run
from tests.analysis.compare.made import made_run, series_of_runs
from tests.analysis.energy.test_prefix_cache import measured
from tests.analysis.route_fetch.made import made_result
from tests.analysis.route_fetch.test_experts import a_run
from tests.cli.test_compare import made_grid
from tests.cli.test_terminal import big_exchanges
from tests.conftest import MakeRun
from tests.paths import ROOT
from tests.reports.sample_benchmarks import a_bench, a_replay, saved
from tests.reports.sample_power import a_power_run

#: Keys whose contents are described elsewhere, or are those of a file.
_ELSEWHERE = {"gaps", "device", "domain", "verdict", "misfits", "conclusion", "problem_codes"}


def sections() -> dict[str, set[str]]:
    """Names in backticks, by heading; those of the preamble count everywhere."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    preamble, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    common = set(re.findall(r"`([a-z_0-9A-Z]+)`", preamble))
    return {
        kind.strip(): common | set(re.findall(r"`([a-z_0-9A-Z]+)`", part))
        for part in parts
        for kind in part.splitlines()[0].split(",")
    }


def keys(value: Any) -> Iterator[str]:
    """Keys of a document, those of its lists among them."""
    if isinstance(value, list):
        for item in value:
            yield from keys(item)
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            if name not in _ELSEWHERE:
                yield from keys(inner)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) in (0, 3)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_every_key_of_a_document_is_described(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = str(saved(tmp_path / "bench.json", a_bench()))
    documents = [
        printed(capsys, "routing", str(make_run())),
        printed(capsys, "exchanges", str(big_exchanges(tmp_path / "exchanges"))),
        printed(capsys, "scan", str(make_run("other")), "--ep", "2", "--traffic"),
        printed(capsys, "fit", bench, "--out", str(tmp_path / "new.json"), "--bootstrap", "5"),
        printed(capsys, "place", str(make_run("long", steps=16)), "--ranks", "2"),
        printed(
            capsys, "advise", str(sized_run(tmp_path / "sized")), "--ranks", "4", "--hardware", "h100-sxm"
        ),
        printed(
            capsys,
            "compare",
            str(made_run(tmp_path / "before", steps=10)),
            str(made_run(tmp_path / "after", steps=10, seed=1, layers=3, skew=2.0, phases=("decode",))),
        ),
        printed(capsys, "compare", str(made_grid(tmp_path / "made-grid"))),
        printed(capsys, "history", str(series_of_runs(tmp_path / "series"))),
        printed(capsys, "energy", str(a_power_run(tmp_path / "power"))),
        printed(capsys, "reuse", "show", str(saved(tmp_path / "reuse.json", measured((37e3, 45e3, 18e3))))),
        printed(
            capsys,
            "route-fetch",
            "--constants",
            str(saved(tmp_path / "rf.json", made_result("mla:2,8,4", edits=8, decoder=(8, 8)))),
        ),
        measured_document(made_result("mla:2,8,4")),
        printed(
            capsys,
            "route-fetch",
            str(a_run(tmp_path / "experts", expert_bytes=480)),
            "--ranks",
            "2",
            "--constants",
            str(saved(tmp_path / "rf.json", made_result("expert:2"))),
        ),
        bench_document(a_bench(repeats=2)),
        replay_document(a_replay()),
    ]
    described = sections()
    for document in documents:
        kind = document["kind"]
        assert document["schema_version"] == PRINTED_VERSION
        assert next(iter(document)) == "kind"
        missing = set(keys(document)) - described[kind]
        assert not missing, f"{kind}: {sorted(missing)} are not in docs/json.md"
