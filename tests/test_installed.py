"""The package as it is installed, in a folder where modules of the user's have names like ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from observatory.run import open_run
from tests.devices.driver import FakeDriver
from tests.devices.driver import why_not as why_no_driver
from tests.paths import ROOT

pytestmark = pytest.mark.slow

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
#: Rooms of ours at the top of the repository, names that they once had, and two modules of Python that
#: torch does not import.
NAMES = (
    *("probes", "hpc", "collectives", "types_", "secrets_", "cli", "run", "errors", "text", "zoo", "tools"),
    *("statistics", "tomllib"),
)
PROFILE = (
    *("profile", "tiny-gqa", "--data", "mock", "--batch-size", "1", "--sequence-length", "16"),
    *("--steps", "2", "--power", "on", "--out", "run"),
)
LOCK = f"""
    import probes
    from observatory.locks.locking import ClockLease
    with ClockLease.acquire({UUID!r}, duration_s=60) as lease:
        lease.lock(780)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree; built from a copy, as building leaves files behind."""
    copy, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    kept = {
        *("observatory", "tools", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "LICENSE"),
        *("probes", "reports", "collectives", "hpc", "CHANGELOG.md"),
    }
    copy.mkdir()
    for name in sorted(kept):
        if (ROOT / name).is_dir() and not (ROOT / name).is_symlink():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation",
         "--no-cache-dir", "-w", str(out), str(copy)],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it; libraries come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index",
         "--no-cache-dir", str(wheel)],
        check=True, capture_output=True, timeout=400,
    )  # fmt: skip
    found = subprocess.run(
        [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    Path(found.stdout.strip(), "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of a user's with modules that leave a mark, and then raise."""
    folder = tmp_path / "project"
    (folder / "reports").mkdir(parents=True)
    mark = f"open({str(folder)!r} + '/mark-' + __name__, 'w').close()\n"
    for name in (*NAMES, "reports/__init__"):
        (folder / f"{name}.py").write_text(f"{mark}raise ImportError('the user\\'s own')\n")
    (folder / "probes.py").write_text("DIRECTIONS = 64\n")  # the user's program does import this one
    return folder


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    (metadata,) = top - {"observatory"}
    assert metadata.endswith(".dist-info")
    assert {"observatory/probes/watch.py", "observatory/py.typed", "observatory/reports/page.py"} <= set(
        names
    )
    training = ("train", "recipes", "balancing", "evaluation", "prepare_texts")
    in_zoo = [Path(name) for name in names if name.startswith("observatory/zoo/")]
    assert [path for path in in_zoo if path.stem in training] == []


@pytest.mark.skipif(why_no_driver() is not None, reason=why_no_driver() or "")
@pytest.mark.parametrize("entry", ["console script", "-m"])
def test_modules_of_the_user_get_in_the_way_of_nothing(
    installed: Path, project: Path, tmp_path: Path, entry: str
) -> None:
    """Profile with power, power alone, a lock and its watchdog from a program of the user's, a report."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(project),
        "OBSERVATORY_LEASES": str(tmp_path / "leases"),
        "OMP_NUM_THREADS": "1",
    }
    driver = FakeDriver(tmp_path / "driver")
    python = str(installed / "python")
    command = [str(installed / "observatory")] if entry == "console script" else [python, "-m", "observatory"]
    (project / "lock.py").write_text(textwrap.dedent(LOCK))
    for arguments in (
        [*command, *PROFILE],
        [*command, "power", "--device", UUID, "--seconds", "0.3", "--out", "power"],
        [python, "lock.py"],
        [*command, "report", "run", "--out", "report.html"],
    ):
        done = subprocess.run(
            arguments, cwd=project, env=driver.environment(environment), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert sorted(path.name for path in project.glob("mark-*")) == [], (arguments, done.stderr)
        assert done.returncode == 0, (arguments, done.stderr)
    assert [change.what for change in driver.changes()][-2:] == ["lock", "unlock"]
    assert open_run(project / "run").problems == ()
    assert len(open_run(project / "run").power()) > 0
    assert len(open_run(project / "power").power()) > 0
    assert (project / "report.html").stat().st_size > 100_000
