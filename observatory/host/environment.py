"""Settings of libraries and launchers that shape a run, out of the environment; never a secret.

A variable is kept when its name is on the list, nothing in the name hints at a secret, and masking finds
nothing to mask in its value, which is not too long to be looked through as a whole. All others are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from observatory.run.files import one_line
from observatory.run.masking import is_secret_name, masked_text
from observatory.run.provenance import LONGEST_VALUE, MOST_VARIABLES

#: Names that begin so: threads, GPUs, collectives, networks, MPI.
_PREFIXES = (
    "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_",
    "NCCL_", "RCCL_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "GLOO_", "TP_",
    "UCX_", "UCC_", "FI_", "CXI_", "NVSHMEM_",
    "OMPI_MCA_", "MPICH_", "I_MPI_",
    "CUDA_MPS_",
)  # fmt: skip
_NAMES = {
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "GPU_MAX_HW_QUEUES",
    "HSA_ENABLE_SDMA", "HSA_FORCE_FINE_GRAIN_PCIE", "ZE_AFFINITY_MASK",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "MASTER_ADDR", "MASTER_PORT", "MALLOC_ARENA_MAX", "LD_PRELOAD",
    "SLURM_CPU_BIND", "SLURM_CPU_FREQ_REQ", "SLURM_CPUS_PER_TASK", "SLURM_DISTRIBUTION", "SLURM_GPU_BIND",
    "SLURM_GPU_FREQ", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_HINT", "SLURM_MEM_BIND",
    "SLURM_MPI_TYPE", "SLURM_NETWORK", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_GPUS", "SLURM_THREADS_PER_CORE",
}  # fmt: skip
#: What Open MPI's launcher hands to its own ranks: addresses and numbers of a job.
_INTERNAL = re.compile(r"OMPI_MCA_(?:ess|orte|plm|pmix|initial)_")
_NAME = re.compile(r"[A-Z][A-Za-z0-9_]{1,99}", re.ASCII)
#: Wider than masking's rule: leaving out a harmless setting costs little.
_HINTS = re.compile(r"key|token|passw|passphrase|secret|credential|auth|cookie|cert|user", re.IGNORECASE)
_LONGEST_READ = 1024
_USER_IN_URL = re.compile(r"//[^/\s]*@")


def kept_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to keep, by name; values on one line of bounded length."""
    kept: dict[str, str] = {}
    for name in sorted(name for name in environment if _is_listed(name)):
        value = environment[name]
        if len(kept) == MOST_VARIABLES:
            break
        if not _may_be_secret(name, value):
            kept[name] = one_line(value, LONGEST_VALUE)
    return kept


def _is_listed(name: str) -> bool:
    if _NAME.fullmatch(name) is None or _INTERNAL.match(name):
        return False
    return name in _NAMES or name.startswith(_PREFIXES)


def _may_be_secret(name: str, value: str) -> bool:
    if len(value) > _LONGEST_READ or _HINTS.search(name) or is_secret_name(name):
        return True
    return bool(_USER_IN_URL.search(value)) or masked_text(value) != value
