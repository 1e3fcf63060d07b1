"""``observatory clocks fit`` and ``recommend`` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from observatory.analysis.frequency import fit_clocks
from observatory.cli import main
from observatory.run.documents.clock_sweep import ClockSweep
from tests.analysis.frequency.test_telemetry import write_run
from tests.devices.synthetic_device import DEVICES, h200_like_decode, made_sweep

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def sweep() -> ClockSweep:
    return made_sweep(
        [h200_like_decode(8), DEVICES["knee"]],
        caps_w=(320.0, 400.0, 500.0),
        time_noise=0.003,
        energy_noise=0.01,
    )


@pytest.fixture(scope="module")
def model_text(sweep: ClockSweep) -> str:
    return fit_clocks([sweep], bootstrap=20).model_dump_json()


@pytest.fixture
def model_file(model_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "fit.json"
    path.write_text(model_text)
    return path


def complaint(capsys: Capture, *argv: str) -> str:
    """The one line on stderr of a command that ends with exit code 1."""
    assert main(list(argv)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_fit_then_recommend_gives_one_document_each(
    sweep: ClockSweep, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "fit.json"
    path.write_text(sweep.model_dump_json())
    assert main(["clocks", "fit", str(path), "--out", str(out), "--bootstrap", "20", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in fitted["series"]] == [series.name for series in sweep.series]
    assert {"clock_mhz_K", "has_energy", "critical", "optimum", "confounds", "reference"} <= fitted["series"][
        0
    ].keys()
    assert "samples_B" not in fitted["series"][0]
    assert main(["clocks", "recommend", str(out), "--max-slowdown", "0.01", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["max_slowdown"] == 0.01
    first = advice["series"][0]
    assert first["verdict"] == "lock"
    assert 660 <= first["choice"]["sm_clock_mhz"] <= 870
    assert first["choice"]["saving"]["low"] < first["choice"]["saving"]["value"]
    assert first["lock_against_cap"]["verdict"] == "locking beats capping"
    assert {"edp", "ed2p", "points", "behaviour", "measured"} <= first.keys()
    for lines in advice["commands"].values():
        assert any("--lock-gpu-clocks" in line for line in lines)


def test_recommend_prints_the_sentence_and_the_commands(model_file: Path, capsys: Capture) -> None:
    wrapper = "sudo site-lock {uuid} {clock_mhz}"
    assert main(["clocks", "recommend", str(model_file), "--wrapper", wrapper]) == 0
    out = capsys.readouterr().out
    assert "lock to" in out
    assert "of the energy for a slowdown of" in out
    assert "sudo site-lock GPU-5ea1ed00-0000-4000-8000-000000000000 " in out
    assert "nothing was set" in out
    assert "do not lock and unlock around phases or steps" in out


def test_a_run_directory_is_read_as_telemetry(tmp_path: Path, model_file: Path, capsys: Capture) -> None:
    run = write_run(
        tmp_path / "run",
        {"power_mw": 210_000, "enforced_limit_mw": 700_000, "sm_clock_mhz": 1830, "event_reasons": 0},
    )
    assert main(["clocks", "recommend", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"kind", "schema_version", "telemetry", "conclusion"}
    assert document["telemetry"]["devices"][0]["cap"] == "does not bind"
    assert main(["clocks", "recommend", str(model_file), "--telemetry", str(run), "--json"]) == 0
    assert {"telemetry", "series", "commands"} <= json.loads(capsys.readouterr().out).keys()
    assert main(["clocks", "recommend", "--telemetry", str(run)]) == 0
    assert "does not bind" in capsys.readouterr().out


def test_a_result_is_not_replaced_without_force(sweep: ClockSweep, model_file: Path, capsys: Capture) -> None:
    path = model_file.with_name("sweep.json")
    path.write_text(sweep.model_dump_json())
    before = model_file.read_bytes()
    assert "is there already" in complaint(capsys, "clocks", "fit", str(path), "--out", str(model_file))
    assert model_file.read_bytes() == before


def test_nothing_to_go_by_is_said(capsys: Capture) -> None:
    assert "nothing to go by" in complaint(capsys, "clocks", "recommend")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": "9.0"}, "has schema 9.0, this program reads up to 2.0"),
        ({"series": []}, "is not valid"),
        ({"default_limit_mw": 1e999}, "is not valid"),
        ({"default_limit_mw": -5}, "is not valid"),
        ({"device": None}, "is not valid"),
    ],
)
def test_a_hostile_model_is_one_clear_line(
    change: dict[str, object], said: str, model_file: Path, capsys: Capture
) -> None:
    model_file.write_text(json.dumps(json.loads(model_file.read_text()) | change))
    assert said in complaint(capsys, "clocks", "recommend", str(model_file))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("samples_B",), [[0.0] * 21], "takes no time"),
        (("samples_B",), [[1.0] * 6 + [0.0] * 15], "takes no energy"),
        (("samples_B",), [[-1.0] * 21], "greater than or equal to 0"),
        (("samples_B",), [[1.0] * 4], "another number of terms"),
        (("samples_B",), [], "at least 1 item"),
        (("clock_mhz_K",), [1830.0] * 15, "does not rise"),
        (("reference", "sm_clock_mhz"), 100, "the reference's clock is below the lowest"),
        (("reference", "sm_clock_mhz"), 0, "greater than or equal to 1"),
        (("reference", "energy_mj"), 0, "greater than 0"),
        (("settings", 0, "energy_mj_R"), [1.0], "different numbers of repeats"),
    ],
)
def test_a_model_that_contradicts_itself_is_one_clear_line(
    path: tuple[str | int, ...], value: object, said: str, model_file: Path, capsys: Capture
) -> None:
    document = json.loads(model_file.read_text())
    place = document["series"][0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    model_file.write_text(json.dumps(document))
    line = complaint(capsys, "clocks", "recommend", str(model_file))
    assert said in line
    assert line.isprintable()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"schema_version": 1}', "\x00\xff"])
def test_files_that_are_no_documents_are_one_clear_line(
    content: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "made-up.json"
    path.write_bytes(content.encode("latin-1"))
    assert "make one with `observatory clocks fit`" in complaint(capsys, "clocks", "recommend", str(path))
    out = str(tmp_path / "out.json")
    assert "make one with `observatory clocks sweep`" in complaint(
        capsys, "clocks", "fit", str(path), "--out", out
    )
    assert not Path(out).exists()


def test_names_from_a_file_cannot_reach_the_terminal_or_the_shell(
    sweep: ClockSweep, tmp_path: Path, capsys: Capture
) -> None:
    nasty = "\x1b[2J\nrm -rf ~; [red]"
    series = sweep.series[0].model_copy(update={"name": nasty})
    device = sweep.device.model_copy(update={"name": nasty, "uuid": "GPU'; rm -rf ~ #"})
    path, out = tmp_path / "sweep.json", tmp_path / "fit.json"
    path.write_text(
        sweep.model_copy(update={"series": (series, sweep.series[1]), "device": device}).model_dump_json()
    )
    assert main(["clocks", "fit", str(path), "--out", str(out), "--bootstrap", "20"]) == 0
    assert main(["clocks", "recommend", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert not any(line.startswith("rm ") for line in printed.splitlines())
    assert "nvidia-smi -i 'GPU'\"'\"'; rm -rf ~ #' --lock-gpu-clocks" in printed


def test_recommending_loads_neither_torch_nor_plotly(model_file: Path) -> None:
    code = (
        "import sys; from observatory.cli import main; "
        f"assert main(['clocks', 'recommend', {str(model_file)!r}, '--json']) == 0; "
        "assert not {'torch', 'plotly', 'pynvml', 'mpi4py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, stdout=subprocess.DEVNULL)
