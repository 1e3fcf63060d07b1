"""A site file from a real Slurm, and a campaign in a container on disks of nodes (tests/slurm_host.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from observatory.hpc.site import load_site
from tests.slurm_host import SlurmHost, slurm_host, why_not

pytestmark = pytest.mark.slow

#: Stands for Apptainer: writes down how it was called, then runs the command behind the image.
_APPTAINER = """#!/bin/bash
echo "$@" >> "{log}"
[ "$1" = exec ] && shift
while [ "$#" -gt 0 ]; do
  case $1 in --bind) shift 2 ;; --nv) shift ;; *) break ;; esac
done
shift
exec "$@"
"""
_CAMPAIGN = """
report = false
[[command]]
name = "hello"
ranks = 2
command = ["bash", "-c", 'echo "$SLURM_PROCID in {out}" > {out}/rank-$SLURM_PROCID']
"""
_LIMIT_S = 400


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmHost]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm_host() as host:
        yield host


def observatory(slurm: SlurmHost, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "observatory", *argv],
        env=slurm.environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )


def test_a_site_file_that_slurm_dictates_is_one_that_slurm_takes(slurm: SlurmHost, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    done = observatory(slurm, "site", "init", "--out", str(path))
    assert done.returncode == 0, done.stderr
    site = load_site(path)
    assert (site.batch.partition, site.batch.max_array) == ("all", 1000)
    assert site.node.tasks * (site.node.cpus_per_task or 0) == 4
    checked = observatory(slurm, "site", "check", str(path))
    assert checked.returncode == 0, checked.stderr
    assert "Slurm takes such jobs" in checked.stderr
    path.write_text(path.read_text().replace('# account = "ab12"', 'extra = ["--nodelist=n9"]'))
    refused = observatory(slurm, "site", "check", str(path))
    assert refused.returncode == 1
    assert "a job that fills one node: sbatch failed: " in refused.stderr


def test_a_campaign_runs_in_a_container_on_scratch_disks(slurm: SlurmHost, tmp_path: Path) -> None:
    programs, scratch, log = tmp_path / "bin", tmp_path / "scratch", tmp_path / "calls"
    programs.mkdir()
    scratch.mkdir()
    apptainer = programs / "apptainer"
    apptainer.write_text(_APPTAINER.format(log=log))
    apptainer.chmod(0o755)
    site, campaign = tmp_path / "site.toml", tmp_path / "hello.toml"
    site.write_text(
        f"[batch]\ntime = '00:05:00'\n[environment]\nsetup = ['export PATH={programs}:$PATH']\n"
        f"scratch = '{scratch}/$SLURMD_NODENAME'\n[container]\nimage = '/apps/observatory.sif'\n"
        "binds = ['/tmp']\n"
    )
    campaign.write_text(_CAMPAIGN)
    done = observatory(slurm, "submit", str(campaign), "--site", str(site))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "hello"
    deadline = time.monotonic() + _LIMIT_S
    state = {"counts": {"queued": 1}}
    while set(state["counts"]) & {"queued", "running"} and time.monotonic() < deadline:
        time.sleep(1)
        state = json.loads(observatory(slurm, "jobs", str(folder), "--json").stdout)
    assert state["counts"] == {"done": 1}, state
    (result,) = folder.glob("points/*/result/out")
    ranks = {path.name: path.read_text().split(" in ") for path in result.iterdir()}
    assert {name: rank for name, (rank, _) in ranks.items()} == {"rank-0": "0", "rank-1": "1"}
    used = {Path(out.strip()).parent for _, out in ranks.values()}
    assert used == {scratch / "n1", scratch / "n2"}  # one rank on a node, each on its own disk
    assert not any(os.listdir(each) for each in used)  # copied back, and removed
    for call in log.read_text().splitlines():
        assert call.startswith(f"exec --nv --bind {scratch}/n"), call
        assert f"--bind {folder},/tmp /apps/observatory.sif bash -c" in call
