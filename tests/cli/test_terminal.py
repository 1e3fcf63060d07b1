"""Every command that prints a table, on terminals of 80 and 50 columns, with large runs and hostile names."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from observatory.analysis.columns import Column, Table, short_names
from observatory.campaign.batch.campaign_file import CampaignFile, campaign_points
from observatory.campaign.batch.folder import CampaignFolder
from observatory.campaign.grid import CellResult, GridConfig, grid_cells
from observatory.campaign.quickstart_network import NetworkFiles
from observatory.cli import main, output
from observatory.cli.app import _COMMANDS, _GROUPS
from observatory.cli.output import ProgressLines, print_table
from observatory.hpc.site import Site
from observatory.locks.lease import create_lease, lease_path, new_lease
from observatory.run.documents.prefix_cache import ReuseMeasurements
from tests.advice.mitigations.runs import sized_run
from tests.analysis.capacity.configs import QWEN3_30B
from tests.analysis.compare.made import series_of_runs
from tests.analysis.energy.test_prefix_cache import measured
from tests.analysis.exchange.runs import exchange_run
from tests.analysis.exchange.tables import collective
from tests.analysis.frequency.test_telemetry import write_run as write_telemetry
from tests.analysis.provenance.made import place_ranks, placed_rank
from tests.analysis.route_fetch.made import made_result
from tests.collectives.bench.runs import write_captured_run
from tests.conftest import MakeRun
from tests.devices.recordings import write_recording
from tests.devices.synthetic_device import DEVICES, made_sweep
from tests.locks.test_locking import UUID
from tests.reports.sample_benchmarks import a_bench, a_model, a_replay, saved
from tests.reports.sample_power import a_power_run
from tests.reports.sample_runs import manifest, write_run

HOSTILE = "[bold]大規模\u202e\x1b[31m 'x\"\n=1+1" + "very-long-name_without_end/" * 8
LAYERS = 60
#: How lines begin from which on all is copied.
COPIED = ("# to lock", "report: ")
#: They write files, or look at what is being captured.
PRINT_NO_TABLE = {
    *(
        "profile",
        "run",
        "ctl",
        "top",
        "metrics",
        "report",
        "import",
        "export",
        "clocks recover",
        "submit",
        "cancel",
    ),
    *("site init", "site check", "site example"),
}


class Terminal:
    """Runs functions with stdout on a pseudo-terminal, and keeps which tables they print.

    Attributes:
        tables: each printed table, and whether it was printed wide.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.tables: list[tuple[Table, bool]] = []

    def lines(self, shown: Callable[[], object]) -> list[str]:
        """Lines that the terminal receives."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, self.columns, 0, 0))
        chunks: list[bytes] = []

        def read() -> None:
            while True:
                try:
                    chunk = os.read(ours, 1 << 16)
                except OSError:  # the other side is closed
                    return
                chunks.append(chunk)

        reader = threading.Thread(target=read)
        reader.start()
        before = sys.stdout
        try:
            with open(theirs, "w", encoding="utf-8") as stdout:
                sys.stdout = stdout
                shown()
        finally:
            sys.stdout = before
            reader.join()
            os.close(ours)
        return b"".join(chunks).decode().replace("\r\n", "\n").splitlines()


@pytest.fixture(params=[80, 50])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("COLUMNS", raising=False)
    made = Terminal(request.param)

    def kept(table: Table, *, wide: bool = False) -> None:
        made.tables.append((table, wide))
        print_table(table, wide=wide)

    monkeypatch.setattr(output, "print_table", kept)
    return made


def check(lines: list[str], columns: int, tables: list[tuple[Table, bool]]) -> None:
    """No line is too wide, no number folded, and no name lost."""
    assert tables
    for line in lines:
        assert output._width(line) <= columns, line
        assert all(char.isprintable() for char in line), ascii(line)
    words = [set(line.split()) for line in lines]
    together = "".join("".join(lines).split())
    for table, wide in tables:
        assert table.rows
        for column in table.columns:
            if column.wide and not wide:
                continue
            for row in table.rows:
                cell = column.cell(row)
                if not column.text:
                    assert any(set(cell.split()) <= line for line in words), (column.name, cell)
                elif cell.isascii() and cell.isprintable() and len(cell) <= 12:
                    assert "".join(cell.split()) in together


def big_run(path: Path) -> Path:
    described = manifest(HOSTILE, layers=LAYERS, experts=64, top_k=4)
    return write_run(path, described, steps=3, phases=(("prefill", 123_456_789), ("decode", 8)))


def big_exchanges(path: Path) -> Path:
    send = [[0, 10**9, 5, 7]] * 4
    rows = [
        collective(
            [0, 4_000_000, 6, 50], [15_100_000, 15_100_001, 15_200_000, 15_300_000], send,
            layer=layer, role=role, sequence=2 * layer + index, backend=HOSTILE[:40],
        )
        for layer in range(LAYERS)
        for index, role in enumerate(("dispatch", "combine"))
    ]  # fmt: skip
    return exchange_run(path, *rows, name=HOSTILE)


def plan_command(config: Path) -> list[str]:
    config.write_text(json.dumps(QWEN3_30B))
    targets = ["--target-tokens-per-s", "20000", "--context", "4096", "--output", "512"]
    return ["plan", str(config), *targets, "--hardware", "h20", "--mode", "apart", "--wide"]


def a_campaign(folder: Path) -> str:
    """A campaign of which nothing has run."""
    folder.mkdir(exist_ok=True)
    campaign = CampaignFile(models=("tiny-gqa",), ep=(1, 4))
    CampaignFolder(folder).save("mixers", campaign, Site(), campaign_points(campaign))
    return str(folder)


def commands(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Command lines of everything that prints a table and can run here."""
    run, exchanges = str(big_run(tmp / "big")), str(big_exchanges(tmp / "exchanges"))
    model = str(saved(tmp / "fit.json", a_model()))
    bench = str(saved(tmp / "bench.json", a_bench()))
    yield from (["routing", run, *wide] for wide in ([], ["--wide"]))
    yield ["scan", run, "--ep", "4,64"]
    on_nodes = ["scan", run, "--ep", "4", "--network", model, "--gpus-per-node", "2"]
    yield from ([*on_nodes, *wide] for wide in ([], ["--wide"]))
    longer = str(write_run(tmp / "longer", manifest(HOSTILE, layers=2, experts=64, top_k=4), steps=16))
    yield ["place", longer, "--ranks", "4", "--replicas", "4"]
    measured_here = str(saved(tmp / "rf.json", made_result("mla:4,128,32", "expert:256")))
    yield ["route-fetch", "--constants", measured_here, "--layers", "27", "--wide"]
    yield ["advise", str(sized_run(tmp / "sized")), "--ranks", "4", "--hardware", "h100-sxm", "--wide"]
    yield from (["compare", run, longer, *wide] for wide in ([], ["--wide"]))
    (tmp / "rules.toml").write_text('[[rule]]\nmetric = "gini"\nabove = 0\nwindow_steps = 1\n')
    yield from (
        ["history", str(series_of_runs(tmp / "series", model=HOSTILE))],
        ["check", longer, "--rules", str(tmp / "rules.toml")],
        plan_command(tmp / "config.json"),
        ["exchanges", exchanges],
        ["exchanges", exchanges, "--wide"],
    )
    yield ["fit", bench, "--out", str(tmp / "new.json"), "--bootstrap", "10", "--force"]
    yield ["reuse", "show", str(saved(tmp / "reuse.json", measured((37e3, 45e3, 18e3))))]
    power = str(a_power_run(tmp / "power"))
    yield ["energy", power, "--reuse", str(tmp / "reuse.json")]
    yield ["energy", power, "--wide"]
    sweep = made_sweep([DEVICES["knee"], DEVICES["memory-bound"]], caps_w=(320.0,), energy_noise=0.01)
    yield ["clocks", "fit", str(saved(tmp / "sweep.json", sweep)), "--out", str(tmp / "clocks.json"),
           "--bootstrap", "20", "--force", "--wide"]  # fmt: skip
    columns = {"power_mw": 210_000, "enforced_limit_mw": 700_000, "sm_clock_mhz": 1830, "event_reasons": 0}
    telemetry = str(write_telemetry(tmp / "telemetry", columns))
    yield ["clocks", "recommend", str(tmp / "clocks.json"), "--wide"]
    yield ["clocks", "recommend", "--telemetry", telemetry, "--wide"]
    leases = tmp / "leases"
    leases.mkdir(mode=0o700)
    monkeypatch.setenv("OBSERVATORY_LEASES", str(leases))
    create_lease(lease_path(leases, UUID), new_lease(UUID, duration_s=60))
    yield from (["reduce", run], *([name, a_campaign(tmp / "campaign")] for name in ("jobs", "collect")))
    yield from (["clocks", "status"], ["clocks", "unlock"], ["doctor"])
    recording = f"replay:{write_recording(tmp / 'recording.parquet', samples=2000)}"
    yield ["power", "--out", str(tmp / "sampled"), "--device", recording, "--seconds", "0.3"]
    keep_results(tmp, monkeypatch)
    out = str(tmp / "result.json")
    for wide in ([], ["--wide"]):
        for algorithm in ("flat", "all"):
            yield ["bench", "alltoall", "--algorithm", algorithm, "--out", out, "--force", *wide]
        yield ["bench", "experts", "--shape", "8,8,4,2", "--assignments", "4,8,16,32", "--activated", "1,2,4",
               "--repeats", "1", "--out", out, "--force", *wide]  # fmt: skip
        yield ["bench", "route-fetch", "--out", out, "--force", *wide]
        captured = str(write_captured_run(tmp / f"captured{len(wide)}"))
        yield ["replay", captured, "--out", out, "--force", *wide]
        yield [
            "clocks",
            "sweep",
            "--device",
            recording,
            "--out",
            out,
            "--force",
            "--apply",
            *wide,
            "--",
            "true",
        ]
        yield ["reuse", "measure", "tiny-gqa", "--device", recording, "--torch-device", "cpu", "--out", out,
               "--force", *wide]  # fmt: skip
    names = ", ".join(json.dumps(name) for name in (HOSTILE, HOSTILE + "2"))
    (tmp / "grid.toml").write_text(f'models = [{names}]\ndata = ["prose", "code"]\n')
    yield ["grid", str(tmp / "grid.toml"), "--out", str(tmp / "grid")]
    yield ["quickstart", "--out", str(tmp / "quickstart")]
    yield from (["doctor", "--model", HOSTILE], ["doctor", "--run", str(placed(Path(exchanges)))])


