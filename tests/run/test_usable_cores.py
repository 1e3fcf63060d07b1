"""Cores that ranks can use are recorded where they run, and too few are stated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from observatory.host.provenance import new_manifest
from observatory.run import RunWriter, open_run
from observatory.run.manifest import CoreQuota, CoreSpec, ModelSpec, RankStatus
from observatory.run.usable_cores import core_sentence, core_shares, find_cores, short_of_cores

LINUX = hasattr(os, "sched_getaffinity")


def cores(
    cpus: str, *, machine: str = "m", host: str = "h", threads: int | None = None, **quotas: float
) -> CoreSpec:
    return CoreSpec(
        host=host,
        machine=machine,
        cpus=cpus,
        threads=threads,
        quotas=tuple(CoreQuota(cpus=cpus, group=group) for group, cpus in quotas.items()),
    )


@pytest.mark.parametrize(
    ("cores_P", "usable"),
    [
        ([cores("0-1")] * 4, 2),
        ([cores("0-3")] * 4, 4),
        ([cores(str(rank)) for rank in range(4)], 4),  # each bound to one of its own
        ([cores("0"), cores("0"), cores("1-7"), cores("0-7")], 3),  # two share one, whatever is free
        ([cores("0-1"), cores("1-2"), cores("2")], 3),  # fits in one way only
        ([cores("0-7", job=0.5)] * 2, 0.5),
        ([cores("0-7", job=3.0)] * 4, 3),
        ([cores("0-7", first=1.0), cores("0-7", second=1.0)], 2),  # a quota for each
        ([cores("0-7", first=1.0, job=1.5), cores("0-7", second=1.0, job=1.5)], 1.5),  # and one above
        ([cores("0-7"), cores("0-7", job=0.25), cores("0-7", job=0.25)], 1.25),
        ([cores("0-1", job=16.0)] * 3, 2),  # the smaller of both
    ],
)
def test_ranks_are_held_against_the_cores_that_they_can_use_at_once(
    cores_P: list[CoreSpec], usable: float
) -> None:
    (share,) = core_shares(cores_P)
    assert (share.ranks, share.cores) == (len(cores_P), usable)
    assert (share.short == "ranks") == (usable < len(cores_P))


def test_every_machine_has_its_own_cores_and_containers_share_one() -> None:
    four = [cores("0-1", machine=str(rank // 2), host="localhost") for rank in range(4)]
    assert short_of_cores(four) == []
    boxes = [cores("0-1", host=f"box{rank}") for rank in range(3)]
    (share,) = short_of_cores(boxes)
    assert core_sentence(share) == (
        "3 ranks on 2 usable cores of host box0, box1, box2: times are of waiting for a core as well"
    )
    unknown = [cores("0", host="a").model_copy(update={"machine": None}), None]
    assert [share.ranks for share in core_shares(unknown)] == [1]


def test_threads_of_all_ranks_are_held_against_the_cores_where_ranks_are_not_too_many() -> None:
    (share,) = short_of_cores([cores("0-7", threads=8)] * 2)
    assert core_sentence(share).startswith("2 ranks with 16 threads on 8 usable cores of host h:")
    assert short_of_cores([cores("0-7", threads=4)] * 2) == []
    assert short_of_cores([cores("0-7")] * 2) == []
    (share,) = short_of_cores([cores("0-7", first=2.0, threads=4)])
    assert (share.short, share.cores) == ("threads", 2)


def test_many_ranks_of_a_large_machine_are_matched_quickly() -> None:
    (share,) = core_shares([cores(f"{rank // 2}") for rank in range(1024)])
    assert share.cores == 512


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc and control groups as a kernel shows them."""
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path / "proc"


def mounted(proc: Path, groups: str, *mounts: str) -> None:
    (proc / "self/cgroup").write_text(groups)
    (proc / "self/mountinfo").write_text("\n".join(mounts) + "\n")


def quota_file(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_quotas_of_version_2_are_read_up_to_the_root(proc: Path) -> None:
    root = proc.parent / "cgroup"
    mounted(proc, "0::/job/step\n", f"30 23 0:26 / {root} rw - cgroup2 cgroup2 rw")
    quota_file(root / "job/step", cpu__max="max 100000")
    quota_file(root / "job", cpu__max="150000 100000")
    assert [item.cpus for item in find_cores(proc).quotas] == [1.5]
    quota_file(root / "job/step", cpu__max="50000 100000")
    assert [item.cpus for item in find_cores(proc).quotas] == [0.5, 1.5]


def test_quotas_of_version_1_are_read_also_in_a_container_that_sees_a_part(proc: Path) -> None:
    root = proc.parent / "cpu"
    mount = f"33 31 0:29 /docker/abc {root} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
    mounted(proc, "3:cpu,cpuacct:/docker/abc\n2:cpuset:/\n", mount)
    quota_file(root, cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert [item.cpus for item in find_cores(proc).quotas] == [2.0]
    quota_file(root, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert find_cores(proc).quotas == ()


@pytest.mark.parametrize("text", ["", "nonsense", "0 0", "max", "5 -1", "-3 100", "\xff"])
def test_a_quota_that_is_none_is_no_error(text: str, proc: Path) -> None:
    root = proc.parent / "cgroup"
    mounted(proc, "0::/\n", f"30 23 0:26 / {root} rw - cgroup2 cgroup2 rw", "cut off")
    quota_file(root, cpu__max=text)
    assert find_cores(proc).quotas == ()


def reported_by(*prefix: str) -> CoreSpec:
    program = "from observatory.run.usable_cores import find_cores; print(find_cores().model_dump_json())"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return CoreSpec.model_validate_json(done.stdout)


@pytest.mark.skipif(not LINUX, reason="affinity is Linux's")
def test_a_process_bound_to_one_core_says_so() -> None:
    core = min(os.sched_getaffinity(0))
    assert reported_by("taskset", "-c", str(core)).cpus == str(core)


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="control groups need root on Linux")
def test_a_process_in_a_control_group_with_half_a_core_says_so() -> None:
    root = Path("/sys/fs/cgroup")
    old = (root / "cpu/cpu.cfs_quota_us").exists() or (root / "cpu/cpu.shares").exists()
    group = (root / "cpu" if old else root) / f"observatory-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("cpu.cfs_quota_us" if old else "cpu.max")).write_text("50000" if old else "50000 100000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        found = reported_by("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"')
    finally:
        group.rmdir()
    assert found.quotas[0].cpus == 0.5
    assert short_of_cores([found])[0].cores <= 0.5


def test_a_run_keeps_the_cores_of_every_rank_and_an_older_one_says_nothing(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", new_manifest(model=ModelSpec(name="m"))):
        pass
    (rank,) = open_run(tmp_path / "run").manifest.ranks
    assert rank.cores is not None
    if LINUX:
        assert core_shares([rank.cores])[0].cores <= len(os.sched_getaffinity(0))
    old = RankStatus.model_validate({"rank": 0, "state": "complete"})
    assert short_of_cores([old.cores]) == []


@pytest.mark.parametrize("cpus", ["0-", "-1", "a", "0,,1", "99999", "0" * 5000])
def test_a_list_of_cores_that_is_none_is_refused(cpus: str) -> None:
    with pytest.raises(ValidationError):
        CoreSpec(host="h", cpus=cpus)


def test_a_reversed_range_or_a_loop_of_groups_ends() -> None:
    assert core_shares([cores("9-2,1")])[0].cores == 1
    loop = [cores("0-3", a=1.0, b=1.0), cores("0-3", b=1.0, a=1.0)]
    assert core_shares(loop)[0].ranks == 2
