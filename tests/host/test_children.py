"""What the processes that the observatory starts import, and from where, with hostile files around."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pydantic
import pytest

from observatory.host import children
from observatory.host.children import python_code
from observatory.run import open_run
from tests.devices.driver import FakeDriver
from tests.devices.driver import why_not as why_no_driver
from tests.devices.recordings import write_recording
from tests.paths import ROOT

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
HOSTILE = (
    *("pydantic", "pydantic_core", "numpy", "queue", "json", "torch", "pandas", "pyarrow", "pynvml", "typer"),
    *("typing_extensions", "select", "signal", "subprocess", "runpy", "sitecustomize", "usercustomize"),
    *("probes", "collectives", "hpc", "observatory", "startup"),
)
#: Variables that let a Python process read files, all pointing at the hostile folder.
VARIABLES = {
    "PYTHONSTARTUP": "startup.py",
    "PYTHONINSPECT": "1",
    "PYTHONHOME": ".",
    "PYTHONUSERBASE": ".",
    "PYTHONPYCACHEPREFIX": ".",
    "PYTHONPLATLIBDIR": ".",
    "PYTHONWARNINGS": "ignore::queue.Empty",
    "PYTHONBREAKPOINT": "queue.Queue",
}
PROFILE = (
    "profile",
    "tiny-gqa",
    "--data",
    "mock",
    "--batch-size",
    "1",
    "--sequence-length",
    "16",
    "--steps",
    "2",
)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder of modules that leave a mark when they are imported."""
    folder = tmp_path / "hostile"
    (folder / "reports").mkdir(parents=True)
    code = f"from pathlib import Path\n(Path({str(folder)!r}) / ('mark-' + __name__)).touch()\n"
    for name in (*HOSTILE, "reports/__init__"):
        (folder / f"{name}.py").write_text(code)
    return folder


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("mark-*"))


