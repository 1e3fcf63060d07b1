"""What commands spend on files made to do harm: memory and time, each in a process of its own.

    python benchmarks/hostile_files.py [--kind NAME] [--json]

Protocol: each file is built by hand or from a seed (under 1 MiB each), put into a run directory, and every
command that reads it is started on it as a fresh process under an address-space limit of 8 GB. ``grown`` is
the peak of its resident memory (VmHWM) beyond that of the same command on a harmless file. The exit code is 1
when a command took more than 1 GB or 20 s, ended with anything else than 0 or 1, or showed an error that was
not foreseen.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from observatory.run import RunWriter
from observatory.run.manifest import Manifest, ModelSpec
from observatory.run.tables import EXCHANGE_SCHEMA, POWER_SCHEMA, SPAN_SCHEMA, TOKENS_SCHEMA, routing_schema
from tests.run.parquet_bombs import Column, parquet_file, table_columns

MOST_BYTES, MOST_SECONDS, MOST_FILE_BYTES = 1e9, 20.0, 1 << 20
ADDRESS_SPACE = 8 << 30
SCHEMAS = {"exchange": EXCHANGE_SCHEMA, "spans": SPAN_SCHEMA, "power": POWER_SCHEMA, "tokens": TOKENS_SCHEMA}
COMMANDS = {
    "routing": ("routing RUN", "scan RUN --ep 1", "report RUN --out OUT", "replay RUN --out OUT"),
    "exchange": ("exchanges RUN", "report RUN --out OUT", "export RUN chrome-trace --out OUT/trace.json"),
    "spans": ("exchanges RUN", "report RUN --out OUT", "export RUN chrome-trace --out OUT/trace.json"),
    "power": (
        "energy RUN",
        "report RUN --out OUT",
        "export RUN chrome-trace --out OUT/trace.json",
        "power --out OUT/new --device replay:PART --calibrate-s 0 --seconds 0.2",
        "power --out OUT/new --device replay:RUN --calibrate-s 0 --seconds 0.2",
        "clocks recommend --telemetry RUN",
    ),
    "tokens": ("routing RUN", "report RUN --out OUT"),
}
#: Runs a command, then writes the peak of its memory: what ``wait4`` gives counts the parent's as well.
CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from observatory.cli import main
try:
    code = main(sys.argv[3:])
finally:
    status = open("/proc/self/status").read()
    peak = status.partition("VmHWM:")[2].split()[0]
    open(sys.argv[1], "w").write(str(int(peak) * 1024))
sys.exit(code)
"""
Kind = tuple[str, Callable[[], bytes]]


def of(table: str, rows: int, groups: int = 1, experts: int = 4, **changes: object) -> Kind:
    """A file of equal rows."""
    schema = routing_schema(experts) if table == "routing" else SCHEMAS[table]
    claimed = changes.pop("claimed_rows", None)
    metadata = changes.pop("metadata", None)
    if table == "routing":
        changes = {"window_steps": {"value": 1}, **changes}
    return table, lambda: parquet_file(
        table_columns(schema, **changes), rows, groups=groups, claimed_rows=claimed, metadata=metadata
    )


