"""Commands that lock and unlock clocks and set limits, for those who may not do it themselves.

Pure text: nothing is run. A power limit and a lock set so are nobody's lease, and nobody takes them back.
"""

from __future__ import annotations


def clock_commands(uuid: str, sm_clock_mhz: int) -> list[str]:
    """Ways to get the SM clock locked without being allowed to, each a command or a sentence."""
    query = f"min_clock_mhz={sm_clock_mhz}&max_clock_mhz={sm_clock_mhz}"
    return [
        f"sudo nvidia-smi -i {uuid} -lgc {sm_clock_mhz},{sm_clock_mhz}  # undo: -rgc",
        f"srun --gpu-freq={sm_clock_mhz} COMMAND  # for that step only",
        _zeusd("set_gpu_locked_clocks", query),
        "a sudo wrapper of the site, if it has one",
    ]


def unlock_commands(uuid: str) -> list[str]:
    """Ways to get the SM clock unlocked."""
    return [
        f"sudo nvidia-smi -i {uuid} -rgc",
        _zeusd("reset_gpu_locked_clocks", ""),
        "a sudo wrapper of the site, if it has one",
    ]


def limit_commands(uuid: str, limit_mw: int) -> list[str]:
    """Ways to get a power limit set."""
    return [
        f"sudo nvidia-smi -i {uuid} -pl {limit_mw / 1000:g}",
        _zeusd("set_power_limit", f"power_limit_mw={limit_mw}"),
        "a sudo wrapper of the site, if it has one",
    ]


def _zeusd(endpoint: str, query: str) -> str:
    """For zeusd 0.3 and later, which counts GPUs itself and tells their PCI addresses at /discover."""
    return (
        "curl --unix-socket $ZEUSD_SOCK_PATH -X POST "
        f"'http://localhost/gpu/{endpoint}?gpu_ids=ID&block=true{'&' if query else ''}{query}'  "
        "# ID: http://localhost/discover"
    )
