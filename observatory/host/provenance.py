"""Where a run comes from: command line, commit, machine, batch job, software and devices.

Nothing here fails: what cannot be found out is None or left out. The environment is untrusted, so its texts
are cut to one bounded line.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from observatory.devices.nvml_library import close_nvml, list_gpus, load_nvml
from observatory.errors import DeviceError
from observatory.host.environment import kept_environment
from observatory.host.node import find_node
from observatory.host.scheduler import find_scheduler, with_answers
from observatory.host.versions import find_software, find_versions
from observatory.run.files import one_line
from observatory.run.manifest import DataSpec, DeviceSpec, Manifest, ModelSpec, Topology
from observatory.run.masking import masked_arguments, masked_entry
from observatory.run.provenance import HostSpec, RankProvenance

_MAX_ARGUMENTS = 256
_GIT_TIMEOUT_S = 5.0


def new_manifest(
    *,
    model: ModelSpec,
    data: DataSpec | None = None,
    topology: Topology | None = None,
    config: Mapping[str, JsonValue] | None = None,
    window_steps: int = 1,
    notes: tuple[str, ...] = (),
) -> Manifest:
    """Manifest of a run that starts now, with everything that is known about its origin.

    Args:
        model: the model that runs.
        data: what it is fed.
        topology: ranks of the run; one rank by default.
        config: options the run is made with; JSON values.
        window_steps: steps folded into one routing row.
        notes: stated limits of what will be captured.
    """
    return Manifest(
        run_id=uuid.uuid4().hex,
        created_unix_s=time.time(),
        model=model,
        data=data,
        topology=topology or Topology(),
        config={key: masked_entry(key, value) for key, value in (config or {}).items()},
        window_steps=window_steps,
        notes=notes,
        **collect_provenance(),
    )


def collect_provenance() -> dict[str, Any]:
    """Manifest fields ``argv, git_sha, hosts, scheduler, software, devices`` of this process."""
    job = find_scheduler(os.environ)
    return {
        "argv": command_line(),
        "git_sha": find_git_sha(),
        "hosts": (find_host(),),
        "scheduler": None if job is None else with_answers(job),
        "software": find_software(),
        "devices": driver_devices(),
    }


def command_line() -> tuple[str, ...]:
    """Command line of this process, an argument a line, secrets masked (:mod:`observatory.run.masking`)."""
    return tuple(one_line(argument, 1000) for argument in masked_arguments(sys.argv[:_MAX_ARGUMENTS]))


def find_git_sha(folder: Path | None = None) -> str | None:
    """Commit of a folder (the working directory by default), ``-dirty`` when tracked files differ.

    None outside a checkout, without git, or when git does not answer within seconds.
    """
    revision = _git(folder, "rev-parse", "--verify", "HEAD")
    if revision is None or re.fullmatch(r"[0-9a-f]{40,64}", revision) is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if changes else revision


def _git(folder: Path | None, *arguments: str) -> str | None:
    try:
        # A checkout can name programs that git runs (fsmonitor, hooks): those stay off.
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments],
            cwd=folder,
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_GIT_TIMEOUT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def find_host() -> HostSpec:
    """This machine."""
    memory: int | None = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HostSpec(
        name=one_line(socket.gethostname(), 255) or "unknown",
        platform=one_line(platform.platform(), 255),
        cpu=_cpu_model(),
        cpus=os.cpu_count(),
        memory_bytes=memory if memory is not None and memory > 0 else None,
    )


def find_rank_provenance() -> RankProvenance:
    """Where this process runs, for the status of its rank."""
    return RankProvenance(
        machine=find_host(),
        versions=find_versions(),
        environment=kept_environment(os.environ),
        **find_node(os.environ),
    )


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file.read(65536).splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return one_line(value, 255)
    return one_line(platform.processor(), 255) or None


def driver_devices() -> tuple[DeviceSpec, ...]:
    """NVIDIA devices as their driver names them; empty without a driver.

    Every reading is None where the driver refuses it.
    """
    try:
        nvml = load_nvml()
    except DeviceError:  # no library, no driver, a broken driver: there is nothing to record
        return ()
    try:
        return tuple(gpu.spec for gpu in list_gpus(nvml))
    finally:
        close_nvml(nvml)
