"""Commands for people's shells: the right device, locked and undone, and nothing that a file put there."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from observatory.errors import ClockError
from observatory.locks.commands import (
    all_commands,
    nvidia_smi_commands,
    srun_commands,
    wrapper_commands,
    zeusd_commands,
)

UUID = "GPU-5ea1ed00-0000-4000-8000-000000000000"
HOSTILE = "GPU-$(touch OWNED)';touch OWNED;`touch OWNED`\"&& touch OWNED #"


def run(lines: list[str], folder: Path) -> list[list[str]]:
    """Runs lines in bash where every program is a stand-in that notes its arguments; returns those."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("nvidia-smi", "curl", "srun", "sudo"):
        script = programs / name
        script.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "$NOTES"; printf "\\n" >> "$NOTES"\n'
            + ('[[ "$*" == *query-gpu=index* ]] && echo 3\nexit 0\n')
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    notes = folder / "notes"
    subprocess.run(
        ["bash", "-eu", "-c", "\n".join(lines)],
        env={"PATH": f"{programs}:/usr/bin:/bin", "NOTES": str(notes)},
        cwd=folder, check=True, timeout=30, capture_output=True,
    )  # fmt: skip
    return [call.split("\0")[:-1] for call in notes.read_text().split("\n") if call]


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
def test_nvidia_smi_locks_looks_and_undoes_on_the_device_named_by_uuid(tmp_path: Path) -> None:
    calls = run(nvidia_smi_commands(UUID, 780), tmp_path)
    assert calls[0] == ["nvidia-smi", "-i", UUID, "--lock-gpu-clocks=780,780"]
    assert calls[1][:3] == ["nvidia-smi", "-i", UUID]
    assert calls[2] == ["nvidia-smi", "-i", UUID, "--reset-gpu-clocks"]


@needs_bash
def test_zeusd_is_asked_by_the_index_that_belongs_to_the_uuid(tmp_path: Path) -> None:
    index, lock, undo = run(zeusd_commands(UUID, 780), tmp_path)
    assert index[:3] == ["nvidia-smi", "-i", UUID]
    assert lock[:4] == ["curl", "--fail-with-body", "--unix-socket", "/var/run/zeusd.sock"]
    assert lock[-1] == (
        "http://localhost/gpu/set_gpu_locked_clocks?gpu_ids=3&block=true&min_clock_mhz=780&max_clock_mhz=780"
    )
    assert undo[-1] == "http://localhost/gpu/reset_gpu_locked_clocks?gpu_ids=3&block=true"


@needs_bash
def test_slurm_and_the_sites_wrapper_get_the_clock(tmp_path: Path) -> None:
    lines = [*srun_commands(780), *wrapper_commands("sudo site-lock {uuid} {clock_mhz}", UUID, 780)]
    srun, wrapper = run(lines, tmp_path)
    assert srun == ["srun", "--gpu-freq=780,verbose", "COMMAND"]
    assert wrapper == ["sudo", "site-lock", UUID, "780"]


@needs_bash
def test_a_uuid_from_a_file_never_becomes_a_command(tmp_path: Path) -> None:
    lines = all_commands(HOSTILE, 780.0, wrapper="sudo site-lock {uuid} {clock_mhz}")
    calls = run(lines, tmp_path)
    assert not (tmp_path / "OWNED").exists()
    assert ["nvidia-smi", "-i", HOSTILE, "--lock-gpu-clocks=780,780"] in calls
    assert ["sudo", "site-lock", HOSTILE, "780"] in calls


def test_a_uuid_that_would_hide_in_the_braces_of_a_wrapper_is_quoted_all_the_same() -> None:
    (_, line) = wrapper_commands("site-lock {uuid} {clock_mhz}", "{clock_mhz}; rm x", 780)
    assert line == "site-lock '{clock_mhz}; rm x' 780"


@pytest.mark.parametrize("uuid", [None, "", "GPU\nnvidia-smi --gpu-reset", "G" * 1000, "GPU\x1b[2J"])
def test_a_uuid_that_no_shell_line_can_hold_leaves_a_place_to_fill_in(uuid: str | None) -> None:
    for line in all_commands(uuid, 780.0):
        assert line.isprintable()
        assert "gpu-reset" not in line
    assert "nvidia-smi -i GPU_UUID --lock-gpu-clocks=780,780" in all_commands(uuid, 780.0)


@pytest.mark.parametrize(
    "template", ["sudo site-lock", "lock {uuid}", "lock {clock_mhz} {0}", "a\n{clock_mhz}"]
)
def test_a_wrapper_that_does_not_take_the_clock_is_refused(template: str) -> None:
    with pytest.raises(ClockError, match="is not a command with"):
        wrapper_commands(template, UUID, 780)


def test_every_way_undoes_what_it_does_or_ends_by_itself() -> None:
    text = "\n".join(all_commands(UUID, 780.0))
    assert text.count("--reset-gpu-clocks") == 2  # the sudo rule names it too
    assert "reset_gpu_locked_clocks" in text
    assert "for one job step" in text
    assert text.index("srun") < text.index("as root")  # what needs no privileges comes first