def run_clean(
    code: str, *arguments: str, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a process that is itself safe from the folder it works in."""
    clean = f"import sys; sys.path.append({str(ROOT)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-c", clean + textwrap.dedent(code), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


COMMAND = "from observatory.cli import run; run()"
LOCK = f"""
    from observatory.locks.locking import ClockLease
    with ClockLease.acquire({UUID!r}, duration_s=60) as lease:
        lease.lock(780)
"""


def around(hostile: Path) -> dict[str, str]:
    return {**VARIABLES, "PYTHONPATH": f":.:{hostile}:"}


@pytest.mark.slow
@pytest.mark.skipif(why_no_driver() is not None, reason=why_no_driver() or "")
def test_no_child_imports_from_where_it_works_or_from_pythonpath(hostile: Path, tmp_path: Path) -> None:
    """Ranks of a profile and of a benchmark, the power sampler, the watchdog, a report."""
    driver = FakeDriver(tmp_path / "driver")
    environment = {
        **driver.environment(around(hostile)),
        "OBSERVATORY_LEASES": str(tmp_path / "leases"),
    }
    out = tmp_path / "run"
    for code, *arguments in (
        (COMMAND, *PROFILE, "--ep", "2", "--power", "on", "--out", str(out)),
        (COMMAND, "bench", "alltoall", "--ranks", "2", "--sizes", "1KiB", "--patterns", "uniform",
         "--repeats", "2", "--out", str(tmp_path / "bench.json")),
        (COMMAND, "report", str(out), "--out", str(tmp_path / "report.html")),
        (COMMAND, "power", "--device", UUID, "--seconds", "0.3", "--out", str(tmp_path / "power")),
        (LOCK,),
    ):  # fmt: skip
        done = run_clean(code, *arguments, folder=hostile, environment=environment)
        assert marks(hostile) == [], (arguments, done.stderr)
        assert done.returncode == 0, (arguments, done.stderr)
    run = open_run(out)
    assert run.problems == ()
    assert len(run.power()) > 0
    assert len(open_run(tmp_path / "power").power()) > 0


#: Says what a child found, and where.
FOUND = """
import json, os, queue, sys, warnings
import observatory, pydantic
print(json.dumps({
    "queue": queue.__file__, "observatory": observatory.__file__, "pydantic": pydantic.__file__,
    "argv": sys.argv, "path": sys.path, "filters": sys.warnoptions, "dev": sys.flags.dev_mode,
}))
"""
#: Starts that child: arguments are where the observatory is, and the folders on this parent's path.
PARENT = """
    import subprocess
    sys.path.insert(0, sys.argv[1])
    from observatory.host.children import python_module
    sys.path[:1] = sys.argv[2:]
    sys.exit(subprocess.run(python_module("found", "--option")).returncode)
"""


def package(folder: Path, name: str, code: str, *, installed: bool = True) -> Path:
    """A module in a folder, with what installers leave beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    if installed:
        (folder / f"{name}-1.0.dist-info").mkdir()
    return folder


def found_by_child(*folders: Path, working: Path, options: tuple[str, ...] = ()) -> dict[str, Any]:
    parent = "import sys\n" + textwrap.dedent(PARENT)
    done = subprocess.run(
        [sys.executable, "-I", *options, "-c", parent, str(ROOT), *map(str, folders)],
        cwd=working,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("working", ["hostile", "."])
def test_packages_that_the_parent_found_elsewhere_are_found_but_hide_nothing_of_python(
    tmp_path: Path, hostile: Path, working: str
) -> None:
    """As environment modules put them on PYTHONPATH, or ``pip install --user`` beside the site-packages."""
    modules = package(tmp_path / "modules", "found", FOUND)
    package(modules, "pydantic", "version = 'of the module'")
    (modules / "queue.py").write_text("raise ImportError('hostile')")
    found = found_by_child(modules, hostile, working=tmp_path / working)
    assert found["pydantic"] == str(modules / "pydantic.py")  # the one that its parent would import
    assert Path(found["queue"]).parent == Path(os.__file__).parent
    assert found["observatory"] == str(ROOT / "observatory" / "__init__.py")  # whatever is installed
    assert found["argv"][1:] == ["--option"]
    assert str(hostile) not in found["path"]
    assert marks(hostile) == []


def test_a_folder_that_no_installer_has_made_supplies_only_what_is_missing(tmp_path: Path) -> None:
    """A library that was built in place and that the parent has loaded."""
    modules = package(tmp_path / "modules", "found", FOUND)
    built = package(tmp_path / "built", "pydantic", "raise ImportError('hostile')", installed=False)
    (built / "torch").mkdir()
    (built / "torch" / "__init__.py").touch()
    load = "import sys\nsys.path.insert(0, sys.argv.pop())\nimport torch\nsys.path.pop(0)\n"
    parent = load + "sys.path.append(sys.argv.pop())\n" + textwrap.dedent(PARENT)
    done = subprocess.run(
        [sys.executable, "-I", "-c", parent, str(ROOT), str(modules), str(built), str(built)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["path"].index(str(built)) > found["path"].index(str(Path(pydantic.__file__).parents[1]))
    assert found["pydantic"] == pydantic.__file__


#: Says which modules a child can import, and that installed packages have their metadata.
CAN_IMPORT = """
import importlib.metadata, json, pydantic, sys
from importlib.util import find_spec
names = ("noted", "other", "pydantic", "numpy", "flash_attn")
found = {name: spec.origin for name in names if (spec := find_spec(name))}
print(json.dumps({**found, "version": importlib.metadata.version("other")}))
"""


def test_what_lies_next_to_an_installed_package_is_not_imported(tmp_path: Path, hostile: Path) -> None:
    """As ``pip install -t .`` leaves it in the folder of a program, with ``PYTHONPATH=..`` below it."""
    package(hostile, "other", "")
    made = hostile / "other-1.0.dist-info"
    (made / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    (made / "RECORD").write_text(
        'other.py,,\n"noted/__init__.py",,\nother-1.0.dist-info/RECORD,,\n../../bin/numpy,,\n'
    )
    (hostile / "noted").mkdir()
    (hostile / "noted" / "__init__.py").touch()
    (hostile / "flash_attn.py").write_text((hostile / "numpy.py").read_text())
    (hostile / "below").mkdir()
    modules = package(tmp_path / "modules", "found", CAN_IMPORT)
    found = found_by_child(hostile, modules, working=hostile / "below")
    assert marks(hostile) == []
    assert found["other"] == str(hostile / "other.py")
    assert found["noted"] == str(hostile / "noted" / "__init__.py")
    assert found["version"] == "1.0"
    assert found["pydantic"] == pydantic.__file__
    assert str(hostile) not in found["numpy"]
    assert "flash_attn" not in found


def test_the_working_directory_is_left_out_even_if_packages_are_installed_there(tmp_path: Path) -> None:
    modules = package(tmp_path / "modules", "found", FOUND)
    working = package(tmp_path / "working", "pydantic", "raise ImportError('hostile')")
    link = tmp_path / "link"
    link.symlink_to(working)
    found = found_by_child(working, link, modules, working=working)
    assert found["pydantic"] == pydantic.__file__
    assert not {str(working), str(link), ""} & set(found["path"])


def test_warning_filters_and_development_mode_pass_on_to_children(tmp_path: Path) -> None:
    modules = package(tmp_path / "modules", "found", FOUND)
    found = found_by_child(modules, working=tmp_path, options=("-W", "ignore::UserWarning", "-X", "dev"))
    assert "ignore::UserWarning" in found["filters"]
    assert found["dev"]


def test_code_that_needs_the_standard_library_alone_gets_nothing_else(hostile: Path) -> None:
    code = (
        "import json, queue, sys; print([part for part in sys.path if 'site-packages' in part], sys.argv[1])"
    )
    done = subprocess.run(
        python_code(code, "argument"),
        cwd=hostile,
        env={**os.environ, "PYTHONPATH": str(hostile)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stdout == "[] argument\n", done.stderr
    assert marks(hostile) == []


def test_programs_of_users_keep_their_environment_and_their_working_directory(
    hostile: Path, tmp_path: Path
) -> None:
    recording = write_recording(tmp_path / "power.parquet")
    program = "import os, queue; open('seen', 'w').write(os.environ['PYTHONPATH'] + ' ' + queue.__file__)"
    done = run_clean(
        COMMAND,
        *("power", "--device", f"replay:{recording}", "--out", str(tmp_path / "run")),
        *("--", sys.executable, "-c", program),
        folder=hostile,
        environment={"PYTHONPATH": str(hostile)},
    )
    assert done.returncode == 0, done.stderr
    assert (hostile / "seen").read_text() == f"{hostile} {hostile / 'queue.py'}"


def test_python_is_started_in_one_place_only() -> None:
    """Nothing else names the interpreter, or starts processes by a library that does."""
    for path in sorted((ROOT / "observatory").rglob("*.py")):
        if path == Path(children.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {
                ast.Attribute: lambda node: [node.attr],
                ast.ImportFrom: lambda node: [str(node.module).split(".")[0], *(a.name for a in node.names)],
                ast.Import: lambda node: [alias.name.split(".")[0] for alias in node.names],
            }.get(type(node), lambda _: [])(node)
            starters = {"executable", "_base_executable", "multiprocessing", "ProcessPoolExecutor"}
            assert not starters & set(names), f"{path}:{node.lineno} starts Python by itself"
