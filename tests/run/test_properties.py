"""Whatever loads are written, split over parts and ranks in whatever order, come back the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import PHASES
from tests.run.conftest import manifest_of

EXPERTS = {0: 1, 1: 3, 2: 5}

keys = st.tuples(
    st.integers(0, 30), st.sampled_from(PHASES), st.sampled_from(sorted(EXPERTS)), st.integers(0, 2)
)


@st.composite
def runs(draw: st.DrawFn) -> dict[tuple[int, str, int, int], list[int]]:
    """(step, phase, layer, rank) -> load per expert."""
    chosen = draw(st.lists(keys, unique=True, max_size=40))
    count = st.integers(0, 2**40)
    return {key: draw(st.lists(count, min_size=EXPERTS[key[2]], max_size=EXPERTS[key[2]])) for key in chosen}


@settings(max_examples=30, deadline=None)
@given(loads=runs(), flush_every=st.integers(1, 7), block_bytes=st.integers(1, 600))
def test_any_run_comes_back_the_same(
    loads: dict[tuple[int, str, int, int], list[int]], flush_every: int, block_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        writers = [RunWriter.create(path, manifest_of(3))]
        writers += [RunWriter.join(path, rank=rank) for rank in (1, 2)]
        for i, ((step, phase, layer, rank), load) in enumerate(loads.items()):
            rows = routing_rows(
                step_N=step, phase_N=phase, layer_N=layer, source_rank=rank, tokens_N=i, load_NE=[load]
            )
            writers[rank].append("routing", rows)
            if (i + 1) % flush_every == 0:
                writers[rank].flush()
        for writer in reversed(writers):
            writer.close()
        found: dict[tuple[int, str, int, int], list[int]] = {}
        last: dict[tuple[str, int], int] = {}
        for block in open_run(path).iter_loads(max_block_bytes=block_bytes):
            assert block.load_SPE.shape[0] == 1 or block.load_SPE.nbytes <= block_bytes
            assert block.step_S[0] > last.get((block.phase, block.layer), -1)
            assert (np.diff(block.step_S) > 0).all()
            last[block.phase, block.layer] = int(block.step_S[-1])
            for s, p in zip(*np.nonzero(block.present_SP), strict=True):
                key = (int(block.step_S[s]), block.phase, block.layer, int(block.source_rank_P[p]))
                assert key not in found
                found[key] = block.load_SPE[s, p].tolist()
            assert block.load_SPE[~block.present_SP].sum() == 0
        assert found == loads
