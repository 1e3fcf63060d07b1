"""All subcommands under one name; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from observatory import __version__

#: Module and function of each command.
_COMMANDS = {
    "quickstart": "quickstart:quickstart",
    "profile": "profile:profile",
    "run": "run:run",
    "ctl": "ctl:ctl",
    "grid": "grid:grid",
    "routing": "routing:routing",
    "exchanges": "exchanges:exchanges",
    "scan": "scan:scan",
    "place": "place:place",
    "route-fetch": "route_fetch:route_fetch",
    "advise": "advise:advise",
    "compare": "compare:compare",
    "plan": "plan:plan",
    "history": "history:history",
    "check": "check:check",
    "top": "top:top",
    "metrics": "metrics:metrics",
    "reduce": "reduce:reduce",
    "report": "report:report",
    "import": "import_:import_",
    "export": "export:export",
    "bench alltoall": "bench:alltoall",
    "bench experts": "bench:experts",
    "bench route-fetch": "route_fetch:bench",
    "replay": "replay:replay",
    "fit": "fit:fit",
    "power": "power:power",
    "energy": "energy:energy",
    "reuse measure": "reuse:measure",
    "reuse show": "reuse:show",
    "clocks sweep": "clocks.sweep:sweep",
    "clocks recover": "clocks.recover:recover",
    "clocks fit": "clocks.fit:fit",
    "clocks recommend": "clocks.recommend:recommend",
    "clocks status": "clocks.unlock:status",
    "clocks unlock": "clocks.unlock:unlock",
    "site init": "site:init",
    "site check": "site:check",
    "site example": "site:example",
    "submit": "submit:submit",
    "jobs": "jobs:jobs",
    "collect": "collect:collect",
    "cancel": "jobs:cancel",
    "doctor": "doctor:doctor",
}
_GROUPS = {
    "bench": "Micro-benchmarks of exchanges and experts.",
    "reuse": "Energy of prefill against the cached fraction of the prompt.",
    "site": "What a site's batch system wants of jobs: written, checked, by example.",
    "clocks": "SM clocks: sweep them, fit the sweep, choose a clock.",
}
_SECTIONS = {
    "Capture": ("quickstart", "profile", "run", "ctl", "top", "metrics", "grid"),
    "Analysis": ("routing", "exchanges", "scan", "compare", "history", "check", "reduce", "report"),
    "Other tools": ("import", "export"),
    "Decisions": ("place", "advise", "route-fetch", "plan"),
    "Network": ("bench", "replay", "fit"),
    "Batch": ("site", "submit", "jobs", "collect", "cancel"),
    "Power": ("power", "energy", "reuse", "clocks"),
    "Machine": ("doctor",),
}  # fmt: skip
#: Commands of one process that read runs and results, and that a rank of a job may well call.
_ANALYSIS = frozenset(
    {*_SECTIONS["Analysis"], *_SECTIONS["Decisions"], *_SECTIONS["Other tools"], "fit", "energy"} - {"reduce"}
)


class Group(TyperGroup):
    """A group whose commands are imported one by one.

    Attributes:
        path: the words in front of its commands; empty for the root.
    """

    path = ""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click passes it
        """Names of the subcommands, in the order of the table above."""
        words = [
            command.split() for command in _COMMANDS if f"{command} ".startswith(f"{self.path} ".lstrip())
        ]
        depth = len(self.path.split())
        return list(dict.fromkeys(word[depth] for word in words))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - likewise
        """Import a command; None when there is none of that name."""
        path = f"{self.path} {cmd_name}".strip()
        if path in _GROUPS:
            group = Group(name=cmd_name, help=_GROUPS[path], no_args_is_help=True)
            group.path = path
            return group
        return _load(path) if path in _COMMANDS else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        from observatory.cli.help import help_page

        sections = {"Commands": tuple(self.list_commands(ctx))} if self.path else _SECTIONS
        commands = {
            section: [(name, _summary(self.get_command(ctx, name))) for name in names]
            for section, names in sections.items()
        }
        formatter.write("\n".join(help_page(self, ctx, commands=commands)) + "\n")


def _summary(command: Any) -> str:
    """The first sentence of a help text, without its end."""
    return " ".join(str(command.help or "").split("\n\n")[0].split()).removesuffix(".")


def _load(path: str) -> Any:
    """The command of a name in the table above."""
    from observatory.cli.help import Command, name_values

    module, _, name = _COMMANDS[path].partition(":")
    function = getattr(importlib.import_module(f"observatory.cli.{module}"), name)
    app = typer.Typer(add_completion=False)
    app.command(path.rsplit(maxsplit=1)[-1], cls=Command)(function)
    command = typer.main.get_command(app)
    name_values(command, function)
    return command


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-observatory {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """See what mixture-of-experts models do to the machines they run on, then decide."""
    if context.invoked_subcommand in _ANALYSIS:
        _note_ranks(context.invoked_subcommand)


def _note_ranks(subcommand: str) -> None:
    """State, on rank 0, that several ranks do the same work."""
    from observatory.cli.output import say
    from observatory.errors import CaptureError
    from observatory.host.ranks import find_rank

    try:
        where = find_rank()
    except CaptureError:  # analysis needs no rank
        return
    if where.world > 1 and where.rank == 0:
        say(
            f"note: {subcommand} runs in one process; {where.launcher} started {where.world}, "
            "and each that runs it does the same work"
        )


def command() -> Any:
    """The command tree, ready to run."""
    app = typer.Typer(
        name="observatory",
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return typer.main.get_command(app)