def placed(run: Path) -> Path:
    """A run whose second rank states other versions, and long names."""
    named = {"machine": {"name": HOSTILE, "cpu": HOSTILE}, "environment": {HOSTILE[:200]: HOSTILE[:200]}}
    second = placed_rank(1, node=1, versions={"torch": "2"}, **named)
    return place_ranks(run, placed_rank(0, node=0), second)


def keep_results(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stored results in the place of ranks, models and a GPU; the commands print them."""
    run = write_run(tmp / "cell", manifest(HOSTILE, layers=2, experts=64, top_k=4), steps=3)
    prefills = measured((37e3, 45e3, 18e3)).model_copy(update={"model": HOSTILE})
    sweep = made_sweep([DEVICES["knee"]], caps_w=(320.0,))
    layers = [
        {"layer": i, "module": f"layers.{i}.{HOSTILE}", "experts": 10**9, "top_k": 8, "shared_experts": 1,
         "null_experts": 0, "how": "logits", "verified": [{"by": "rows", "reason": HOSTILE}]}
        for i in range(3)
    ]  # fmt: skip

    def cells(config: GridConfig, _out: Path, **_: object) -> list[CellResult]:
        return [CellResult(cell=cell, run=run, state="kept") for cell in grid_cells(config)]

    def reuse(_job: object, _workloads: object, out: Path, **_: object) -> ReuseMeasurements:
        saved(out, prefills)
        return prefills

    for name, stored in {
        "campaign.benchmark.run_benchmark": lambda plan, **_: (
            a_replay(layers=range(LAYERS)) if plan.kind == "replay" else a_bench(repeats=2)
        ),
        "campaign.benchmark.run_route_fetch_benchmark": lambda *_, **__: made_result(
            "mla:4,128,32", "expert:8"
        ),
        "cli.clocks.sweep._run": lambda *_, **__: sweep,
        "campaign.prefix_cache.check_same_device": lambda *_: None,
        "campaign.prefix_cache.cached_prefills": lambda *_, **__: contextlib.nullcontext({}),
        "campaign.prefix_cache.run_reuse": reuse,
        "cli.cells.run_grid": cells,
        "campaign.quickstart.quickstart_exchanges": lambda *_, **__: [run],
        "campaign.quickstart.quickstart_simulated": lambda *_, **__: [],
        "campaign.quickstart_network.quickstart_network": lambda *_, **__: NetworkFiles(
            bench=(), replay=run, model=tmp / "fit.json"
        ),
        "campaign.quickstart_network.quickstart_route_fetch": lambda *_, **__: tmp / "rf.json",
        "campaign.quickstart_plan.quickstart_plan": lambda *_, **__: tmp / "plan.json",
        "reports.write_report": lambda *_, **__: tmp / "report.html",
        "cli.doctor._layers": lambda *_, **__: (layers, None),
    }.items():
        monkeypatch.setattr(f"observatory.{name}", stored)


@pytest.mark.slow
def test_tables_of_commands_fit_the_terminal(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    shown: set[str] = set()
    for argv in commands(tmp_path, monkeypatch):
        terminal.tables.clear()
        codes.clear()
        lines = terminal.lines(lambda argv=argv: codes.append(main(argv)))  # type: ignore[misc]
        assert codes[0] in ((1,) if argv[0] == "check" else (0, 3)), argv
        shown.add(" ".join(argv[:2]) if argv[0] in _GROUPS else argv[0])
        # Commands and paths, which are copied, are never folded.
        copied = next((i for i, line in enumerate(lines) if line.startswith(COPIED)), len(lines))
        assert copied == len(lines) or any(len(line) > terminal.columns for line in lines[copied:])
        check(lines[:copied], terminal.columns, terminal.tables)
    assert shown == set(_COMMANDS) - PRINT_NO_TABLE


TEXTS = st.text(max_size=40)
NUMBERS = st.one_of(st.none(), st.integers(-(10**14), 10**14), st.floats(allow_nan=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), width=st.integers(40, 120))
def test_any_table_fits_any_terminal(data: st.DataObject, width: int) -> None:
    names = [f"c{index}" for index in range(data.draw(st.integers(1, 9)))]
    columns = tuple(
        Column(
            name=name,
            title=data.draw(st.sampled_from(["x", "a long title", "GB/s"])),
            text=data.draw(st.booleans()),
            key=index == 0,
        )
        for index, name in enumerate(names)
    )
    rows = [
        {column.name: data.draw(TEXTS if column.text else NUMBERS) for column in columns}
        for _ in range(data.draw(st.integers(1, 2)))
    ]
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_terminal_width", lambda: width)
        patch.setattr(output, "print_lines", lines.extend)
        print_table(Table(name="t", columns=columns, rows=rows))
    check(lines, width, [(Table(name="t", columns=columns, rows=rows), False)])


def test_names_that_differ_at_the_end_stay_distinct() -> None:
    names = [f"GPU-5ea1ed00-0000-4000-8000-00000000000{index}" for index in range(8)]
    assert len(set(short_names(names).values())) == 8
    assert short_names(["GPU-5ea1ed00-0000", "GPU-fa4e0000-0000"])["GPU-5ea1ed00-0000"] == "GPU-5ea1ed00"


def test_piped_tables_keep_a_row_on_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routing", str(big_run(tmp_path / "run"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match(r" *\d+  (decode|prefill) .* of 64$", line)]
    assert len(rows) == 2 * LAYERS


def test_csv_has_all_columns_and_no_formula(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routing", str(make_run()), "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["gini"], row["committee"], row["gini_low"]) == ("0.3125", "[3]", "0.3125")
    output._print_csv(
        Table(name="t", columns=(), rows=[{"name": "=cmd()\n,\"'", "x": -1.5, "none": None, "yes": True}])
    )
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row == {"name": "'=cmd() ,\"'", "x": "-1.5", "none": "", "yes": "true"}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--csv", "--json"], "exclude each other"),
        (["--csv", "--table", "nonsense"], "expected one of layers, ranks"),
        (["--table", "ranks"], "give both"),
    ],
)
def test_output_options_that_do_not_fit_are_refused(
    options: list[str], refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(big_exchanges(tmp_path / "run"))
    assert main(["exchanges", run, *options]) == 1
    assert refusal in capsys.readouterr().err


def test_each_table_of_a_command_has_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exchanges", str(big_exchanges(tmp_path / "run")), "--csv", "--table", "ranks"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["source_rank"] for row in rows] == ["0", "1", "2", "3"]


def test_progress_in_a_log_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 10.0, 59.0, 61.0, 90.0, 100.0])
    lines = ProgressLines(now=lambda: next(now))
    for done in (0, 1, 2, 3, 4, 5):
        lines.update("profile", done, 5)
    assert capsys.readouterr().err.splitlines() == [
        "profile: 0 of 5 after 0 s",
        "profile: 3 of 5 after 61 s",
        "profile: 5 of 5 after 100 s",
    ]
