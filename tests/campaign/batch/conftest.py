"""A login node whose Slurm is made of programs that stand for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from tests.fake_slurm import FakeSlurm

_SITE = '[batch]\nmax_array = 3\nsignal_s = 60\n[node]\nexclusive = "never"\n'


class Login:
    """Commands as a user gives them, with what they say.

    Attributes:
        folder: where files are.
        slurm: the scheduler.
    """

    def __init__(self, folder: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.slurm, self._capsys = folder, slurm, capsys
        self.campaign = folder / "campaign"
        self.site(_SITE)

    def site(self, text: str) -> None:
        """Write the site file."""
        (self.folder / "site.toml").write_text(text)

    def command(self, *argv: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        self._capsys.readouterr()
        code = main([*argv])
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def submit(self, text: str, *options: str, code: int = 0) -> str:
        """Submit a campaign; what it says."""
        path = self.folder / "campaign.toml"
        path.write_text(text)
        site = str(self.folder / "site.toml")
        found, _, said = self.command("submit", str(path), "--site", site, *options)
        assert found == code, said
        return said

    def jobs(self) -> dict[str, Any]:
        """The document of `jobs`."""
        return json.loads(self.command("jobs", str(self.campaign), "--json")[1])  # type: ignore[no-any-return]

    def states(self) -> Mapping[str, str]:
        """State of each point."""
        return {point["about"]: point["state"] for point in self.jobs()["points"]}

    def point(self, name: str) -> Path:
        """Folder of a point."""
        (found,) = self.campaign.glob(f"points/{name}--*")
        return found


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Login:
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{slurm.programs}{os.pathsep}{os.environ['PATH']}")
    return Login(tmp_path, slurm, capsys)


def commands(*names: str, script: str = "true", more: str = "") -> str:
    """A campaign of command lines that all run one script; ``$1`` is the folder for results."""
    words = json.dumps(["bash", "-c", script, "-", "{out}"])
    return "report = false\n" + "".join(
        f'[[command]]\nname = "{name}"\ncommand = {words}\n{more}\n' for name in names
    )
