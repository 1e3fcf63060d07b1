"""Versions of what shapes a run: packages, the libraries that are loaded, drivers, the kernel.

torch and mpi4py are never imported: what they bind is asked only where the program has loaded them, and a
package's version is read from its metadata.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from pathlib import Path

from observatory.run.files import one_line

_PACKAGES = (
    "moe-observatory",
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "nvidia-ml-py",
)
_LONGEST = 100
_MODULES = {"nvidia driver": "nvidia", "amdgpu driver": "amdgpu"}


def find_software() -> dict[str, str]:
    """Versions of Python, of the installed packages, and of the libraries that this process has loaded."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        # Broken metadata raises whatever its parser raises; a version is not worth a crash.
        with contextlib.suppress(Exception):
            versions[package] = one_line(importlib.metadata.version(package), _LONGEST)
    return {**versions, **_of_torch(), **_of_mpi()}


def find_versions(sys_root: Path = Path("/sys")) -> dict[str, str]:
    """`find_software`, with the drivers of GPUs and the kernel of this machine."""
    versions = {**find_software(), "kernel": one_line(platform.release(), _LONGEST)}
    for name, module in _MODULES.items():
        with contextlib.suppress(OSError), open(sys_root / "module" / module / "version", "rb") as file:
            versions[name] = one_line(file.read(200).decode("ascii", "replace"), _LONGEST)
    return {name: version for name, version in versions.items() if version}


def _of_torch() -> dict[str, str]:
    """What torch was built for, and the NCCL that it has loaded (RCCL of AMD has the same call)."""
    torch = sys.modules.get("torch")
    found: dict[str, str] = {}
    if torch is None:
        return found
    for name, attribute in (("cuda", "cuda"), ("rocm", "hip")):
        with contextlib.suppress(Exception):
            built_for = getattr(torch.version, attribute)
            if built_for:
                found[name] = one_line(built_for, _LONGEST)
    with contextlib.suppress(Exception):  # built without it
        version = torch.cuda.nccl.version()
        found["nccl"] = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
    return found


def _of_mpi() -> dict[str, str]:
    """The MPI library as it describes itself, in the first line up to a comma."""
    mpi = sys.modules.get("mpi4py.MPI")
    with contextlib.suppress(Exception):
        if mpi is not None:
            # "Open MPI v5.0.8, package: ..." or "MPICH Version:  4.2.0" and further lines
            line = str(mpi.Get_library_version()).strip().splitlines()[0]
            return {"mpi": one_line(line.partition(",")[0], _LONGEST)}
    return {}
