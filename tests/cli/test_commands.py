"""The commands as a user meets them: output, exit codes, one line per error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from observatory.probes.routing import discover
from observatory.probes.routing.discover import find_sites
from observatory.run.documents.printed import PRINTED_VERSION
from observatory.run.manifest import SCHEMA_VERSION
from tests.analysis.provenance.made import place_ranks, placed_rank
from tests.conftest import MakeRun
from tests.probes.routing.verification import broken, shifted
from tests.reports.sample_runs import manifest, write_run


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with exit code 1."""
    assert main(list(argv)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_routing_gives_the_documented_keys_and_hand_computed_values(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, "routing", str(make_run()))
    (layer,) = document["layers"]  # type: ignore[misc]
    assert {"layer", "phase", "experts", "top_k", "steps", "tokens", "assignments"} <= layer.keys()
    assert {
        "gini",
        "gini_floor",
        "expert_max_over_mean",
        "cv",
        "entropy_bits",
        "idle_experts",
    } <= layer.keys()
    assert (layer["layer"], layer["phase"], layer["experts"], layer["top_k"]) == (3, "prefill", 4, 2)
    assert (layer["steps"], layer["tokens"], layer["assignments"]) == (6, 24, 48)
    # loads 1, 1, 2, 4 in each step: pairwise differences 0+1+3+1+3+2 = 10, Gini = 10 / (4 * 8)
    assert layer["gini"] == pytest.approx(10 / 32)
    assert layer["expert_max_over_mean"] == pytest.approx(2.0)
    assert layer["entropy_bits"] == pytest.approx(1.75)
    assert layer["idle_experts"] == 0
    assert layer["committee"] == [3]  # 4 of 8 assignments
    assert document["local_consistency"] == []  # the run holds no token samples


def test_scan_gives_the_documented_keys_and_keeps_experts_and_ranks_apart(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, "scan", str(make_run()), "--ep", "2,4", "--gpus-per-node", "2")
    rows = {row["ep"]: row for row in document["rows"]}  # type: ignore[attr-defined]
    assert set(rows) == {2, 4}
    for row in rows.values():
        assert {
            "ep",
            "placement",
            "layer",
            "phase",
            "cross_rank_fraction",
            "cross_node_fraction",
        } <= row.keys()
        assert row["expert_max_over_mean"] == pytest.approx(2.0)
    # linear at EP 2: ranks hold {1, 1} and {2, 4}: loads 2 and 6, mean 4
    assert rows[2]["rank_max_over_mean"] == pytest.approx(1.5)
    assert rows[4]["rank_max_over_mean"] == pytest.approx(2.0)
    assert rows[2]["cross_node_fraction"] == pytest.approx(0.0)


def test_a_scan_without_degrees_takes_those_that_fit(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run())  # 4 experts: of the usual 4, 8, 16, 32 only the first fits
    assert {row["ep"] for row in run_json(capsys, "scan", run)["rows"]} == {4}  # type: ignore[attr-defined]
    (tmp_path / "two.json").write_text('{"expert_to_rank": [0, 1, 1, 0]}')
    rows = run_json(capsys, "scan", run, "--placement", str(tmp_path / "two.json"))["rows"]
    assert {row["ep"] for row in rows} == {2}  # type: ignore[attr-defined]


def test_scan_adds_traffic_matrices_when_asked(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "scan", str(make_run()), "--ep", "2", "--traffic")
    (row,) = document["rows"]  # type: ignore[misc]
    # 6 steps; one captured rank is spread evenly over both; ranks hold loads 2 and 6 of each step
    assert row["traffic_assignments"] == [[6.0, 18.0], [6.0, 18.0]]


def test_tables_for_people_go_to_stdout_and_nothing_else_does(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run(model="[bold]not markup[/bold] \x1b[31m"))
    assert main(["routing", run]) == 0
    out = capsys.readouterr().out
    assert "0.312" in out or "0.313" in out
    assert "[bold]not markup[/bold]" in out
    assert "\x1b" not in out
    assert main(["scan", run, "--ep", "2"]) == 0
    assert "rank max/mean" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["routing", "scan"])
def test_a_missing_run_is_one_clear_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere" in complaint(capsys, command, str(tmp_path / "nowhere"))


def test_a_foreign_directory_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"not a run")
    assert "run.json" in complaint(capsys, "routing", str(tmp_path))


