"""Help pages, completion and the version, as a terminal of 80 columns shows them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from observatory.cli.app import _COMMANDS, _GROUPS, command
from observatory.cli.examples import EXAMPLES

LEAVES = sorted(_COMMANDS)
PAGES = [name.split() for name in ("", *LEAVES, *_GROUPS)]


def leaf(path: str) -> Any:
    found = command()
    for word in path.split():
        found = found.get_command(None, word)
    return found


@pytest.mark.parametrize("argv", PAGES, ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_fits_80_columns_and_cuts_nothing(
    argv: list[str], option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*argv, option]) == 0
    page = capsys.readouterr().out
    assert all(len(line) <= 80 for line in page.splitlines())
    assert not {"…", "range", "<"} & set(page.split())
    for param in leaf(" ".join(argv)).params:
        for name in param.opts if param.param_type_name == "option" else ():
            assert name in page.replace(",", " ").split(), name


@pytest.mark.parametrize("path", LEAVES)
def test_every_option_has_a_text_and_a_name_for_its_value(path: str) -> None:
    for param in leaf(path).params:
        assert param.help
        assert param.help.endswith((".", ")")), param.help
        if param.param_type_name == "option" and not param.is_flag:
            assert param.metavar


@pytest.mark.parametrize("path", LEAVES)
def test_every_command_has_two_examples_that_parse(path: str) -> None:
    assert len(EXAMPLES[path]) == 2
    for example in EXAMPLES[path]:
        words = shlex.split(example.split(" > ")[0])
        start = words.index("observatory") + 1
        assert words[start : start + len(path.split())] == path.split()
        arguments = words[start + len(path.split()) :]
        leaf(path).make_context(path, arguments)  # raises where an option or an argument does not exist


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_has_a_short_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert capsys.readouterr().out == "moe-observatory 0.1.0\n"


#: Installs what the console script prints for bash, then completes the words that are its arguments.
COMPLETE = """
eval "$(_OBSERVATORY_COMPLETE=source_bash observatory)"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p observatory | sed 's/.*-F //; s/ .*//') observatory
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("observatory ro", {"routing", "route-fetch"}),
        ("observatory clocks rec", {"recommend", "recover"}),
        ("observatory routing --b", {"--bootstrap"}),
        ("observatory clocks sweep --to", {"--tokens-per-iteration", "--torch-device"}),
        ("observatory profile --ex", {"--exchange-timeout-s"}),
    ],
)
def test_bash_completes_commands_and_options(words: str, completed: set[str]) -> None:
    scripts = Path(sys.executable).parent
    if not (scripts / "observatory").exists():
        pytest.skip("the console script is not installed")
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", *words.split()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"},
    )
    assert set(done.stdout.split()) == completed, done.stderr


def imported_by(*argv: str) -> set[str]:
    """Modules that a command has imported when it ends."""
    code = (
        "import sys; from observatory.cli import main; code = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {module.split(".")[0] for module in done.stderr.split()} | set(done.stderr.split())


def test_the_version_imports_no_library() -> None:
    heavy = {"numpy", "pandas", "scipy", "pyarrow", "torch", "plotly", "pydantic", "rich"}
    assert not heavy & imported_by("--version")


def test_help_imports_no_library() -> None:
    assert not {"numpy", "pandas", "scipy", "pyarrow", "torch", "plotly"} & imported_by("scan", "--help")


ANALYSES = ("routing.document", "network.layouts", "exchange.document", "energy.document")


@pytest.mark.parametrize("module", ANALYSES)
def test_analyses_import_no_slow_part_of_a_library(module: str) -> None:
    code = f"import sys, observatory.analysis.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"scipy.stats", "scipy.optimize", "scipy.integrate", "plotly", "torch", "rich", "matplotlib"}
    assert not slow & set(done.stdout.split())
