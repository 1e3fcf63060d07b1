"""Where points stand, of what their folders and the scheduler state; and what elements of arrays do."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from observatory.cli import main
from observatory.hpc import slurm
from tests.campaign.batch.conftest import Login, commands
from tests.fake_slurm import until

_PBS = 'scheduler = "pbs"\n[batch]\ntime = "00:10:00"\n[environment]\nlauncher = "mpiexec"\n'


def test_a_point_is_queued_then_running_then_done(login: Login) -> None:
    login.submit(commands("one", script="until [ -e $1/../../go ]; do sleep 0.05; done"))
    assert login.states() == {"one": "queued"}
    process = login.slurm.start("101_0")
    until(login.point("one") / "try-1" / "out")
    assert login.states() == {"one": "running"}
    (login.point("one") / "go").touch()
    assert login.slurm.end("101_0", process)[0] == 0
    assert login.states() == {"one": "done"}


@pytest.mark.parametrize(
    ("scheduled", "started", "state"),
    [
        *[(name, True, "running") for name in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT")],
        *[(name, True, "running") for name in ("SIGNALING", "CONFIGURING", "RESIZING")],
        *[(name, True, "queued") for name in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")],
        *[(name, False, "queued") for name in ("PENDING", "RESV_DEL_HOLD", "REQUEUE_FED", "CONFIGURING")],
        *[
            (name, True, "lost")
            for name in ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "COMPLETED", "odd\x1b[1m")
        ],
        *[(name, False, "failed") for name in ("FAILED", "NODE_FAIL", "BOOT_FAIL")],
        *[(name, on, "out-of-time") for name in ("TIMEOUT", "DEADLINE") for on in (True, False)],
        *[(name, on, "terminated") for name in ("CANCELLED", "PREEMPTED") for on in (True, False)],
        ("COMPLETED", False, "missing"),
        (None, True, "lost"),
        (None, False, "missing"),
    ],
)
def test_every_state_of_the_scheduler_has_a_meaning(
    scheduled: str | None, started: bool, state: str, login: Login
) -> None:
    login.submit(commands("one"))
    if started:
        (login.point("one") / "try-1").mkdir()
        (login.point("one") / "try-1" / "job").write_text("101_0\n")
    if scheduled is None:
        login.slurm.forget("101_0")
    else:
        login.slurm.put("101_0", scheduled)
    assert login.states() == {"one": state}


@pytest.mark.parametrize(("scheduled", "state"), [("TIMEOUT", "out-of-time"), (None, "terminated")])
def test_who_ended_a_script_is_known_to_the_scheduler(
    scheduled: str | None, state: str, login: Login
) -> None:
    login.submit(commands("one"))
    (login.point("one") / "try-1").mkdir()
    (login.point("one") / "try-1" / "job").write_text("101_0\n")
    (login.point("one") / "try-1" / "ended").write_text("terminated 143\n")
    login.slurm.forget("101_0")
    if scheduled is not None:
        login.slurm.put("101_0", scheduled)
    assert login.states() == {"one": state}


def test_the_last_lines_of_a_log_are_what_ranks_had_to_say(login: Login) -> None:
    login.submit(commands("one", script="exit 3"))
    _, said = login.slurm.run("101_0")
    srun = [f"srun: error: n{node}: tasks 0,2-{node}: Exited with exit code 3" for node in range(9)]
    lines = [
        "observatory: no such model",
        *srun,
        "srun: error: n1: task 3: Killed",
        *said.splitlines()[-1:],
        "",
    ]
    (login.campaign / "logs" / "101_0.log").write_text("\n".join(lines))
    (point,) = login.jobs()["points"]
    assert point["last_lines"][:2] == ["observatory: no such model", "srun: error: n1: task 3: Killed"]
    assert point["last_lines"][2].endswith("failed (exit code 3)")


def test_without_an_answer_what_may_be_queued_is_not_said_to_be_missing(login: Login) -> None:
    login.submit(commands("waits", "runs", "fails", script="exit 3"))
    assert login.slurm.run("101_2")[0] == 3
    (login.point("runs") / "try-1").mkdir()
    (login.point("runs") / "try-1" / "job").write_text("101_1\n")
    login.slurm.put("101_1", "RUNNING")
    login.slurm.set_away(is_away=True)
    assert login.states() == {"waits": "unknown", "runs": "started", "fails": "failed"}
    code, out, _ = login.command("jobs", str(login.campaign))
    assert code == 3
    assert (
        "whether they are in the queue is not known: squeue does not answer: Unable to contact slurm" in out
    )
    assert "whether they still run is not known" in out
    assert "submit again to run them" not in out
    said = login.submit(commands("waits", "runs", "fails", script="exit 3"), code=1)
    assert "what already runs of this campaign is not known" in said
    assert login.command("cancel", str(login.campaign))[0] == 1
    login.slurm.set_away(is_away=False)
    assert login.states() == {"waits": "queued", "runs": "running", "fails": "failed"}


def test_a_failed_point_that_was_submitted_again_is_unknown_without_an_answer(login: Login) -> None:
    login.submit(commands("one", script="exit 3"))
    login.slurm.run("101_0")
    login.submit(commands("one", script="exit 3"))
    assert login.states() == {"one": "queued"}
    login.slurm.set_away(is_away=True)
    assert login.states() == {"one": "unknown"}


def test_a_script_that_was_submitted_by_hand_is_followed_and_cancelled(login: Login) -> None:
    login.submit(commands("one"))
    login.slurm.forget("101_0")
    (login.point("one") / "try-1").mkdir()
    (login.point("one") / "try-1" / "job").write_text("777_0\n")
    login.slurm.put("777_0", "RUNNING")
    assert login.states() == {"one": "running"}
    said = login.submit(commands("one"))
    assert "0 of 1 points submitted, 1 in the queue" in said
    assert login.command("cancel", str(login.campaign))[0] == 0
    assert login.slurm.queue == {}
    assert login.states() == {"one": "lost"}


@pytest.mark.parametrize(
    "job", ["7;touch x", "$(id)", "--all", "a" * 5000, "7_[0-9]", "\x00", "101_0\n102_0"]
)
def test_a_job_file_that_holds_no_id_is_asked_for_nowhere(job: str, login: Login) -> None:
    login.submit(commands("one"))
    (login.point("one") / "try-1").mkdir()
    (login.point("one") / "try-1" / "job").write_text(job)
    assert login.states() == {"one": "queued"}
    assert {question.rpartition("=")[2] for question in login.slurm.questions} <= {"101", "7,101", "101,7"}


def test_thousands_of_jobs_are_all_asked_for(login: Login) -> None:
    login.submit(commands("one"))
    record = json.loads((login.campaign / "jobs" / "101.json").read_text())
    for number in range(2000, 4100):
        path = login.campaign / "jobs" / f"{number}.json"
        path.write_text(json.dumps({**record, "job_id": str(number), "submitted_unix_s": number * 1.0}))
    login.slurm.put("2000_0", "RUNNING")
    login.slurm.forget("101_0")
    assert login.states() == {"one": "queued"}
    asked = [question.rpartition("=")[2].split(",") for question in login.slurm.questions]
    assert max(len(ids) for ids in asked) == 1000
    assert {"101", *map(str, range(2000, 4100))} == {job for ids in asked for job in ids}


def instead_of_waiting(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen between two looks of `jobs --wait`, which would lie 30 s apart."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: act() if seconds == 30.0 else sleep(seconds))


def test_waiting_names_a_silent_scheduler_once_and_its_return(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    login.submit("report = true\n" + commands("one").removeprefix("report = false\n"))
    turns = iter((True, True, False, None))

    def between() -> None:
        is_away = next(turns)
        if is_away is None:
            login.slurm.run("101_0")
        else:
            login.slurm.set_away(is_away=is_away)

    instead_of_waiting(between, monkeypatch)
    code, out, err = login.command("jobs", str(login.campaign), "--wait")
    assert code == 0
    assert "1 done" in out
    assert [line.removeprefix("observatory: ").partition(": squeue")[0] for line in err.splitlines()] == [
        "1 queued",
        "waiting on",
        "the scheduler answers again",
    ]
    assert login.slurm.queue == {"102": "PENDING"}  # the job that collects is not waited for


def test_a_wait_that_is_interrupted_says_that_the_jobs_go_on(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    login.submit(commands("one"))
    instead_of_waiting(lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    code, _, err = login.command("jobs", str(login.campaign), "--wait")
    assert code == 130
    (line,) = err.splitlines()[1:]
    assert "the jobs go on" in line


def test_points_of_other_schedulers_are_judged_by_their_folders_and_their_age(login: Login) -> None:
    login.site(_PBS)
    login.submit(commands("never", "now", "long ago", "over", script="exit 3").replace("long ago", "old"))
    for name in ("now", "old", "over"):
        (login.point(name) / "try-1").mkdir()
        (login.point(name) / "try-1" / "job").write_text("12[1].server\n")
    (login.point("over") / "try-1" / "ended").write_text("failed 3\n")
    old = time.time() - 600 - 1000
    os.utime(login.point("old") / "try-1" / "job", (old, old))
    assert login.states() == {"never": "unknown", "now": "started", "old": "lost", "over": "failed"}
    assert login.slurm.questions == []
    code, out, _ = login.command("jobs", str(login.campaign))
    assert code == 3
    assert "whether they are in the queue is not known: pbs is not asked, qstat lists them" in out
    said = login.submit(commands("never", "now", "old", "over", script="exit 3"))
    assert "3 of 4 points written" in said


def test_an_answer_that_is_none_is_no_answer(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    login.submit(commands("one"))
    login.slurm.program(
        "sacct", "#!/bin/sh\nprintf 'x|y\\n\\377|101_0\\n||||||||\\n101_99999999999|RUNNING\\n'\n"
    )
    assert login.jobs()["source"] == "squeue"
    login.slurm.program("squeue", "#!/bin/sh\necho '999_0|RUNNING|None|n1'\necho '101_0|RUNNING|None|n1'\n")
    login.slurm.program("scancel", f"#!/bin/sh\necho $* > {login.folder}/cancelled\n")
    assert login.command("cancel", str(login.campaign))[0] == 0
    assert (login.folder / "cancelled").read_text() == "101\n"
    assert login.states() == {"one": "queued"}  # it runs, and has not made its attempt yet
    for name in ("sacct", "squeue"):
        login.slurm.program(name, "#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.3)
    document = login.jobs()
    assert (document["source"], document["counts"]) == (None, {"unknown": 1})
    assert document["problem"] == "squeue did not answer within 0.3 s"


def test_accounting_that_lags_is_completed_by_the_queue(login: Login) -> None:
    login.submit(commands("a", "b", "c", "d"))
    login.slurm.program(
        "sacct",
        "#!/bin/sh\necho '101_[1-2%8]|PENDING|0:0|None'\necho '101_0|CANCELLED by 1000|0:15|n[1-2]'\n",
    )
    document = login.jobs()
    assert document["source"] == "sacct"
    assert [(point["state"], point["nodes"]) for point in document["points"]] == [
        ("terminated", "n[1-2]"),
        ("queued", "None"),
        ("queued", "None"),
        ("queued", "n1"),
    ]


def test_a_query_names_no_job_where_none_was_submitted(login: Login) -> None:
    login.submit(commands("one"))
    (login.campaign / "jobs" / "101.json").unlink()
    login.slurm.set_away(is_away=True)
    assert login.states() == {"one": "missing"}
    assert main(["jobs", str(Path(login.campaign))]) == 3
