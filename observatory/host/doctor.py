"""What works on this machine, and what to do about what does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from observatory.devices.nvml_library import close_nvml, list_gpus, load_nvml
from observatory.errors import DeviceError

#: distribution, module, what it is for, how to get it
_PACKAGES = (
    ("torch", "torch", "profiling models", "capture"),
    ("transformers", "transformers", "loading checkpoints", "capture"),
    ("safetensors", "safetensors", "loading checkpoints", "capture"),
    ("tokenizers", "tokenizers", "reading text", "capture"),
    ("mpi4py", "mpi4py", "ranks under MPI", "mpi"),
    ("torch-tb-profiler", "torch_tb_profiler", "viewing traces in TensorBoard", "tensorboard"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One thing that works here or does not.

    Attributes:
        name: what it is.
        works: whether it can be used.
        detail: version or device when it works, the reason when it does not.
        remedy: how to get it; None when it works or cannot be had.
    """

    name: str
    works: bool
    detail: str
    remedy: str | None = None


def capabilities() -> list[Capability]:
    """Everything the observatory can use, in the order of its data flow. Changes nothing."""
    listed = [Capability(name="python", works=True, detail=sys.version.split()[0])]
    listed.extend(_package(*package) for package in _PACKAGES)
    if importlib.util.find_spec("torch") is not None:
        listed.extend(_torch())
    listed.append(_nvml())
    listed.extend(
        _program(name, purpose) for name, purpose in (("srun", "Slurm jobs"), ("mpiexec", "MPI jobs"))
    )
    return listed


def _package(distribution: str, module: str, purpose: str, extra: str) -> Capability:
    if importlib.util.find_spec(module) is None:
        return Capability(
            name=distribution,
            works=False,
            detail=f"not installed; needed for {purpose}",
            remedy=f"pip install 'moe-observatory[{extra}]'",
        )
    return Capability(name=distribution, works=True, detail=importlib.metadata.version(distribution))


def _torch() -> Iterator[Capability]:
    import torch

    count = torch.cuda.device_count()
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
        yield Capability(name="CUDA devices", works=True, detail=f"{count}: {names}")
    else:
        built = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        yield Capability(name="CUDA devices", works=False, detail=built)
    if torch.distributed.is_available():
        backends = [
            name
            for name, available in (
                ("gloo", torch.distributed.is_gloo_available()),
                ("nccl", torch.distributed.is_nccl_available()),
                ("mpi", torch.distributed.is_mpi_available()),
            )
            if available
        ]
        yield Capability(name="torch.distributed", works=True, detail=", ".join(backends))
    else:
        yield Capability(name="torch.distributed", works=False, detail="this torch is built without it")


def _nvml() -> Capability:
    try:
        nvml = load_nvml()
    except DeviceError as error:
        return Capability(name="NVML", works=False, detail=error.what, remedy=error.advice)
    try:
        gpus = list_gpus(nvml)
    finally:
        close_nvml(nvml)
    driver = gpus[0].spec.driver if gpus else None
    return Capability(name="NVML", works=bool(gpus), detail=f"{len(gpus)} devices, driver {driver or 'n/a'}")


def _program(name: str, purpose: str) -> Capability:
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        return Capability(name=name, works=False, detail=f"not on PATH; needed for {purpose}")
    return Capability(name=name, works=True, detail=path)
