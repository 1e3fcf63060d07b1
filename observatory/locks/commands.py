"""Commands that lock a device to a clock, limit its power and undo it, for people and programs that may.

Nothing is run here. Every function returns lines of shell. A device is named by its UUID, never by an index
that another program counts differently; it comes from a file and is quoted. What is set so is in no lease:
this program does not undo it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from observatory.errors import ClockError

_ZEUSD = 'curl --fail-with-body --unix-socket "${ZEUSD_SOCK_PATH:-/var/run/zeusd.sock}" -X POST'
_ZEUSD_GPU = "http://localhost/gpu"
_ZEUSD_INDEX = "gpu_ids=${index}&block=true"
_WRAPPER = "a sudo wrapper of the site, if it has one"
_LONGEST_UUID = 128


def nvidia_smi_commands(uuid: str | None, sm_clock_mhz: int) -> list[str]:
    """Lock, check, undo with nvidia-smi, which needs root.

    Args:
        uuid: of the device; None leaves a place to fill in.
        sm_clock_mhz: the clock.
    """
    device = _quoted(uuid)
    return [
        "# as root (CAP_SYS_ADMIN); stays until it is reset or the driver reloads, also when the job dies:",
        _nvidia_smi_lock(device, sm_clock_mhz),
        "# the clock seen under load is the only proof that a lock holds:",
        f"nvidia-smi -i {device} --query-gpu=clocks.sm,clocks_event_reasons.active --format=csv -l 1",
        "# undo:",
        _nvidia_smi_unlock(device),
    ]


def srun_commands(sm_clock_mhz: int) -> list[str]:
    """A Slurm step at that clock; Slurm takes the nearest clock there is and resets it afterwards."""
    return [
        "# for one job step, no privileges; Slurm up to 25.11 sets application clocks, from 26.05 on "
        "locked ones:",
        _srun(sm_clock_mhz, "COMMAND"),
    ]


def zeusd_commands(uuid: str | None, sm_clock_mhz: int) -> list[str]:
    """Lock and undo through the socket of a zeusd that the site runs (0.3 or newer).

    zeusd counts devices as nvidia-smi does, so that the index is asked for by UUID.
    """
    return [
        "# where the site runs zeusd, no privileges:",
        _zeusd_index(uuid),
        _zeusd_lock(sm_clock_mhz),
        "# undo:",
        _zeusd("reset_gpu_locked_clocks"),
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
            "{uuid}",
            remedy="give one such as 'sudo site-lock {uuid} {clock_mhz}'",
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


def lock_ways(uuid: str, sm_clock_mhz: int) -> list[str]:
    """Ways to get the SM clock locked without being allowed to, each in one line, for a message."""
    return [
        f"sudo {_nvidia_smi_lock(_quoted(uuid), sm_clock_mhz)}",
        f"{_srun(sm_clock_mhz, 'COMMAND')} (for that step only)",
        f"{_zeusd_index(uuid)}; {_zeusd_lock(sm_clock_mhz)}",
        _WRAPPER,
    ]


def unlock_ways(uuid: str) -> list[str]:
    """Ways to get the SM clock unlocked."""
    return [
        f"sudo {_nvidia_smi_unlock(_quoted(uuid))}",
        f"{_zeusd_index(uuid)}; {_zeusd('reset_gpu_locked_clocks')}",
        _WRAPPER,
    ]


def limit_ways(uuid: str, limit_mw: int) -> list[str]:
    """Ways to get a power limit set."""
    return [
        f"sudo {_nvidia_smi_limit(_quoted(uuid), f'{limit_mw / 1e3:g}')}",
        f"{_zeusd_index(uuid)}; {_zeusd('set_power_limit', f'power_limit_mw={limit_mw}')}",
        _WRAPPER,
    ]


def plan_commands(
    uuid: str | None,
    clocks_mhz: Sequence[int],
    limits_mw: Sequence[int],
    *,
    sweep: Sequence[str],
    program: Sequence[str] = (),
    stem: str,
    default_limit_mw: int | None = None,
    wrapper: str | None = None,
) -> dict[str, list[str]]:
    """A sweep with locks set outside: every way to set each clock and limit, and what to run meanwhile.

    Args:
        uuid: of the device.
        clocks_mhz: the plan's clocks.
        limits_mw: its power limits.
        sweep: ``observatory clocks sweep`` with its options, without clocks, limits and result.
        program: the user's own, behind ``--``.
        stem: result file without its ending; each setting gets one of its own.
        default_limit_mw: to go back to; None leaves a place to fill in.
        wrapper: the site's own command (:func:`wrapper_commands`).

    Returns:
        Lines by what they do.
    """
    files: list[str] = []

    def step(clock: str, limit: str = "none") -> str:
        files.append(f"{stem}-{clock if limit == 'none' else limit + 'W'}.json")
        limits = [] if limit == "none" else ["--limits", limit]
        options = ["--set-outside", "--clocks", clock, *limits, "--out", files[-1]]
        return shlex.join([*sweep, *options, *(["--", *program] if program else [])])

    device = _quoted(uuid)
    clocks = list(dict.fromkeys(clocks_mhz))
    limits = list(dict.fromkeys(limits_mw))
    reference = step("none")
    at_clock = {clock: step(str(clock)) for clock in clocks}
    at_limit = {limit: step("none", f"{limit / 1e3:g}") for limit in limits}
    ways: dict[str, list[str]] = {}
    if clocks:
        ways["with Slurm, no privileges: a step per clock, all in one allocation and so on one GPU"] = [
            f"srun {reference}",
            *(_srun(clock, command) for clock, command in at_clock.items()),
        ]
    ways["set in another way: one of the ways below before each of these, the first with nothing set"] = [
        reference,
        *at_clock.values(),
        *at_limit.values(),
    ]
    if clocks:
        ways["clocks where the site runs zeusd, no privileges; the last line undoes it"] = [
            _zeusd_index(uuid),
            *map(_zeusd_lock, clocks),
            _zeusd("reset_gpu_locked_clocks"),
        ]
        ways["clocks with the site's wrapper"] = (
            [line for clock in clocks for line in wrapper_commands(wrapper, uuid, clock)[1:2]]
            if wrapper
            else ["# ask the site for one; its sudo rule needs the commands for root below only"]
        )
        ways["clocks as root; the last line undoes it"] = [
            *(_nvidia_smi_lock(device, clock) for clock in clocks),
            _nvidia_smi_unlock(device),
        ]
    if limits:
        default = "DEFAULT_WATTS" if default_limit_mw is None else f"{default_limit_mw / 1e3:g}"
        ways["power limits as root; the last line undoes it"] = [
            _nvidia_smi_limit(device, watts) for watts in (*(f"{limit / 1e3:g}" for limit in limits), default)
        ]
    ways["then, with all results"] = [
        shlex.join(["observatory", "clocks", "fit", *files, "--out", f"{stem}-model.json"]),
        shlex.join(["observatory", "clocks", "recommend", f"{stem}-model.json"]),
    ]
    return ways


def _srun(sm_clock_mhz: int, command: str) -> str:
    return f"srun --gpu-freq={sm_clock_mhz},verbose {command}"


def _zeusd_index(uuid: str | None) -> str:
    return f'index="$(nvidia-smi -i {_quoted(uuid)} --query-gpu=index --format=csv,noheader)"'


def _zeusd(endpoint: str, query: str = "") -> str:
    return f'{_ZEUSD} "{_ZEUSD_GPU}/{endpoint}?{_ZEUSD_INDEX}{query and "&" + query}"'


def _zeusd_lock(sm_clock_mhz: int) -> str:
    return _zeusd("set_gpu_locked_clocks", f"min_clock_mhz={sm_clock_mhz}&max_clock_mhz={sm_clock_mhz}")


def _nvidia_smi_lock(device: str, sm_clock_mhz: int) -> str:
    return f"nvidia-smi -i {device} --lock-gpu-clocks={sm_clock_mhz},{sm_clock_mhz}"


def _nvidia_smi_unlock(device: str) -> str:
    return f"nvidia-smi -i {device} --reset-gpu-clocks"


def _nvidia_smi_limit(device: str, watts: str) -> str:
    return f"nvidia-smi -i {device} --power-limit={watts}"


def _quoted(uuid: str | None) -> str:
    """The UUID for a shell; a place to fill in where there is none that a shell could take."""
    if not uuid or not uuid.isprintable() or len(uuid) > _LONGEST_UUID:
        return "GPU_UUID"
    return shlex.quote(uuid)
