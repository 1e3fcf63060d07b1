"""One set of forked ranks runs all cases; the tests look at their outcomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.paths import ROOT

Outcome = dict[str, Any]


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the ranks of every world returned, from one run of ``tests.collectives.cases``."""
    out = tmp_path_factory.mktemp("ranks") / "outcome.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.collectives.cases", str(out)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: Outcome = {**json.loads(out.read_text()), "folder": out.parent}
    return document


@pytest.fixture(scope="session")
def ranks(outcome: Outcome) -> dict[int, list[dict[str, Any]]]:
    """World -> what each of its ranks returned; every rank ended well."""
    found: dict[int, list[dict[str, Any]]] = {}
    for world in (1, 2, 4, 8):
        ended = outcome[str(world)]
        assert [rank["ended"] for rank in ended] == ["0"] * world, ended
        found[world] = [rank["value"] for rank in ended]
    return found
