"""The package as a whole: what it exports, and what importing it costs."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

import observatory


def modules() -> Iterator[str]:
    for found in pkgutil.walk_packages(observatory.__path__, prefix="observatory."):
        if not found.name.rsplit(".", 1)[-1].startswith("_"):
            yield found.name


def test_the_public_surface_is_this_list() -> None:
    assert sorted(observatory.__all__) == [
        "LightningCallback", "ObservatoryError", "Run", "RunWriter", "TrainerCallback", "open_run", "watch",
    ]  # fmt: skip
    for name in observatory.__all__:
        assert getattr(observatory, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = observatory.no_such_name


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_module_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_what_a_package_offers_is_there() -> None:
    packages = [
        found.name
        for found in pkgutil.walk_packages(observatory.__path__, prefix="observatory.")
        if found.ispkg
    ]
    assert "observatory.run" in packages
    for name in packages:
        package = importlib.import_module(name)
        for key in getattr(package, "__all__", ()):
            assert getattr(package, key) is not None, f"{name}.{key}"


def test_importing_the_package_is_cheap_and_silent() -> None:
    heavy = ("torch", "transformers", "lightning", "plotly", "pynvml", "mpi4py", "pandas", "pyarrow", "scipy")
    code = f"import sys, observatory; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_analysis_and_report_load_no_torch_and_no_mpi() -> None:
    code = (
        "import sys, observatory.cli.app, observatory.run, observatory.analysis.routing.summary, "
        "observatory.analysis.parallel.scan, observatory.reports.html; "
        "print([m for m in ('torch', 'transformers', 'mpi4py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_watching_without_torch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import observatory; observatory.watch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'moe-observatory[capture]'" in done.stderr.splitlines()[-1]