def test_a_newer_schema_is_refused_with_both_versions(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    manifest = json.loads((run / "run.json").read_text())
    manifest["schema_version"] = "7.3"
    (run / "run.json").write_text(json.dumps(manifest))
    message = complaint(capsys, "routing", str(run))
    assert "7.3" in message
    assert SCHEMA_VERSION in message


def test_an_empty_run_says_so_instead_of_showing_nothing(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no routing" in complaint(capsys, "routing", str(make_run(steps=0)))


def test_ep_that_does_not_divide_the_experts_names_what_fits(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, "scan", str(make_run()), "--ep", "3")
    assert "1, 2, 4" in message or "2, 4" in message


@pytest.mark.parametrize("ep", ["", "four", "4,,8", "0", "-4", "4;8", "9" * 5000])
def test_nonsense_degrees_are_refused(ep: str, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    complaint(capsys, "scan", str(make_run()), f"--ep={ep}")


def test_wrong_usage_is_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-command"]) == 2
    assert main(["routing"]) == 2
    assert main(["profile", "tiny-gqa"]) == 2
    capsys.readouterr()


def test_version_and_help_are_exit_code_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert "0.1.0" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_report_writes_a_file_and_does_not_overwrite_it_unasked(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(make_run()), tmp_path / "report.html"
    assert main(["report", run, "--out", str(out), "--ep", "2,4"]) == 0
    first = out.read_bytes()
    capsys.readouterr()
    assert "report.html" in complaint(capsys, "report", run, "--out", str(out), "--ep", "2,4")
    assert out.read_bytes() == first
    assert main(["report", run, "--out", str(out), "--ep", "2,4", "--force"]) == 0
    capsys.readouterr()
    os.mkfifo(tmp_path / "pipe")
    assert "is not replaced" in complaint(capsys, "report", run, "--out", str(tmp_path / "pipe"), "--force")
    assert (tmp_path / "pipe").is_fifo()


def test_doctor_lists_what_works_and_how_to_get_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "doctor")
    capabilities = {item["name"]: item for item in document["capabilities"]}  # type: ignore[attr-defined]
    assert capabilities["python"]["works"]
    for item in capabilities.values():
        assert item["detail"]
    assert main(["doctor"]) == 0
    assert "python" in capsys.readouterr().out


def test_doctor_shows_where_this_process_runs_as_runs_record_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("NCCL_API_TOKEN", "hunter2")
    here: dict[str, Any] = run_json(capsys, "doctor")["here"]  # type: ignore[assignment]
    assert (here["scheduler"]["job_id"], here["scheduler"]["partition"]) == ("4711", "gpu")
    assert here["provenance"]["machine"]["cpus"] == os.cpu_count()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "Slurm job 4711, partition gpu" in text
    assert "NCCL_ALGO=Ring" in text
    assert "hunter2" not in text + json.dumps(here)


def test_doctor_shows_where_the_ranks_of_a_run_ran_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", manifest(layers=1, experts=8, top_k=2, ranks=8), steps=2)
    assert main(["doctor", "--run", str(run)]) == 0
    assert "does not state" in capsys.readouterr().err
    off = {"ahead_ms": 1500.0, "versions": {"torch": "2.12.0"}}
    place_ranks(run, *(placed_rank(rank, node=rank // 2, **(off if rank > 5 else {})) for rank in range(8)))
    document = run_json(capsys, "doctor", "--run", str(run))
    assert [(row["nodes"], row["ranks"]) for row in document["nodes"]] == [  # type: ignore[attr-defined]
        ("n0, n1, n2 and n3", "0-7")
    ]
    codes = [notice["code"] for notice in document["notices"]]  # type: ignore[attr-defined]
    assert codes == ["versions_differ", "wall_clocks_differ"]
    assert main(["doctor", "--run", str(run)]) == 0
    text = capsys.readouterr().out
    assert "versions of torch: 2.12.0 on n3 (ranks 6-7) and 2.13.0 on n0, n1 and n2" in text
    assert "wall clock of n3 (rank 6) was 1.5 s ahead of that of the first rank" in text
    assert "expected one of --run and --model" in complaint(
        capsys, "doctor", "--run", str(run), "--model", "m"
    )


@pytest.mark.parametrize("model", ["tiny-mla", "tiny-mha", "tiny-gqa", "tiny-mamba2", "tiny-gdn"])
def test_doctor_verifies_the_layers_of_bundled_models(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "doctor", "--model", model, "--verify")
    layers: list[dict[str, object]] = document["layers"]  # type: ignore[assignment]
    assert layers
    for layer in layers:
        assert layer["verified"] == [
            {"by": "rows", "code": None, "reason": None},
            {"by": "intervention", "code": None, "reason": None},
        ]


def test_doctor_prints_what_verified_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "tiny-gqa", "--verify"]) == 0
    assert "rows, intervention" in capsys.readouterr().out
    assert main(["doctor", "--verify"]) == 1
    assert "--verify is given without a model" in capsys.readouterr().err


def test_doctor_prints_the_layers_and_ends_with_an_error_where_counts_are_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discover, "find_sites", lambda model: [broken(s, shifted) for s in find_sites(model)])
    assert main(["doctor", "--model", "tiny-gqa", "--verify"]) == 1
    printed = capsys.readouterr()
    assert "model.layers.3.mlp.experts" in printed.out
    assert "in layer 0 the reading of model.layers.0.mlp.experts gives" in printed.err
    assert "tokens to expert" in printed.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_one_clear_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    complaint(capsys, "report", str(make_run()), "--out", str(closed / "report.html"))


@pytest.mark.parametrize("seed", ["-1"])
def test_a_negative_seed_is_wrong_usage(
    seed: str, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routing", str(make_run()), "--seed", seed]) == 2
    assert main(["fit", "bench.json", "--out", "fit.json", "--seed", seed]) == 2
    capsys.readouterr()


def test_numbers_beyond_what_a_file_may_hold_are_wrong_usage(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run())
    assert main(["scan", run, "--gpus-per-node", "9" * 30]) == 2
    assert main(["fit", "bench.json", "--out", "fit.json", "--bootstrap", "20000"]) == 2
    assert main(["export", run, "ucc", "--ep", "2", "--out", "out", "--row-bytes", "9" * 30]) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--algorithm", "ring"], "algorithm 'ring' does not exist; expected one of flat"),
        (["--backend", "pigeon"], "backend 'pigeon' does not exist; expected one of auto"),
        (["--ep", "2", "--backend", "pigeon"], "backend 'pigeon' does not exist"),
        (["--ep", "2", "--backend", "mpi"], "under it: mpiexec -n 2"),
        (["--ep", "4", "--ranks-per-node", "3"], "expected a divisor of 4"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_before_ranks_are_started(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in complaint(capsys, "profile", "nowhere", "--out", str(tmp_path / "run"), *argv)
    assert not (tmp_path / "run").exists()


def test_an_absurdly_long_name_does_not_flood_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, "routing", "x" * 10_000)
    assert len(message) < 1500
    assert "too long" in message
    assert message.endswith("check space and permissions")


def test_a_pipe_instead_of_a_file_is_refused_and_not_waited_for(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    scan = ["scan", str(make_run()), "--ep", "2", "--placement", str(tmp_path / "pipe")]
    assert "plain file" in complaint(capsys, *scan)
    assert "plain file" in complaint(capsys, "grid", str(tmp_path / "pipe"), "--out", str(tmp_path / "grid"))
    assert "plain file" in complaint(
        capsys, "fit", str(tmp_path / "pipe"), "--out", str(tmp_path / "fit.json")
    )
    assert "plain file" in complaint(capsys, *scan[:4], "--network", str(tmp_path / "pipe"))


def test_an_error_nobody_foresaw_is_one_line_too(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr("observatory.run.open_run", broken)
    message = complaint(capsys, "routing", str(make_run()))
    assert "ZeroDivisionError" in message
    assert "report it" in message
    monkeypatch.setenv("OBSERVATORY_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["routing", "anything"])


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_closed_streams_are_no_fault(closing: str, make_run: MakeRun) -> None:
    command = f'"{sys.executable}" -m observatory routing "{make_run()}" --json {closing}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_export_format_is_refused_by_name(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, "export", str(make_run()), "perfetto", "--out", str(tmp_path / "out"))
    assert "'perfetto' does not exist" in message
    assert "nccl-tests, ucc, chrome-trace" in message


def test_scan_names_all_degrees_that_do_not_fit(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, "scan", str(make_run()), "--ep", "2,3,64")
    assert "EP 3 and 64 do not divide 4 experts" in message


def test_doctor_lists_the_bundled_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tiny-gqa" in run_json(capsys, "doctor")["bundled_models"]  # type: ignore[operator]
    assert main(["doctor"]) == 0
    assert "tiny-gqa" in capsys.readouterr().out


def test_a_warning_is_one_line() -> None:
    code = (
        "import sys, warnings; from observatory import cli; "
        "cli.main = lambda: warnings.warn('no device') or 0; cli.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "warning: no device\n"


@pytest.mark.parametrize("command", ["routing", "scan", "doctor"])
def test_documents_say_their_kind_and_version(
    command: str, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, command, *([str(make_run())] if command != "doctor" else []))
    assert (document["kind"], document["schema_version"]) == (command, PRINTED_VERSION)
