"""Small Parquet files that decode to much, or whose footers lie, are refused before memory is spent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.devices.replay import ReplayDevice
from observatory.errors import DeviceError, RunFormatError
from observatory.run import RunWriter, open_run
from observatory.run.tables import (
    AUXILIARY_LOSS_SCHEMA,
    EXCHANGE_SCHEMA,
    POWER_SCHEMA,
    ROUTER_BIAS_SCHEMA,
    SPAN_SCHEMA,
    TOKENS_SCHEMA,
    routing_schema,
)
from tests.run.conftest import manifest_of
from tests.run.parquet_bombs import Column, parquet_file, table_columns

SCHEMAS = {
    "exchange": EXCHANGE_SCHEMA, "spans": SPAN_SCHEMA, "power": POWER_SCHEMA, "tokens": TOKENS_SCHEMA,
    "router_bias": ROUTER_BIAS_SCHEMA, "auxiliary_loss": AUXILIARY_LOSS_SCHEMA,
}  # fmt: skip

_READER = """
import sys
from observatory.errors import ObservatoryError
from observatory.run import open_run
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
before, said = peak(), "read"
try:
    run = open_run(sys.argv[1])
    for _ in run.iter_loads():
        pass
    run.routed_tokens()
    frames = [run.exchanges(), run.spans(), run.power(), run.token_samples(), run.auxiliary_losses()]
    said = "; ".join(run.problems) or said
except ObservatoryError as error:
    said = str(error)
