"""Why a process may use no GPU, or fewer than its environment names: the codes, and the words for them."""

from __future__ import annotations

from enum import StrEnum

from observatory.reasons import Reason


class GpuCode(StrEnum):
    """Why there are no GPUs, or not all; behind each the names of the values that belong to it.

    ``variable`` is a variable of the environment with its value.
    """

    NOT_READABLE = "not_readable"  # error: of the driver's library
    NONE_ANSWERS = "none_answers"  # gpus
    NONE_SHOWN = "none_shown"
    NO_AMD_GPU = "no_amd_gpu"
    NO_GPU = "no_gpu"  # because: of each vendor
    HIDDEN = "hidden"  # variable
    PARTITIONED = "partitioned"  # gpu
    INSTANCES_NAMED = "instances_named"  # variable
    INSTANCES_COUNTED = "instances_counted"  # variable
    NAMED_TWICE = "named_twice"  # variable
    NO_SUCH_ORDINAL = "no_such_ordinal"  # variable, ordinal, gpus
    NO_SUCH_GPU = "no_such_gpu"  # variable, entry
    AMBIGUOUS = "ambiguous"  # variable, entry, gpus
    CUDA_ORDER = "cuda_order"  # variable
    NO_BUS_IDS = "no_bus_ids"  # variable
    AMD_ORDER = "amd_order"  # variable, gpus


_WORDS = {
    GpuCode.NOT_READABLE: "{error}",
    GpuCode.NONE_ANSWERS: "the NVIDIA driver lists {gpus} GPUs and none answers; see the kernel log",
    GpuCode.NONE_SHOWN: "the NVIDIA driver shows this process no GPU; ask the scheduler for one",
    GpuCode.NO_AMD_GPU: "amdsmi lists no AMD GPU",
    GpuCode.NO_GPU: "{causes}",
    GpuCode.HIDDEN: "{variable} hides all GPUs",
    GpuCode.PARTITIONED: "{gpu} is partitioned (MIG), and its power is that of all its instances; name it to "
    "read it all the same",
    GpuCode.INSTANCES_NAMED: "{variable} names MIG instances; power is measured for whole GPUs only, which "
    "others share",
    GpuCode.INSTANCES_COUNTED: "{variable} counts MIG instances among the GPUs; name the GPUs by UUID",
    GpuCode.NAMED_TWICE: "{variable} names a GPU twice, for which CUDA uses none",
    GpuCode.NO_SUCH_ORDINAL: "{variable} names GPU {ordinal}, and the driver shows {gpus}",
    GpuCode.NO_SUCH_GPU: "{variable}: {entry} is no GPU that the driver shows, and CUDA ends the list there",
    GpuCode.AMBIGUOUS: "{variable}: {entry} fits {gpus} GPUs, and CUDA ends the list there",
    GpuCode.CUDA_ORDER: "{variable} counts in CUDA's order, fastest first, which the driver does not know; "
    "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPUs by UUID",
    GpuCode.NO_BUS_IDS: "{variable} counts by PCI bus id, which the driver does not report for every GPU",
    GpuCode.AMD_ORDER: "{variable} counts AMD GPUs in an order that amdsmi does not report; name them: "
    "{gpus}",
}


def gpu_words(reason: Reason) -> str:
    """Why a process may use no GPU, or not all."""
    causes = "; ".join(map(gpu_words, reason.because))
    return _WORDS[GpuCode(reason.code)].format(**reason.values, causes=causes)
