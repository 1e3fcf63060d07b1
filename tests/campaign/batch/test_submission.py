"""What is submitted, and what the submitted scripts do: whatever happens, a point is run once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from observatory.campaign.batch.campaign_file import load_campaign
from observatory.campaign.batch.folder import CampaignFolder
from observatory.campaign.batch.submission import plan_submission, submit
from observatory.hpc import slurm
from observatory.hpc.site import load_site
from tests.campaign.batch.conftest import Login, commands
from tests.fake_slurm import until

#: Counts executions, and takes its time, so that whatever starts at once does run at once.
_COUNT = "echo x >> $1/../../executions; sleep 0.3"


def executions(point: Path) -> int:
    path = point / "executions"
    return len(path.read_text().splitlines()) if path.exists() else 0


def trap_gate(login: Login) -> str:
    """A script that says that it runs, and ends at TERM only."""
    return f"trap 'exit 9' TERM; touch {login.folder}/runs; while true; do sleep 0.05; done"


def test_arrays_stay_below_the_limit_of_the_site(login: Login) -> None:
    said = login.submit(commands(*"abcdefg"), "--array-limit", "2")
    assert "7 of 7 points submitted" in said
    assert [name for name in login.slurm.queue if name.endswith("_0")] == ["101_0", "102_0", "103_0"]
    arrays = [re.findall("--array=(.*)", path.read_text()) for path in login.campaign.glob("scripts/*.sh")]
    assert sorted(arrays) == [["0-0%2"], ["0-2%2"], ["0-2%2"]]


def test_only_what_failed_or_what_is_missing_is_submitted(login: Login) -> None:
    script = "case $1 in *good*) exit 0 ;; esac; exit 3"
    text = commands("good", "bad", "lost", script=script)
    login.submit(text)
    assert [login.slurm.run(f"101_{index}")[0] for index in (0, 1)] == [0, 3]
    login.slurm.forget("101_2")
    assert login.states() == {"good": "done", "bad": "failed", "lost": "missing"}
    said = login.submit(text, "--only", "failed", "--dry-run")
    assert "1 of 3 points would be submitted, 1 done already, 1 left out by --only" in said
    login.submit(text, "--only", "missing")
    assert login.states() == {"good": "done", "bad": "failed", "lost": "queued"}
    login.submit(text, "--only", "failed")
    assert login.states() == {"good": "done", "bad": "queued", "lost": "queued"}
    assert set(login.slurm.queue) == {"102_0", "103_0"}


def test_jobs_that_wait_do_what_was_submitted(login: Login) -> None:
    login.submit(commands("one", script="echo first > $1/said"))
    said = login.submit(commands("one", "two", script="echo second > $1/said"))
    assert "2 new since the last submission, 1 no longer part of the campaign" in said
    (first,) = [
        path for path in login.campaign.glob("points/one--*") if "first" in (path / "command").read_text()
    ]
    assert login.slurm.run("101_0")[0] == 0
    assert (first / "result" / "out" / "said").read_text() == "first\n"
    assert login.states() == {"one": "queued", "two": "queued"}
    assert login.jobs()["no_longer_part"] == 1


def test_elements_that_start_at_once_run_a_point_once(login: Login) -> None:
    login.submit(commands("one", script=_COUNT))
    for job in range(102, 106):  # by hand, as often as one likes
        (login.slurm.folder / "scripts" / str(job)).write_bytes(
            (login.slurm.folder / "scripts" / "101").read_bytes()
        )
    processes = {f"{job}_0": login.slurm.start(f"{job}_0") for job in range(101, 106)}
    ends = [login.slurm.end(element, process) for element, process in processes.items()]
    assert [code for code, _ in ends] == [0] * 5, ends
    assert sum("is run by job" in said or "has its result already" in said for _, said in ends) == 4, ends
    assert executions(login.point("one")) == 1
    assert sorted(path.name for path in login.point("one").iterdir()) == ["command", "executions", "result"]


def test_a_submission_whose_answer_came_too_late_does_no_harm(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    (login.slurm.folder / "slow").touch()
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 2.5)
    said = login.submit(commands("one", script=_COUNT), code=1)
    assert "sbatch did not answer within 2.5 s" in said
    assert "each point still runs once" in said
    (login.slurm.folder / "slow").unlink()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{login.slurm.programs}{os.pathsep}{os.environ['PATH']}")
    assert "1 of 1 points submitted" in login.submit(commands("one", script=_COUNT))
    assert set(login.slurm.queue) == {"101_0", "102_0"}
    processes = {element: login.slurm.start(element) for element in ("101_0", "102_0")}
    assert [login.slurm.end(*each)[0] for each in processes.items()] == [0, 0]
    assert executions(login.point("one")) == 1
    assert login.states() == {"one": "done"}


def test_two_who_submit_at_once_run_each_point_once(login: Login) -> None:
    (login.folder / "campaign.toml").write_text(commands(*"abcd", script="echo x >> $1/../../executions"))
    argv = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "observatory",
        "submit",
        "campaign.toml",
        "--site",
        "site.toml",
    ]
    started = [subprocess.Popen(argv, cwd=login.folder, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    queued = list(login.slurm.queue)
    assert len(queued) in (4, 8)
    for name in login.campaign.glob("scripts/*.sh"):
        subprocess.run(["bash", "-n", str(name)], check=True)
    processes = {element: login.slurm.start(element) for element in queued}
    assert {login.slurm.end(*each)[0] for each in processes.items()} == {0}
    assert [executions(point) for point in login.campaign.glob("points/*")] == [1] * 4
    assert set(login.states().values()) == {"done"}


def test_a_result_that_comes_while_a_submission_is_prepared_is_kept(login: Login) -> None:
    text = commands("one", script=_COUNT)
    login.submit(text)
    login.slurm.forget("101_0")
    late = plan_submission(
        load_campaign(login.folder / "campaign.toml"),
        load_site(login.folder / "site.toml"),
        CampaignFolder(login.campaign),
        name="campaign",
    )
    assert login.slurm.run("101_0")[0] == 0
    submit(late, submitted=lambda *_: None)
    assert login.states() == {"one": "done"}
    code, said = login.slurm.run("102_0")
    assert (code, executions(login.point("one"))) == (0, 1)
    assert "has its result already" in said


@pytest.mark.parametrize(
    ("holder", "code", "words", "runs"),
    [
        ("500_0", 0, "is run by job 500_0", 0),
        ("600_0", 0, "attempt 2", 1),
        ("101_0", 0, "attempt 2", 1),  # the same job, which was requeued
        (None, 0, "attempt 2", 1),
        ("away", 75, "the scheduler does not answer", 0),
    ],
)
def test_a_claim_is_void_once_its_job_has_ended(
    holder: str | None, code: int, words: str, runs: int, login: Login
) -> None:
    login.submit(commands("one", script=_COUNT))
    login.slurm.put("500_0", "SUSPENDED")
    claim = login.point("one") / "try-1"
    claim.mkdir()
    if holder is None:
        long_ago = time.time() - 600
        os.utime(claim, (long_ago, long_ago))
    else:
        (claim / "job").write_text(f"{holder}\n")
    login.slurm.set_away(is_away=holder == "away")
    found, said = login.slurm.run("101_0", restarts=int(holder == "101_0"))
    assert (found, executions(login.point("one"))) == (code, runs), said
    assert words in said


def test_a_young_claim_without_a_job_is_not_taken_over_and_a_signal_ends_the_wait(login: Login) -> None:
    login.submit(commands("one", script=_COUNT))
    (login.point("one") / "try-1").mkdir()
    looks = login.folder / "looks"
    login.slurm.program("find", f'#!/bin/bash\ntouch "{looks}"\nPATH=${{PATH#*:}} exec find "$@"\n')
    process = login.slurm.start("101_0")
    until(looks)
    process.terminate()
    code, said = login.slurm.end("101_0", process)
    assert code == 75
    assert "ended from outside" in said
    assert [path.name for path in login.point("one").glob("try-*")] == ["try-1"]


def test_a_signal_before_the_ranks_start_is_not_lost(login: Login) -> None:
    go, here = login.folder / "go", login.folder / "here"
    login.site(f"[environment]\nsetup = ['touch {here}; until [ -e {go} ]; do sleep 0.05; done']\n")
    login.submit(commands("one", script=_COUNT))
    process = login.slurm.start("101_0")
    until(here)
    process.terminate()
    go.touch()
    assert login.slurm.end("101_0", process)[0] == 75
    assert (login.point("one") / "try-1" / "ended").read_text() == "terminated 1\n"
    assert executions(login.point("one")) == 0
    assert login.states() == {"one": "terminated"}


def test_a_signal_reaches_the_ranks_and_the_point_can_be_run_again(login: Login) -> None:
    login.submit(commands("one", script=trap_gate(login)))
    process = login.slurm.start("101_0")
    until(login.folder / "runs")
    process.terminate()
    assert login.slurm.end("101_0", process)[0] == 75
    assert (login.point("one") / "try-1" / "ended").read_text() == "terminated 9\n"
    assert "1 of 1 points submitted" in login.submit(commands("one", script=trap_gate(login)))


def test_what_a_signal_ended_is_no_result_even_with_exit_code_0(login: Login) -> None:
    text = commands("one", script=trap_gate(login).replace("exit 9", "exit 0"))
    login.submit(text)
    process = login.slurm.start("101_0")
    until(login.folder / "runs")
    process.terminate()
    assert login.slurm.end("101_0", process)[0] == 75
    assert (login.point("one") / "try-1" / "ended").read_text() == "terminated 0\n"
    assert "1 of 1 points submitted" in login.submit(text)


def test_what_resumes_is_requeued_as_often_as_the_site_allows(login: Login) -> None:
    login.site("[batch]\nrestarts = 1\n")
    login.slurm.program("scontrol", f"#!/bin/sh\necho $* >> {login.folder}/requeued\n")
    login.submit(commands("one", script=trap_gate(login), more="resumes = true"))
    for restarts in (0, 1):
        (login.folder / "runs").unlink(missing_ok=True)
        process = login.slurm.start("101_0", restarts=restarts)
        until(login.folder / "runs")
        process.send_signal(signal.SIGUSR1)
        code, said = login.slurm.end("101_0", process)
        assert (code, "the wall time ends soon" in said) == (75, True)
    assert (login.folder / "requeued").read_text() == "requeue 101\n"
    assert login.states() == {"one": "out-of-time"}


def test_a_missing_module_is_named_and_fails_the_point(login: Login) -> None:
    login.site('[environment]\nmodules = ["no/such"]\n')
    login.submit(commands("one", script=_COUNT))
    code, said = login.slurm.run("101_0")
    assert code == 1
    assert "the module no/such cannot be loaded" in said
    assert "the environment cannot be set up" in said
    assert login.states() == {"one": "failed"}


@pytest.mark.parametrize("line", ["false  # ours", "no-such-command", "if true; then (exit 3); fi  # x"])
def test_a_line_of_setup_that_fails_fails_the_point(line: str, login: Login) -> None:
    login.site(f"[environment]\nsetup = ['# first', 'true  # fine', '{line}', 'true']\n")
    login.submit(commands("one", script=_COUNT))
    code, said = login.slurm.run("101_0")
    assert (code, "the environment cannot be set up" in said) == (1, True)
    assert executions(login.point("one")) == 0


def test_a_scheduler_that_goes_away_meanwhile_is_waited_for(login: Login) -> None:
    away = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    login.slurm.program("sbatch", f"#!/bin/bash\necho '{away}' >&2\nexit 1\n")
    said = login.submit(commands("one"), code=1)
    assert "run the same command again when the scheduler answers" in said
    assert login.states() == {"one": "missing"}


def test_a_queue_that_is_full_keeps_what_it_took(login: Login) -> None:
    sbatch = (login.slurm.programs / "sbatch").read_text()
    refusal = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    full = f"#!/bin/bash\nif [ -e {login.slurm.folder}/queue/101_0 ]; then echo '{refusal}' >&2; exit 1; fi\n"
    login.slurm.program("sbatch", full + sbatch)
    said = login.submit(commands(*"abcd"), code=1)
    assert "what is queued is not submitted twice" in said
    assert list(login.states().values()) == ["queued"] * 3 + ["missing"]
    login.slurm.program("sbatch", sbatch)
    assert "1 of 4 points submitted, 3 in the queue" in login.submit(commands(*"abcd"))


@pytest.mark.parametrize("name", ["my campaign", "a;touch x", "$(id)", "-x", "ä\u2028b", "'"])
def test_a_file_of_any_name_gives_jobs_a_name_that_schedulers_take(name: str, login: Login) -> None:
    path = login.folder / f"{name}.toml"
    path.write_text(commands("one"))
    site, out = str(login.folder / "site.toml"), str(login.folder / "out")
    code, _, said = login.command("submit", "--site", site, "--out", out, "--", str(path))
    assert code == 0, said
    (script,) = Path(out).glob("scripts/*.sh")
    (job,) = re.findall("^#SBATCH --job-name=(.*)$", script.read_text(), re.MULTILINE)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", job)


@pytest.mark.parametrize("name", ["my campaign", "a;b", "$(id)", "%j", "a\nb"])
def test_a_folder_that_a_script_cannot_name_is_refused(name: str, login: Login) -> None:
    path = login.folder / f"{name}.toml"
    path.write_text(commands("one"))
    code, _, said = login.command("submit", str(path), "--site", str(login.folder / "site.toml"))
    assert code == 1
    assert "cannot stand in the directives of a batch script" in said
    assert len(said.splitlines()) == 1
    assert login.slurm.queue == {}
