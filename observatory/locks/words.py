"""Whether clocks and limits of a GPU may be set, and what became of leases: the codes, and their words."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from observatory.reasons import Reason


class LockCode(StrEnum):
    """Whether a GPU's clock may be locked, as far as it is known without trying."""

    ALLOWED = "allowed"
    NOT_PERMITTED = "not_permitted"
    #: Another process has the lease, or the GPU does not answer; ``error`` has the words.
    UNAVAILABLE = "unavailable"
    #: Refused by our own rules, whatever the driver permits.
    PARTITIONED = "partitioned"
    PARTITIONS_UNKNOWN = "partitions_unknown"
    USERS_UNKNOWN = "users_unknown"
    SHARED = "shared"


class LeaseCode(StrEnum):
    """Why a lease does not hold, was undone or was not; behind some the names of the values they have."""

    BOOTED_SINCE = "booted_since"
    OWNER_GONE = "owner_gone"  # pid
    EXPIRED = "expired"
    #: The lease holds, as far as is known.
    OWNER_LIVES = "owner_lives"  # pid
    OWNER_UNSEEN = "owner_unseen"  # pid, left_s: its owner is of another PID namespace
    #: It was undone although it held.
    FORCED = "forced"
    GIVEN_BACK = "given_back"
    NOT_UNDONE = "not_undone"  # error


_LEASE_WORDS = {
    LeaseCode.BOOTED_SINCE: "the machine was booted since",
    LeaseCode.OWNER_GONE: "its owner, process {pid}, is gone",
    LeaseCode.EXPIRED: "it has expired",
    LeaseCode.OWNER_LIVES: "its owner, process {pid}, lives; --force undoes it all the same",
    LeaseCode.OWNER_UNSEEN: "it is held by process {pid} of another PID namespace, judged by its expiry in "
    "{left_s:.0f} s; --force undoes it all the same",
    LeaseCode.FORCED: "as asked for",
    LeaseCode.GIVEN_BACK: "it was given back meanwhile",
    LeaseCode.NOT_UNDONE: "{error}",
}


def lease_words(reason: Reason) -> str:
    """Why a lease does not hold, was undone, or was not."""
    return _LEASE_WORDS[LeaseCode(reason.code)].format(**reason.values)


_SHOWN_PIDS = 6


def _shared(values: dict[str, Any]) -> str:
    pids = values["pids"]
    shown = ", ".join(map(str, pids[:_SHOWN_PIDS])) + (", ..." if len(pids) > _SHOWN_PIDS else "")
    return (
        f"{values['gpu']} is used by processes other than process {values['owner_pid']} and its descendants: "
        f"{shown} (as the driver counts them; in a container it may count otherwise)"
    )


_REFUSALS: dict[StrEnum, tuple[Callable[[dict[str, Any]], str], str | None]] = {
    LockCode.PARTITIONED: (
        "{gpu} is partitioned (MIG is on or about to be): its clock is that of all instances".format_map,
        "use a GPU that is not",
    ),
    LockCode.PARTITIONS_UNKNOWN: (
        "the driver does not report whether {gpu} is partitioned ({answer})".format_map,
        None,
    ),
    LockCode.USERS_UNKNOWN: (
        "the driver does not report which processes use {gpu} ({answer})".format_map,
        None,
    ),
    LockCode.SHARED: (_shared, "use a GPU of your own"),
    LockCode.UNAVAILABLE: ("{error}".format_map, None),
}


def refusal_words(refusal: Reason) -> str:
    """Why a GPU's clock is not ours to set."""
    what, _ = _REFUSALS[refusal.code]
    return what(dict(refusal.values))


def refusal_remedy(refusal: Reason) -> str | None:
    """What to do about it; None where nothing can be done."""
    return _REFUSALS[refusal.code][1]


def outlook_words(outlook: Reason) -> str:
    """Whether clocks may be locked, for people; the driver alone decides."""
    if outlook.code in _REFUSALS:
        return "; ".join(filter(None, (f"refused: {refusal_words(outlook)}", refusal_remedy(outlook))))
    span = "{clocks} clocks from {low_mhz} to {high_mhz} MHz".format_map(dict(outlook.values))
    if outlook.code is LockCode.ALLOWED:
        return f"may be locked: {span}, and this process has CAP_SYS_ADMIN"
    lacks = "lacks" if outlook.values["capability_known"] else "may lack"
    return f"not permitted: {span}, and this process {lacks} CAP_SYS_ADMIN (docs/power.md#permissions)"
