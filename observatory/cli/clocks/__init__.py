"""``observatory clocks``: which clock, and what it costs. Each command stands in a file of its own."""

from __future__ import annotations

import typer

from observatory.cli.clocks.fit import fit
from observatory.cli.clocks.recommend import recommend
from observatory.cli.clocks.recover import recover
from observatory.cli.clocks.sweep import sweep
from observatory.cli.clocks.unlock import status, unlock

__all__ = ["clocks_group"]


def clocks_group() -> typer.Typer:
    """The ``clocks`` command and what it can do."""
    group = typer.Typer(help="SM clocks: fit a sweep and choose a clock.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command("sweep")(sweep)
    group.command("recover")(recover)
    group.command("fit")(fit)
    group.command("recommend")(recommend)
    group.command("status")(status)
    group.command("unlock")(unlock)
    return group
