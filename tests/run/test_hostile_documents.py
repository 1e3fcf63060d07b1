"""JSON and TOML documents that were made to hurt: one sentence that names the file, whatever is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.analysis.frequency import load_clock_model
from observatory.analysis.network import load_network
from observatory.analysis.network.fitting import fit_network
from observatory.analysis.parallel.placement import load_placement
from observatory.campaign.benchmark import run_benchmark
from observatory.campaign.grid import load_grid
from observatory.campaign.sweep.journal import (
    JournalHead,
    JournalPoint,
    JournalSeries,
    append_line,
    read_journal,
)
from observatory.cli import main
from observatory.errors import ClockError, ExchangeError, LoadError, ObservatoryError, RunFormatError
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json
from observatory.run.documents.bench import BenchPlan, BenchResult, Traffic, load_bench
from observatory.run.documents.clock_sweep import load_sweep
from observatory.run.documents.expert_bench import load_expert_bench
from observatory.run.documents.prefix_cache import load_reuse
from observatory.run.flight_recorder import read_recorder_dump
from observatory.run.manifest import DeviceSpec
from tests.run.conftest import manifest_of

READERS = {
    "bench": load_bench,
    "experts": load_expert_bench,
    "network": load_network,
    "clocks": load_clock_model,
    "sweep": load_sweep,
    "reuse": load_reuse,
    "placement": load_placement,
    "recorder": read_recorder_dump,
    "grid": load_grid,
    "journal": read_journal,
}

HOSTILE: dict[str, bytes] = {
    "a number of 5000 digits": b'{"schema_version": ' + b"9" * 5000 + b"}\n",
    "a number too large": b'{"schema_version": "1.0", "x": 1e400}\n',
    "NaN": b'{"schema_version": NaN}\n',
    "a key twice": b'{"schema_version": "1.0", "schema_version": "1.0"}\n',
    "deep": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
    "UTF-16": '{"schema_version": "1.0"}\n'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}\n",
    "no UTF-8": b'{"schema_version": "\xff\xfe"}\n',
    "zero bytes": b"\0" * 1000 + b"\n",
    "empty": b"",
    "a list": b"[1, 2]\n",
    "a surrogate": b'{"schema_version": "\\ud800"}\n',
    "too large": b"[" + b"0," * (MAX_DOCUMENT_BYTES // 2) + b"0]\n",
}


def refused(reader: object, path: Path) -> str:
    with pytest.raises(ObservatoryError) as caught:
        reader(path)  # type: ignore[operator]
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1000
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", READERS)
def test_hostile_content_is_one_sentence(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "document"
    path.write_bytes(HOSTILE[name])
    refused(READERS[kind], path)


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null"), tmp_path / "absent"):
        refused(READERS[kind], path)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("file", ["run.json", "ranks/rank-00000.json"])
def test_hostile_manifests_are_one_sentence(tmp_path: Path, name: str, file: str) -> None:
    RunWriter.create(tmp_path / "run", manifest_of()).close()
    (tmp_path / "run" / file).write_bytes(HOSTILE[name])
    if file == "run.json":
        refused(open_run, tmp_path / "run")
    else:
        assert any(
            "rank-00000.json cannot be used" in problem for problem in open_run(tmp_path / "run").problems
        )


@pytest.mark.parametrize(
    "change",
    [
        {"created_unix_s": 1e300}, {"created_unix_s": -1}, {"window_steps": 10**30},
        {"topology": {"ranks": 10**30}}, {"topology": {"ranks": 2, "node_of_rank": [0, 10**30]}},
        {"topology": {"ranks": 2, "placement": [[10**30]]}}, {"model": {"name": "m", "hidden_size": 10**30}},
        {"model": {"name": "m", "expert_bytes": 2**62}},
        {"model": {"name": "m", "moe_layers": [{"layer": 10**30, "module": "x", "experts": 4}]}},
        {"devices": [{"kind": "cuda", "enforced_limit_mw": 10**30}]},
    ],
)  # fmt: skip
def test_numbers_beyond_their_meaning_are_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    RunWriter.create(tmp_path / "run", manifest_of()).close()
    path = tmp_path / "run/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert next(iter(change)) in refused(open_run, tmp_path / "run")


def test_a_key_that_stands_twice_is_named() -> None:
    with pytest.raises(ValueError, match="the key 'b' stands twice in one object"):
        parse_json(b'{"a": 1, "b": 2, "c": {"b": 1}, "b": 3}')
    assert parse_json(b'{"a": {"b": 1}, "b": 2.5}') == {"a": {"b": 1}, "b": 2.5}


def bench_document(cases: int) -> dict[str, object]:
    generator = np.random.default_rng(0)
    sent = generator.integers(1, 1 << 20, cases).tolist()
    return {
        "schema_version": "1.1", "kind": "alltoall", "created_unix_s": 1, "backend": "gloo",
        "node_of_P": [0, 0],
        "warmup": 0, "repeats": 1, "iterations": 1,
        "cases": [
            {
                "pattern": f"p{index}", "send_bytes_PP": [[size, size // 2], [size // 3, size]],
                "algorithm": "flat", "rank_us_RP": [[10 + size / 1000] * 2], "correct": True,
            }
            for index, size in enumerate(sent)
        ],
    }  # fmt: skip


def test_nodes_beyond_any_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_document(1) | {"node_of_P": [0, 10**30]}))
    assert "node_of_P" in refused(load_bench, path)


def test_of_very_many_matrices_a_sample_is_fitted() -> None:
    model = fit_network([BenchResult.model_validate(bench_document(5000))], bootstrap=2)
    assert model.fits[0].cases == 2048
    assert model.notes == ("flat: 2048 of 5000 matrices were fitted, drawn at random",)
    assert model.fits[0].scores[0].median_error < 0.01


ROUTING: dict[str, dict[str, object]] = {
    "tokens": {"tokens_N": 2**63 - 1},
    "step": {"step_N": 2**63 - 1},
    "load": {"load_NE": np.full((1, 4), 2**61)},
}


@pytest.mark.parametrize("name", ROUTING)
def test_counts_whose_sums_would_overflow_are_refused(tmp_path: Path, name: str) -> None:
    good = {"step_N": 0, "tokens_N": 1, "load_NE": np.ones((1, 4), np.int64)}
    rows = routing_rows(phase_N="decode", layer_N=0, source_rank=0, **{**good, **ROUTING[name]})  # type: ignore[arg-type]
    run = planted(tmp_path, "routing", pa.Table.from_batches([rows]))
    with pytest.raises((RunFormatError, LoadError), match=f"part-000000.parquet: column {name} holds"):
        list(open_run(run).iter_loads())
    if name != "load":
        with pytest.raises((RunFormatError, LoadError), match=r"part-000000\.parquet"):
            open_run(run).routed_tokens()


def planted(folder: Path, table: str, rows: pa.Table) -> Path:
    run = folder / "run"
    RunWriter.create(run, manifest_of()).close()
    (run / table / "rank-00000").mkdir(parents=True)
    pq.write_table(rows, run / table / "rank-00000" / "part-000000.parquet")
    return run


SPAN = {"step": 0, "phase": "decode", "source_rank": 0, "name": "x", "start_ns": 0, "end_ns": 1}
SAMPLE = {"time_ns": 0, "device_uuid": "GPU-1", "power_mw": 1, "energy_mj": 1, "sm_clock_mhz": 1}
COLLECTIVE = {
    "step": 0, "phase": "decode", "source_rank": 0, "role": "dispatch", "group": "world", "sequence": 0,
    "start_ns": 0, "end_ns": 1, "send_bytes": [1],
}  # fmt: skip
VALUES = [
    ("spans", SPAN, "start_ns", 2**63 - 1), ("spans", SPAN, "end_ns", -(2**63)), ("spans", SPAN, "step", -1),
    ("spans", SPAN, "step", 2**62), ("power", SAMPLE, "time_ns", -(2**63)), ("power", SAMPLE, "power_mw", -1),
    ("power", SAMPLE, "power_mw", 2**63 - 1), ("power", SAMPLE, "energy_mj", -5),
    ("power", SAMPLE, "sm_clock_mhz", -7), ("exchange", COLLECTIVE, "sequence", -1),
    ("exchange", COLLECTIVE, "send_bytes", [-1]), ("exchange", COLLECTIVE, "send_bytes", [2**63 - 1]),
    ("exchange", COLLECTIVE, "end_ns", 2**62),
]  # fmt: skip


@pytest.mark.parametrize(("table", "row", "name", "value"), VALUES)
def test_impossible_values_are_refused_by_column(
    tmp_path: Path, table: str, row: dict[str, object], name: str, value: object
) -> None:
    kinds = {"source_rank": pa.int32(), "sm_clock_mhz": pa.int32()}
    changed = {**row, name: value}
    rows = pa.table({key: pa.array([item], kinds.get(key)) for key, item in changed.items()})
    shown = value[0] if isinstance(value, list) else value
    with pytest.raises(RunFormatError, match=rf"part-000000\.parquet: column {name} holds {shown}"):
        list(open_run(planted(tmp_path, table, rows)).iter_rows(table))


def test_commands_show_one_sentence_and_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_bytes(HOSTILE["deep"])
    for words in (
        ["fit", str(bad), "--out", str(tmp_path / "o.json")],
        ["clocks", "fit", str(bad), "--out", str(tmp_path / "o.json")],
        ["clocks", "recommend", str(bad)],
        ["reuse", "show", str(bad)],
        ["grid", str(bad), "--out", str(tmp_path / "grid")],
    ):
        assert main(words) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert "unexpected" not in line
        assert "bad.json" in line


def test_a_benchmark_whose_result_could_not_be_read_is_refused_before_it_runs() -> None:
    traffic = Traffic(pattern="p", send_bytes_PP=((1, 1), (1, 1)))
    plan = BenchPlan(
        kind="alltoall", algorithms=("flat",), warmup=0, repeats=100_000, iterations=1, traffic=(traffic,) * 9
    )
    with pytest.raises(ExchangeError, match="on 2 ranks would be 68 MiB, over 16; measure fewer"):
        run_benchmark(plan, ranks=2, backend="gloo", ranks_per_node=None)


def test_windows_of_a_sweep_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.points.jsonl"
    head = JournalHead(
        device=DeviceSpec(kind="cuda"), series=(JournalSeries(name="s"),), supported_sm_clocks_mhz=(1000,)
    )
    append_line(path, head, fresh=True)
    for order, (start, end) in enumerate([(0, 10), (20, 30), (9, 15)]):
        append_line(
            path,
            JournalPoint(order=order, repeat=0, series=0, start_ns=start, end_ns=end, iterations=1),
        )
    with pytest.raises(ClockError, match=f"{path}: windows 0 and 2 overlap"):
        read_journal(path)