def kinds() -> dict[str, Kind]:
    """File of each kind by name."""
    long = 64 * 1024
    found: dict[str, Kind] = {
        "one text of 64 KiB, 60,000 rows": of("exchange", 60_000, group={"value": "g" * long}),
        "a name of 50 MiB": of("power", 2000, device_uuid={"value": "u" * (50 << 20)}),
        "a name of 900 KiB, 50,000 rows": of(
            "power", 50_000, device_uuid={"value": "u" * 900_000, "codec": "none"}
        ),
        "lists of 10^6 entries": of("exchange", 200, send_bytes={"entries": 1_000_000, "value": 8}),
        "a list of 2 * 10^8 entries": of("exchange", 1, send_bytes={"entries": 200_000_000, "value": 8}),
        "10^9 rows of one value": of("spans", 1_000_000_000),
        "10^8 rows in the pages, 1000 in the footer": of("spans", 100_000_000, claimed_rows=1000),
        "10^8 rows in 1000 row groups": of("spans", 100_000, groups=1000),
        "row groups as many as fit, 10,000 rows each": of("spans", 10_000, groups=1300),
        "10^7 samples": of("power", 10_000_000),
        "as many samples as are read": of("power", 20_000, groups=12),
        "10^8 loads of one expert": of("routing", 10_000_000, groups=10, experts=1),
        "as many loads of one expert as are read": of("routing", 100_000, groups=10, experts=1),
        "65536 experts, 10,000 rows": of("routing", 10_000, experts=65536, load={"value": 0}),
        "65536 experts, row groups of 20 rows": of("routing", 20, groups=180, experts=65536),
        "2 * 10^8 expert ids of a token": of("tokens", 1, expert_ids={"entries": 200_000_000}),
        "10^8 tokens": of("tokens", 10_000_000, expert_ids={"entries": 8}, groups=10),
        "as many tokens as are read": of("tokens", 100_000, expert_ids={"entries": 8}, groups=10),
        "a page that says 2 GB": of("spans", 1000, start_ns={"pages": {"size": 2**31 - 1}}),
        "a dictionary that says 2^31 entries": of("spans", 1000, start_ns={"pages": {"entries": 2**31 - 1}}),
        "a footer of negative numbers": of("spans", 1000, start_ns={"claims": {"values": -1, "stored": -5}}),
        "a footer of huge numbers": of("spans", 1000, end_ns={"claims": {"values": 2**62, "stored": 2**62}}),
        "2^62 rows in the footer": of("spans", 1000, claimed_rows=2**62),
        "-1 rows in the footer": of("spans", 1000, claimed_rows=-1),
        "5000 columns": of(
            "spans", 10, **{f"c{i}": Column(name=f"c{i}", kind=pa.int64()) for i in range(5000)}
        ),
        "100 further columns of texts": of(
            "spans", 60_000,
            **{f"c{i}": Column(name=f"c{i}", kind=pa.string(), value="x" * 4096) for i in range(100)},
        ),
        "key and value of 900 KB": of("spans", 10, metadata={b"k" * 100: b"v" * 900_000}),
        "an Arrow schema of rubbish": of("spans", 10, metadata={b"ARROW:schema": b"QUFBQUFBQUE=" * 20}),
        "bytes that are no text": of("spans", 10, name={"value": b"\xff\xfe\x80"}),
    }  # fmt: skip
    found |= {
        "as many regular spans as are read": ("spans", lambda: regular("spans", 520_000)),
        "as many regular samples as are read": ("power", lambda: regular("power", 520_000)),
        "as many regular exchanges as are read": ("exchange", lambda: regular("exchange", 260_000)),
        "as many regular loads as are read": ("routing", lambda: regular("routing", 1_000_000)),
        "regular loads in reverse order": ("routing", lambda: regular("routing", 1_000_000, backwards=True)),
        "as many regular tokens as are read": ("tokens", lambda: regular("tokens", 1_000_000)),
    }
    for codec in ("zstd", "gzip", "brotli", "snappy"):
        page = b"\0" * (8 * 20_000_000)
        found[f"a plain page of 160 MB by {codec}"] = of(
            "spans", 20_000_000, start_ns={"page": page, "codec": codec, "pages": {"encoding": 0}}
        )
    return found


