"""Commands that lock a device to a clock and undo it, for people and programs that may. Nothing is run here.

Every function returns lines of shell. A device is named by its UUID, never by an index that another program
counts differently; it comes from a file and is quoted.
"""

from __future__ import annotations

import shlex

from observatory.errors import ClockError

__all__ = [
    "all_commands",
    "nvidia_smi_commands",
    "srun_commands",
    "wrapper_commands",
    "zeusd_commands",
]

_ZEUSD_SOCKET = "${ZEUSD_SOCK_PATH:-/var/run/zeusd.sock}"
_LONGEST_UUID = 128


def nvidia_smi_commands(uuid: str | None, sm_clock_mhz: int) -> list[str]:
    """Lock, look, undo with nvidia-smi, which needs root.

    Args:
        uuid: of the device; None leaves a place to fill in.
        sm_clock_mhz: the clock.
    """
    device = _quoted(uuid)
    return [
        "# as root (CAP_SYS_ADMIN); stays until it is reset or the driver reloads, also when the job dies:",
        f"nvidia-smi -i {device} --lock-gpu-clocks={sm_clock_mhz},{sm_clock_mhz}",
        "# the clock seen under load is the only proof that a lock holds:",
        f"nvidia-smi -i {device} --query-gpu=clocks.sm,clocks_event_reasons.active --format=csv -l 1",
        "# undo:",
        f"nvidia-smi -i {device} --reset-gpu-clocks",
    ]


def srun_commands(sm_clock_mhz: int) -> list[str]:
    """A Slurm step at that clock; Slurm takes the nearest clock there is and resets it afterwards."""
    return [
        "# for one job step, no privileges; Slurm up to 25.11 sets application clocks, from 26.05 on "
        "locked ones:",
        f"srun --gpu-freq={sm_clock_mhz},verbose COMMAND",
    ]


def zeusd_commands(uuid: str | None, sm_clock_mhz: int) -> list[str]:
    """Lock and undo through the socket of a zeusd that the site runs (0.3 or newer).

    zeusd counts devices as nvidia-smi does, so that the index is asked for by UUID.
    """
    base = f'curl --fail-with-body --unix-socket "{_ZEUSD_SOCKET}" -X POST'
    url = "http://localhost/gpu"
    index = "gpu_ids=${index}&block=true"
    clocks = f"min_clock_mhz={sm_clock_mhz}&max_clock_mhz={sm_clock_mhz}"
    return [
        "# where the site runs zeusd, no privileges:",
        f'index="$(nvidia-smi -i {_quoted(uuid)} --query-gpu=index --format=csv,noheader)"',
        f'{base} "{url}/set_gpu_locked_clocks?{index}&{clocks}"',
        "# undo:",
        f'{base} "{url}/reset_gpu_locked_clocks?{index}"',
    ]


def wrapper_commands(template: str | None, uuid: str | None, sm_clock_mhz: int) -> list[str]:
    """The site's own wrapper.

    Args:
        template: its command with ``{uuid}`` and ``{clock_mhz}``; None asks for one.
        uuid: of the device.
        sm_clock_mhz: the clock.

    Raises:
        ClockError: a template that does not take the clock, or with other braces.
    """
    if template is None:
        return [
            "# otherwise ask the site for a wrapper; the sudo rule behind it needs these two commands only:",
            f"#   nvidia-smi -i UUID --lock-gpu-clocks={sm_clock_mhz},{sm_clock_mhz}",
            "#   nvidia-smi -i UUID --reset-gpu-clocks",
        ]
    others = template.replace("{uuid}", "").replace("{clock_mhz}", "")
    if "{clock_mhz}" not in template or set(others) & set("{}") or not template.isprintable():
        raise ClockError(
            f"wrapper {template[:80]!r} is not a command with {{clock_mhz}} and, where it names a device, "
            f"{{uuid}}; "
            "give one such as 'sudo site-lock {uuid} {clock_mhz}'"
        )
    parts = template.split("{uuid}")
    line = _quoted(uuid).join(part.replace("{clock_mhz}", str(sm_clock_mhz)) for part in parts)
    return ["# with the site's wrapper:", line]


def all_commands(uuid: str | None, sm_clock_mhz: float, *, wrapper: str | None = None) -> list[str]:
    """Every way there is, the unprivileged ones first."""
    clock = round(sm_clock_mhz)
    return [
        *srun_commands(clock),
        *zeusd_commands(uuid, clock),
        *wrapper_commands(wrapper, uuid, clock),
        *nvidia_smi_commands(uuid, clock),
    ]


def _quoted(uuid: str | None) -> str:
    """The UUID for a shell; a place to fill in where there is none that a shell could take."""
    if not uuid or not uuid.isprintable() or len(uuid) > _LONGEST_UUID:
        return "GPU_UUID"
    return shlex.quote(uuid)
