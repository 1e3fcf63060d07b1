"""Help pages: options in sections, with the metavars that people know, and two examples for each command.

They are written here rather than by typer, whose table cuts names at 80 columns and shows types in place of
metavars.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.core import TyperCommand

from observatory.cli.examples import EXAMPLES
from observatory.cli.imported import check_imported
from observatory.cli.options import OUTPUT

_NARROWEST, _WIDEST = 60, 100
_LONGEST_NAME = 30
#: Of values whose option does not name its own.
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_UNITS = {"_s": "SECONDS", "_ms": "MS"}


class Command(TyperCommand):
    """A command whose help page is made by `help_page`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command on runs that hold what it needs."""
        check_imported(ctx.command_path.partition(" ")[2], ctx.params)
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write("\n".join(help_page(self, ctx)) + "\n")


def name_values(command: Any, function: Callable[..., None]) -> None:
    """Give every option of a command a metavar, after the type and the unit of its parameter."""
    hints = get_type_hints(function)
    for param in command.params:
        kind = hints.get(param.name)
        if param.metavar is not None or kind is None or kind is bool or param.param_type_name != "option":
            continue
        inner = next((part for part in (kind, *_parts(kind)) if part in _METAVARS), str)
        unit = next((name for end, name in _UNITS.items() if param.name.endswith(end)), None)
        param.metavar = unit if unit and inner is float else _METAVARS[inner]


def _parts(kind: Any) -> Iterator[Any]:
    """The types inside an optional type or a list."""
    for part in get_args(kind):
        yield part
        yield from _parts(part)


def help_page(
    command: Any, ctx: Any, *, commands: dict[str, list[tuple[str, str]]] | None = None
) -> list[str]:
    """Lines of a help page, none wider than a terminal of 60 columns or more.

    Args:
        command: the command or group.
        ctx: its context.
        commands: name and summary of subcommands, by section.
    """
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    lines = [*_wrapped(_usage(command, ctx, is_group=commands is not None), width, indent=7), ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += [*_wrapped(" ".join(paragraph.split()), width), ""]
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            sections.setdefault(_section(param), []).append((_names(param), _text(param, ctx)))
    last = {title: sections.pop(title, []) for title in (OUTPUT, "General")}
    for title, rows in {**sections, **(commands or {}), **last}.items():
        if rows:
            lines += [f"{title}:", *_rows(rows, width), ""]
    examples = EXAMPLES.get(ctx.command_path.partition(" ")[2], ())
    if examples:
        lines += [
            "Examples:",
            *(f"  {line}" for example in examples for line in _command_lines(example, width)),
        ]
    return lines


def _usage(command: Any, ctx: Any, *, is_group: bool) -> str:
    """The form of the command line, arguments that may be left out in brackets."""
    words = [_names(param) for param in command.params if param.param_type_name == "argument"]
    optional = [not param.required for param in command.params if param.param_type_name == "argument"]
    shown = [f"[{word}]" if may_lack else word for word, may_lack in zip(words, optional, strict=True)]
    return " ".join(["Usage:", ctx.command_path, "[OPTIONS]", *shown, *(["COMMAND ..."] if is_group else [])])


def _section(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    usual = (
        "General"
        if param.name in ("help", "_version", "install_completion", "show_completion")
        else "Options"
    )
    return getattr(param, "rich_help_panel", None) or usual


def _names(param: Any) -> str:
    """The option with its value, as it is typed."""
    if param.param_type_name == "argument":
        return f"{str(param.metavar or param.name).upper()}{' ...' if param.nargs == -1 else ''}"
    names = ", ".join(sorted(param.opts, key=len))
    return names if param.is_flag or param.metavar is None else f"{names} {param.metavar}"


def _text(param: Any, ctx: Any) -> str:
    """The help text, ended by the default, or by a note that there is none."""
    text = param.help or ""
    default = param.get_default(ctx)
    if param.required:
        return f"{text} (required)"
    if param.param_type_name == "option" and not param.is_flag and default not in (None, [], ()):
        return (
            f"{text} (default: {default:g})" if isinstance(default, float) else f"{text} (default: {default})"
        )
    return text


def _rows(rows: list[tuple[str, str]], width: int) -> Iterator[str]:
    """Names in one column and texts in the next; a long name has a line of its own."""
    column = 4 + max((len(name) for name, _ in rows if len(name) <= _LONGEST_NAME), default=0)
    for name, text in rows:
        folded = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False) or [""]
        if len(name) > _LONGEST_NAME:
            yield f"  {name}"
        else:
            yield f"{f'  {name}'.ljust(column)}{folded.pop(0)}".rstrip()
        yield from (" " * column + line for line in folded)


def _wrapped(text: str, width: int, *, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _command_lines(example: str, width: int) -> list[str]:
    """A command over lines that a shell takes as one."""
    folded = textwrap.wrap(
        example, width - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return [f"{line} \\" for line in folded[:-1]] + folded[-1:]
