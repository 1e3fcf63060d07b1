"""Texts of batch scripts, compared with files in golden/; UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from observatory.errors import BatchError
from observatory.hpc.scripts import JobScript, command_script, job_script
from observatory.hpc.site import (
    BatchSettings,
    ContainerSettings,
    EnvironmentSettings,
    NodeSettings,
    Site,
)

_GOLDEN = Path(__file__).parent / "golden"
_FOLDER = Path("/scratch/ab12/mixers")
_SLURM = Site(
    name="a GPU cluster",
    batch=BatchSettings(
        partition="gpu",
        account="ab12",
        qos="normal",
        constraint="a100&nvlink",
        time="1-02:30:00",
        array_limit=8,
        extra=("--mail-type=END",),
    ),
    node=NodeSettings(tasks=4, gres="gpu:a100:4", cpus_per_task=16, memory="0", gpu_freq=True),
    environment=EnvironmentSettings(
        modules=("python/3.11", "cuda/12.8"),
        setup=("source /home/ab12/venv/bin/activate",),
        variables={"NCCL_DEBUG": "WARN", "LABEL": "it's mine"},
        scratch="$TMPDIR",
    ),
)
_PBS = Site(
    scheduler="pbs",
    batch=BatchSettings(partition="workq", account="ab12"),
    node=NodeSettings(tasks=4, gpus=4, cpus_per_task=8, memory="64G"),
    environment=EnvironmentSettings(launcher="mpiexec"),
)
_LSF = Site(
    scheduler="lsf",
    batch=BatchSettings(partition="normal", account="ab12"),
    node=NodeSettings(tasks=4, gpus=4, cpus_per_task=8),
    environment=EnvironmentSettings(launcher="mpiexec"),
)
_CPU = Site(
    name="a CPU cluster",
    batch=BatchSettings(partition="work"),
    node=NodeSettings(tasks=2, cpus_per_task=36, exclusive="never"),
)
_POINTS = JobScript(
    name="mixers-profile",
    folder=_FOLDER,
    points=("tiny-gqa--prose--ep8--prefill--0a1b2c3d4e", "tiny-mla--prose--ep8--prefill--5f6a7b8c9d"),
    tasks=8,
    time="1-02:30:00",
    exclusive=True,
    array_limit=8,
)
_CASES = {
    "slurm-points": (_SLURM, _POINTS),
    "slurm-clock-resumes": (
        _SLURM.model_copy(update={"environment": EnvironmentSettings()}),
        JobScript(
            name="clocks",
            folder=_FOLDER,
            points=("clock-sweep--5f6a7b8c9d",),
            time="02:00:00",
            clock_mhz=1410,
            resumes=True,
        ),
    ),
    "slurm-collect": (
        _SLURM,
        JobScript(
            name="mixers-collect",
            folder=_FOLDER,
            command=("observatory", "collect", str(_FOLDER)),
            time="00:30:00",
        ),
    ),
    "slurm-mpiexec": (
        _CPU.model_copy(update={"environment": EnvironmentSettings(launcher="mpiexec", modules=("mpi",))}),
        JobScript(name="cpu", folder=_FOLDER, points=_POINTS.points, tasks=4, time="00:30:00"),
    ),
    "slurm-container-scratch": (
        _CPU.model_copy(
            update={
                "environment": EnvironmentSettings(scratch="$TMPDIR"),
                "container": ContainerSettings(image="/apps/observatory.sif", nv=False),
            }
        ),
        JobScript(name="cpu", folder=_FOLDER, points=_POINTS.points, tasks=4, time="00:30:00"),
    ),
    "pbs-points": (_PBS, _POINTS),
    "pbs-one": (
        _PBS,
        JobScript(name="one", folder=_FOLDER, points=_POINTS.points[:1], tasks=4, time="00:30:00"),
    ),
    "lsf-points": (_LSF, _POINTS),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_script_is_the_one_that_was_reviewed(name: str, tmp_path: Path) -> None:
    text = job_script(*_CASES[name])
    golden = _GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    script = tmp_path / "script.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_command_is_quoted_and_gets_the_folder_for_its_results(tmp_path: Path) -> None:
    argv = ("printf", "%s\\n", "{out}/a b", "$HOME `id` 'x'", "--out={out}")
    script = tmp_path / "command"
    script.write_text(command_script(Site(), argv, tmp_path, about="quoting"))
    done = subprocess.run(["bash", str(script), "/o u/t"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["/o u/t/a b", "$HOME `id` 'x'", "--out=/o u/t"]


def test_the_observatory_is_called_in_the_image_of_the_site() -> None:
    site = Site(container=ContainerSettings(image="/apps/observatory.sif", binds=("/scratch",)))
    text = command_script(site, ("observatory", "doctor"), _FOLDER, about="x")
    assert text.splitlines()[-1] == (
        'exec apptainer exec --nv --bind "/scratch/ab12/mixers,/scratch" '
        '"/apps/observatory.sif" observatory doctor'
    )


def test_paths_of_a_container_may_hold_variables_of_the_job(tmp_path: Path) -> None:
    apptainer = tmp_path / "apptainer"
    apptainer.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    apptainer.chmod(0o755)
    site = Site(container=ContainerSettings(image="$STORE/o.sif", binds=("${STORE}:/data:ro",), nv=False))
    script = tmp_path / "command"
    script.write_text(command_script(site, ("echo", "$STORE"), _FOLDER, about="x"))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STORE": "/my store"}
    done = subprocess.run(["bash", str(script)], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "exec", "--bind", f"{_FOLDER},/my store:/data:ro", "/my store/o.sif", "echo", "$STORE"
    ]  # fmt: skip


def test_a_comment_cannot_become_a_command(tmp_path: Path) -> None:
    text = command_script(Site(), ("true",), tmp_path, about="model\ntouch /tmp/x\rtouch y")
    assert [line for line in text.splitlines() if not line.startswith("#")] == ["exec true"]


@pytest.mark.parametrize("folder", ["/a b", "/a%j", "/a'b", "/a$b", "/a\nb"])
def test_a_path_that_directives_cannot_hold_is_refused(folder: str) -> None:
    with pytest.raises(BatchError, match="cannot stand in the directives"):
        job_script(Site(), JobScript(name="x", folder=Path(folder), points=("p",), time="00:10:00"))


def test_a_clock_needs_a_site_that_lets_jobs_set_it() -> None:
    with pytest.raises(BatchError, match="does not let jobs set clocks"):
        job_script(
            Site(), JobScript(name="x", folder=_FOLDER, points=("p",), time="00:10:00", clock_mhz=1410)
        )


def test_a_job_has_time_to_write_what_it_captured() -> None:
    with pytest.raises(BatchError, match="is over when a job is signalled"):
        job_script(Site(), JobScript(name="x", folder=_FOLDER, points=("p",), time="00:03:00"))
