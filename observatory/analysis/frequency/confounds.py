"""What makes a sweep say less than it seems to: caps that never bind, clocks that were not requested.

The two confounds of arXiv 2605.11999. A cap that no phase ever reaches changes nothing, and a comparison of
such caps compares noise. A clock request above what the chip allows is accepted without a word, and so are
requests under a power limit: rows that look like several clocks are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from observatory.analysis.frequency.model_file import Confound, Reference, Setting
from observatory.analysis.frequency.points import CLOCK_STEP_MHZ, SLOWED_LABELS

SlowedKind = Literal["slowed by heat", "slowed by the brake"]

#: A limit that holds the clock for less than this share of the time does not bind.
BINDING_SHARE = 0.01
#: A device that draws more than this part of its limit may be held by it although nothing reports it.
_NEAR_LIMIT = 0.95
_LIMIT_STEP = 0.01


def find_confounds(
    settings: Sequence[Setting],
    reference: Reference,
    time_scatter: float | None,
) -> list[Confound]:
    """Everything found, worst first.

    Args:
        settings: the repeats of each setting.
        reference: the unlocked operation.
        time_scatter: standard deviation of ln(time) over repeats; None without.
    """
    confounds = []
    if reference.how == "unlocked" and (reference.power_cap_share or 0.0) >= BINDING_SHARE:
        confounds.append(_capped_reference(reference))
    confounds += _slowed(settings)
    confounds += _in_time(settings)
    confounds += _caps(settings, reference, time_scatter)
    confounds += _clamps(settings)
    confounds += _limits(settings)
    return confounds


def _capped_reference(reference: Reference) -> Confound:
    return Confound(
        kind="unlocked is capped",
        numbers={
            "power_cap_share": reference.power_cap_share,
            "sm_clock_mhz": reference.sm_clock_mhz,
            "limit_mw": reference.limit_mw,
        },
    )


def _slowed(settings: Sequence[Setting]) -> list[Confound]:
    """Settings that heat or the brake has slowed down, with what is missing for that."""
    confounds = []
    causes: tuple[tuple[SlowedKind, list[int]], ...] = (
        ("slowed by heat", [item.heated for item in settings]),
        ("slowed by the brake", [item.braked for item in settings]),
    )
    for kind, repeats in causes:
        slow = [item for item, count in zip(settings, repeats, strict=True) if count]
        if slow:
            lost = sum(not item.iteration_s_R for item in slow)
            numbers = {"points": sum(repeats), "settings": len(slow), "lost": lost, **_places(slow)}
            confounds.append(Confound(kind=kind, numbers=numbers))
    return confounds


def _in_time(settings: Sequence[Setting]) -> list[Confound]:
    """Settings whose energy is integrated power of iterations that move in time with the sensor."""
    flagged = [item for item in settings if item.flagged]
    if not flagged:
        return []
    repeats = sum(item.flagged for item in flagged)
    numbers = {"points": repeats, "settings": len(flagged), **_places(flagged)}
    return [Confound(kind="in time with the sensor", numbers=numbers)]


def _places(settings: Sequence[Setting]) -> dict[str, float | None]:
    """Which settings these are."""
    locks = [item.requested_sm_clock_mhz for item in settings if item.requested_sm_clock_mhz is not None]
    return {
        "unlocked": any(item.kind == "unlocked" for item in settings),
        "locks": len(locks),
        "lowest_lock_mhz": min(locks, default=None),
        "highest_lock_mhz": max(locks, default=None),
        "capped": any(item.kind == "cap" for item in settings),
    }


def _caps(settings: Sequence[Setting], reference: Reference, time_scatter: float | None) -> list[Confound]:
    """Caps that hold nothing; caps for which neither driver nor power shows it are skipped."""
    caps = {
        item.limit_mw: (item, binds)
        for item in settings
        if item.kind == "cap" and item.iteration_s_R and item.limit_mw
        if (binds := _binds(item)) is not None
    }
    if not caps:
        return []
    limits = [limit for limit in caps if limit is not None]
    drawn = [
        (power, power / limit) for limit, (item, _) in caps.items() if limit and (power := _power_mw(item))
    ]
    rates = [1.0 / float(np.median(item.iteration_s_R)) for item, _ in caps.values()]
    rates.append(1.0 / reference.iteration_s)
    spread = max(rates) / min(rates) - 1.0
    numbers: dict[str, float | None] = {
        "caps": float(len(caps)),
        "lowest_cap_mw": min(limits),
        "highest_cap_mw": max(limits),
        "lowest_power_mw": min((power for power, _ in drawn), default=None),
        "highest_power_mw": max((power for power, _ in drawn), default=None),
        "highest_power_over_limit": max((part for _, part in drawn), default=None),
        "throughput_spread": spread,
        "time_scatter": time_scatter,
    }
    loose = [limit for limit in limits if not caps[limit][1]]
    if len(loose) == len(limits):
        return [Confound(kind="cap never binds", numbers=numbers)]
    if not loose:
        return []
    binding = max(limit for limit in limits if caps[limit][1])
    return [
        Confound(
            kind="some caps do not bind",
            numbers={**numbers, "lowest_loose_cap_mw": min(loose), "highest_binding_cap_mw": binding},
        )
    ]


def _binds(setting: Setting) -> bool | None:
    """Whether the limit holds the clock; None when neither the driver nor the power shows it."""
    if setting.label == "power-capped":
        return True
    if setting.power_cap_share is not None:
        return setting.power_cap_share >= BINDING_SHARE
    power = _power_mw(setting)
    if power is None or not setting.limit_mw or power >= _NEAR_LIMIT * setting.limit_mw:
        return None
    return False


def _power_mw(setting: Setting) -> float | None:
    if not setting.energy_mj_R:
        return None
    return float(np.median(np.array(setting.energy_mj_R) / np.array(setting.iteration_s_R)))


def _clamps(settings: Sequence[Setting]) -> list[Confound]:
    """Locks that ran at another clock than the requested one, put together by where they ended up."""
    missed: dict[float, list[Setting]] = {}
    for item in settings:
        wanted, sampled_mhz = item.requested_sm_clock_mhz, item.sm_clock_mhz
        if (
            item.kind == "lock"
            and item.label not in SLOWED_LABELS
            and wanted is not None
            and sampled_mhz is not None
            and abs(sampled_mhz - wanted) > CLOCK_STEP_MHZ
        ):
            missed.setdefault(sampled_mhz, []).append(item)
    confounds = []
    for sampled_mhz, members in sorted(missed.items()):
        requested_mhz = [item.requested_sm_clock_mhz or 0.0 for item in members]
        confounds.append(
            Confound(
                kind="clock not as requested",
                numbers={
                    "requested_low_mhz": min(requested_mhz),
                    "requested_high_mhz": max(requested_mhz),
                    "sm_clock_mhz": sampled_mhz,
                    "locks": len(members),
                    "capped": any(item.label == "power-capped" for item in members),
                },
            )
        )
    return confounds


def _limits(settings: Sequence[Setting]) -> list[Confound]:
    confounds = []
    for item in settings:
        wanted = item.requested_limit_mw
        if wanted and item.limit_mw and abs(item.limit_mw - wanted) > _LIMIT_STEP * wanted:
            confounds.append(
                Confound(
                    kind="limit not as requested",
                    numbers={"requested_limit_mw": wanted, "limit_mw": item.limit_mw},
                )
            )
    return confounds