def regular(table: str, rows: int, *, backwards: bool = False) -> bytes:
    """Rows that could be true and cost next to nothing in the file, in row groups of 30,000."""
    order = np.arange(rows)[:: -1 if backwards else 1]
    step = {"spans": order // 4, "exchange": order // 4, "tokens": order // 100}.get(table, order)
    columns: dict[str, pa.Array] = {"step": step}
    constants = {"layer": 0, "source_rank": 0, "window_steps": 1, "tokens": 4, "assignments": 4}
    texts = {"phase": "decode", "name": "x", "role": "dispatch", "group": "world", "device_uuid": "GPU-1"}
    schema = routing_schema(1) if table == "routing" else SCHEMAS[table]
    for place in schema:
        if place.name in ("send_bytes", "receive_bytes"):
            columns[place.name] = pa.array([[8] * 8] * rows, place.type)
        elif place.name == "expert_ids":
            columns[place.name] = pa.array([[1, 2, 3, 4, 5, 6, 7, 8]] * rows, place.type)
        elif place.name == "load":
            columns[place.name] = pa.FixedSizeListArray.from_arrays(pa.array(np.full(rows, 4)), 1)
        elif place.name in ("start_ns", "time_ns", "end_ns"):
            columns[place.name] = order * 1_000_000 + (900_000 if place.name == "end_ns" else 0)
        elif place.name in ("position", "sequence", "energy_mj"):
            columns[place.name] = order % 100 if place.name == "position" else order
        elif place.name in texts:
            columns[place.name] = pa.array([texts[place.name]] * rows)
        elif place.name in constants:
            columns[place.name] = pa.array(np.full(rows, constants[place.name]), place.type)
        elif place.name == "power_mw":
            columns[place.name] = np.full(rows, 1000)
    packed = {
        place.name: "DELTA_BINARY_PACKED"
        for place in schema
        if place.name in columns and place.type in (pa.int64(), pa.int32())
    }
    out = io.BytesIO()
    pq.write_table(
        pa.table({place.name: columns[place.name] for place in schema if place.name in columns}),
        out,
        row_group_size=30_000,
        compression="zstd",
        use_dictionary=[place.name for place in schema if place.name in columns and place.name not in packed],
        column_encoding=packed,
    )
    return out.getvalue()


def build(folder: Path, kind: Kind) -> dict[str, Path]:
    """A run that holds the file as its only part of the table, next to a harmless one."""
    table, make = kind
    run = folder / "run"
    manifest = Manifest(run_id="r", created_unix_s=1.0, model=ModelSpec(name="m"))
    RunWriter.create(run, manifest).close()
    part = run / table / "rank-00000" / "part-000000.parquet"
    for name in ("routing", "power", "spans"):
        harmless = run / name / "rank-00000" / "part-000000.parquet"
        harmless.parent.mkdir(parents=True)
        harmless.write_bytes(of(name, 9 if name == "power" else 3)[1]())
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(make())
    return {"RUN": run, "PART": part}


def measure(command: str, places: dict[str, Path]) -> dict[str, object]:
    """Run one command and say what it spent."""
    with tempfile.TemporaryDirectory() as out:
        words = command
        for name, path in {**places, "OUT": Path(out) / "out"}.items():
            words = words.replace(name, str(path))
        if "report" in command:
            words += "/r.html"
        Path(out, "out").mkdir()
        if "replay RUN" in command:
            words += "/replay.json"
        report = Path(out, "peak")
        program = [sys.executable, "-c", CHILD, str(report), str(ADDRESS_SPACE), *words.split()]
        with tempfile.TemporaryFile() as output:
            started = time.monotonic()
            process = subprocess.Popen(program, stdout=output, stderr=output)
            try:
                process.wait(MOST_SECONDS * 4)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            seconds = time.monotonic() - started
            output.seek(0)
            text = output.read().decode("utf-8", "replace")
        peak = int(report.read_text()) if report.exists() else ADDRESS_SPACE
    errors = [line for line in text.splitlines() if line.startswith("observatory: ")]
    return {
        "command": command,
        "exit": process.returncode,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "said": (errors or text.splitlines() or [""])[-1][:300],
        "unforeseen": "Traceback" in text or "unexpected" in text,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", help="only kinds whose name holds this")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    ordinary: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for table, commands in COMMANDS.items():
            places = build(Path(folder) / table, of(table, 9))
            for command in commands:
                peak = int(str(measure(command, places)["peak_bytes"]))
                ordinary[command] = max(ordinary.get(command, 0), peak)
    rows, bad = [], 0
    for name, kind in kinds().items():
        if options.kind and options.kind not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            places = build(Path(folder), kind)
            size = places["PART"].stat().st_size
            for command in COMMANDS[kind[0]]:
                found = measure(command, places)
                grown = int(str(found["peak_bytes"])) - ordinary[command]
                row = {"kind": name, "file_bytes": size, "grown_bytes": grown, **found}
                within = grown < MOST_BYTES and float(str(found["seconds"])) < MOST_SECONDS
                row["met"] = within and found["exit"] in (0, 1) and not found["unforeseen"]
                bad += not row["met"] and size <= MOST_FILE_BYTES
                rows.append(row)
                if not options.json:
                    print(
                        f"{'  ' if row['met'] else '! '}{name} ({size / 1024:.0f} KiB), "
                        f"{command}: exit {row['exit']}, {row['seconds']} s, "
                        f"grown {grown / 1e6:.0f} MB; {row['said'][:160]}",
                        flush=True,
                    )
    if options.json:
        print(json.dumps(rows, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
