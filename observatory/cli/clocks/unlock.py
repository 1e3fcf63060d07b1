"""``observatory clocks unlock`` and ``status``: leases of locked clocks on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from observatory.analysis.columns import Column, Table
from observatory.cli.options import JsonOption

_STATUS_COLUMNS = (
    Column(name="device", title="device", text=True, key=True),
    Column(name="owner_pid", title="owner PID"),
    Column(name="state", title="state", text=True),
    Column(name="touched", title="touched", text=True, legend="whether clocks or limits were changed"),
    Column(name="expires_in_s", title="expires in", unit="s"),
    Column(name="watchdog", title="watchdog", text=True),
)
_UNLOCK_COLUMNS = (
    Column(name="lease", title="lease", text=True, key=True),
    Column(name="device", title="device", text=True),
    Column(name="undone", title="undone", text=True),
    Column(name="reason", title="reason", text=True, otherwise=""),
)
#: By whether it lives, which is not known of a process of another PID namespace.
_WATCHDOG = {True: "watches", False: "gone", None: "not known"}


def unlock(
    device: Annotated[str | None, typer.Option(metavar="UUID", help="Only this GPU.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also leases whose owner still runs.")] = False,
    json: JsonOption = False,
) -> None:
    """Undo locks and limits that the observatory set and whose owner is gone; nothing else is touched.

    A lease of another PID namespace, a container's, is left until it expires.

    Made for the epilogue of a batch system, where every process of a job is killed at once. Fails when a
    lease that does not hold any more could not be undone.
    """
    from observatory.cli.output import print_json, print_table, say
    from observatory.locks.lease_files import lease_folder
    from observatory.locks.locking import undo_leases
    from observatory.locks.words import lease_words
    from observatory.run.documents.printed import printed_document

    folder = lease_folder()
    leases = undo_leases(folder, uuid=device, force=force)
    rows = [
        {
            "lease": item.path.name,
            "device": None if item.lease is None else item.lease.device_uuid,
            "undone": item.undone,
            "reason": lease_words(item.reason),
            "reason_code": item.reason.code.value,
        }
        for item in leases
    ]
    if json:
        print_json(printed_document("unlock", {"folder": str(folder), "leases": rows}))
    elif rows:
        print_table(Table(name="leases", columns=_UNLOCK_COLUMNS, rows=rows, title=f"leases in {folder}"))
    else:
        of = "" if device is None else f" of {device}"
        say(f"no lease{of} in {folder}: nothing of ours is locked{'' if device is None else ' there'}")
    if any(not item.undone and not item.spared for item in leases):
        raise typer.Exit(1)


def status(json: JsonOption = False) -> None:
    """Show which GPUs the observatory has locked, for whom and until when, and what watchdogs did last."""
    from observatory.cli.output import print_json, print_table, say
    from observatory.errors import ClockError
    from observatory.locks.lease import find_leases, find_logs, last_line, read_lease
    from observatory.locks.lease_files import lease_folder
    from observatory.locks.words import lease_words
    from observatory.run.documents.printed import printed_document

    folder = lease_folder()
    rows: list[dict[str, Any]] = []
    for path in find_leases(folder):
        try:
            lease = read_lease(path)
        except ClockError as error:
            missing = dict.fromkeys(column.name for column in _STATUS_COLUMNS)
            rows.append(missing | {"device": path.name, "state": str(error)})
            continue
        if lease is not None:
            problem = lease.problem
            holder = "held" if lease.owner.alive else f"held by {lease.holder}"
            rows.append(
                {
                    "device": lease.device_uuid,
                    "owner_pid": lease.owner.pid,
                    "state": lease_words(problem) if problem else holder,
                    "touched": lease.touched,
                    "expires_in_s": None if problem else round(lease.left_s),
                    "watchdog": _WATCHDOG[lease.watchdog.alive if lease.watchdog else False],
                }
            )
    logs = {path.stem: last_line(path) for path in find_logs(folder)}
    if json:
        content = {"folder": str(folder), "leases": rows, "watchdogs": logs}
        print_json(printed_document("lock_status", content))
        return
    if rows:
        print_table(Table(name="leases", columns=_STATUS_COLUMNS, rows=rows, title=f"leases in {folder}"))
    else:
        say(f"no lease in {folder}: nothing of ours is locked")
    for device, line in logs.items():
        say(f"{device}: {line or 'its watchdog wrote nothing'}")