print(peak() - before)
print(said)
"""


def planted(folder: Path, table: str, content: bytes) -> Path:
    """A run whose only part of a table is this file."""
    run = folder / "run"
    RunWriter.create(run, manifest_of()).close()
    part = run / table / "rank-00000" / "part-000000.parquet"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return run


def file_of(table: str, rows: int, groups: int = 1, experts: int = 4, **changes: object) -> bytes:
    schema = routing_schema(experts) if table == "routing" else SCHEMAS[table]
    claimed = changes.pop("claimed_rows", None)
    if table == "routing":
        changes = {"window_steps": {"value": 1}, **changes}
    return parquet_file(table_columns(schema, **changes), rows, groups=groups, claimed_rows=claimed)


PAGE = b"\0" * (8 * 20_000_000)
BOMBS: dict[str, tuple[str, dict[str, object], str]] = {
    "long text": ("exchange", {"rows": 60_000, "group": {"value": "g" * 65536}}, "holds a text of 65536"),
    "texts that multiply": (
        "exchange",
        {"rows": 60_000, "group": {"value": "g" * 16000}},
        "out of proportion to the size of the file",
    ),
    "huge name": ("power", {"rows": 2000, "device_uuid": {"value": "u" * (50 << 20)}}, "says 2000 rows of"),
    "long lists": ("exchange", {"rows": 200, "send_bytes": {"entries": 10**6}}, "says 200 rows of"),
    "one long list": ("tokens", {"rows": 1, "expert_ids": {"entries": 2 * 10**8}}, "says 1 rows of"),
    "constant rows": ("spans", {"rows": 10**9}, "says 1000000000 rows of"),
    "rows that the footer hides": ("spans", {"rows": 10**8, "claimed_rows": 1000}, "says 1000 rows of"),
    "many row groups": ("spans", {"rows": 100_000, "groups": 500}, "say that they hold 50000000 rows"),
    "wide rows": ("routing", {"rows": 10_000, "experts": 65536}, "says 10000 rows of"),
    "many wide row groups": (
        "routing",
        {"rows": 20, "groups": 200, "experts": 65536},
        "say that they hold 4000 rows",
    ),
    "values that the footer hides": (
        "tokens",
        {"rows": 1, "expert_ids": {"entries": 2 * 10**8, "claims": {"values": 8, "decompressed": 999}}},
        "column expert_ids.list.element: its pages",
    ),
    "a page that the footer hides": (
        "spans",
        {
            "rows": 20_000,
            "start_ns": {"page": PAGE, "pages": {"encoding": 0}, "claims": {"decompressed": 160_100}},
        },
        "column start_ns: its pages take 160000008 bytes",
    ),
    "a page of 2 GB": ("spans", {"rows": 9, "end_ns": {"pages": {"size": 2**31 - 1}}}, "column end_ns: its"),
    "a dictionary of 2^31": (
        "spans",
        {"rows": 9, "end_ns": {"pages": {"entries": 2**31 - 1}}},
        "column end_ns: a dictionary of 8 bytes says that it has 2147483647 entries",
    ),
    "prefixes that multiply": (
        "spans",
        {"rows": 9, "name": {"pages": {"encoding": 7}}},
        "column name: its encoding is DELTA_BYTE_ARRAY",
    ),
    "negative sizes": ("spans", {"rows": 9, "end_ns": {"claims": {"values": -9}}}, "has a negative size"),
    "pages elsewhere": ("spans", {"rows": 9, "end_ns": {"claims": {"start": 2**62}}}, "column end_ns: "),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory_and_is_one_sentence(tmp_path: Path, name: str) -> None:
    table, options, message = BOMBS[name]
    content = file_of(table, **options)  # type: ignore[arg-type]
    assert len(content) < 1 << 20
    run = planted(tmp_path, table, content)
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(run)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    grown, said = done.stdout.splitlines()
    assert message in said
    assert "part-000000.parquet" in said
    assert int(grown) < 500e6


def test_a_recording_that_multiplies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    for options, message in (
        ({"rows": 10**8}, "recording .*samples.parquet: row group 0 says 100000000 rows"),
        ({"rows": 50_000, "device_uuid": {"value": "u" * 16000}}, "out of proportion"),
        ({"rows": 9, "energy_mj": {"claims": {"values": 3}}}, "column energy_mj: its footer says 3 values"),
    ):
        path.write_bytes(file_of("power", **options))  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match=message):
            ReplayDevice(path)


def test_honest_files_by_hand_are_read(tmp_path: Path) -> None:
    run = open_run(
        planted(tmp_path, "exchange", file_of("exchange", 5, 2, send_bytes={"entries": 3, "value": 7}))
    )
    frame = run.exchanges()
    assert run.problems == ("the run was never closed",) or not run.problems
    assert [list(row) for row in frame["send_bytes"]] == [[7, 7, 7]] * 10
    assert frame["phase"].tolist() == ["decode"] * 10


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd"])
def test_pages_of_every_codec_are_checked(tmp_path: Path, codec: str) -> None:
    start = {"page": PAGE, "codec": codec, "pages": {"encoding": 0}, "claims": {"decompressed": 160_100}}
    content = file_of("spans", 20_000, start_ns=start)
    run = open_run(planted(tmp_path, "spans", content))
    assert run.spans().empty
    assert "column start_ns: its pages take" in run.problems[-1]


def test_columns_of_other_kinds_and_in_great_number_are_refused(tmp_path: Path) -> None:
    further = {f"c{i}": Column(name=f"c{i}", kind=pa.int64()) for i in range(200)}
    run = planted(tmp_path, "spans", file_of("spans", 1, **further))
    with pytest.raises(RunFormatError, match="has 205 columns; expected at most 128"):
        open_run(run)
    rows = pq.read_table(run / "spans/rank-00000/part-000000.parquet", columns=SPAN_SCHEMA.names[:2])
    pq.write_table(
        rows.append_column("deep", pa.array([[{"a": [1]}]])), run / "spans/rank-00000/part-000000.parquet"
    )
    with pytest.raises(
        RunFormatError, match=r"column deep is list.*; expected numbers, texts, or lists of them"
    ):
        open_run(run)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    run = open_run(planted(tmp_path, "spans", file_of("spans", 3, name={"value": b"\xff\xfe"})))
    with pytest.raises(RunFormatError, match="column name holds bytes that are no UTF-8 text"):
        run.spans()


def test_constant_rows_of_our_own_writer_are_read(tmp_path: Path) -> None:
    count = 300_000
    with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
        columns = {
            place.name: pa.array(["decode" if place.name == "phase" else "x"] * count)
            if place.type == pa.string()
            else pa.array([0] * count, place.type)
            for place in TOKENS_SCHEMA
            if place.name != "expert_ids"
        }
        ids = pa.array([[1, 2, 3, 4, 5, 6, 7, 8]] * count, pa.list_(pa.int32()))
        writer.append("tokens", pa.table({**columns, "expert_ids": ids}))
    run = open_run(tmp_path / "run")
    size = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.parquet"))
    assert sum(rows.nbytes for rows in run.iter_rows("tokens")) > 400 * size
    assert run.problems == ()
