"""What is said of exchanges worked on together equals what was said of one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from observatory.analysis.exchange import rank_clocks, wait_and_transfer
from tests.analysis.exchange.shapes import NAMES, RANKS, said_of, write_shape

FORMER = json.loads((Path(__file__).parent / "former.json").read_text())


def assert_alike(now: Any, former: Any, where: str) -> None:
    """Equal, numbers but for their rounding."""
    if isinstance(former, dict):
        assert list(now) == list(former), where
        for name, value in former.items():
            assert_alike(now[name], value, f"{where}, {name}")
    elif isinstance(former, list):
        assert len(now) == len(former), where
        for place, value in enumerate(former):
            assert_alike(now[place], value, f"{where}, {place}")
    elif isinstance(former, float):
        assert now == pytest.approx(former, rel=1e-10, abs=1e-18), where
    else:
        assert now == former, where


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_described_as_when_collectives_were_worked_on_one_by_one(name: str, tmp_path: Path) -> None:
    run = write_shape(tmp_path / "run", name)
    assert_alike(json.loads(json.dumps(said_of(run))), FORMER[name], name)


@pytest.mark.parametrize("name", ["several groups", "contradictions", "unfinished"])
def test_lists_of_arrow_are_read_like_lists_of_python(name: str, tmp_path: Path) -> None:
    run = write_shape(tmp_path / "run", name)
    plain, arrow = (
        wait_and_transfer(
            run.exchanges(arrow_lists=arrow_lists),
            ranks=RANKS,
            clocks=rank_clocks(run.manifest),
            node_of_rank=run.manifest.topology.node_of_rank,
        )
        for arrow_lists in (False, True)
    )
    pd.testing.assert_frame_equal(plain, arrow)
