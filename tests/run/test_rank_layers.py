"""Rows of several ranks add up by layer number only where that number is the same layer on all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from observatory.analysis.routing.loads import collect_layer_loads
from observatory.run import Run, RunWriter, open_run, routing_rows
from observatory.run.manifest import ModelSpec, MoeLayerSpec, RankLayer
from observatory.run.tables import EXCHANGE_SCHEMA, SPAN_SCHEMA, TOKENS_SCHEMA
from tests.run.conftest import WriteRun, manifest_of

A, B, C = ("a" * 16, "b" * 16, "c" * 16)


def layer(number: int = 0, **changes: Any) -> RankLayer:
    return RankLayer.model_validate(
        {"layer": number, "module": f"layers.{number}.moe", "experts": 4, "top_k": 2, **changes}
    )


def written(path: Path, layers: Sequence[Sequence[RankLayer] | None]) -> Run:
    """A run whose ranks hold these layers, of which rank 0's are in the manifest; None states none.

    Every rank has one row and one sampled token of each of its layers, with a load of one on each expert,
    and one exchange and one span of layer 0.
    """
    manifest = manifest_of(
        len(layers),
        model=ModelSpec(
            name="m",
            moe_layers=tuple(
                MoeLayerSpec.model_validate(item.model_dump(exclude={"router_digests"}))
                for item in layers[0] or ()
            ),
        ),
    )
    writers = [RunWriter.create(path, manifest)]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, len(layers))]
    for rank, (writer, own) in enumerate(zip(writers, layers, strict=True)):
        if own is not None:
            writer.set_moe_layers(tuple(own))
        for item in own or [layer()]:
            row = {"step_N": 0, "phase_N": "prefill", "layer_N": [item.layer], "source_rank": rank}
            writer.append("routing", routing_rows(**row, tokens_N=2, load_NE=[[1] * item.experts]))
            token = {
                "step": 0, "phase": "prefill", "layer": item.layer, "source_rank": rank, "position": 0,
                "expert_ids": [0, 1],
            }  # fmt: skip
            writer.append("tokens", pa.Table.from_pylist([token], TOKENS_SCHEMA))
        place = {"step": 0, "phase": "prefill", "layer": 0, "source_rank": rank}
        moved = {**place, "role": "dispatch", "group": "world", "sequence": 0, "start_ns": 1}
        writer.append("exchange", pa.Table.from_pylist([moved], EXCHANGE_SCHEMA))
        writer.append("spans", pa.Table.from_pylist([{**place, "name": "s", "start_ns": 1}], SPAN_SCHEMA))
    for writer in reversed(writers):
        writer.close()
    return open_run(path)


def ranks_of_layers(run: Run) -> dict[int, list[int]]:
    """Layer -> ranks whose rows are counted, in loads, sums and samples alike."""
    frame = run.expert_load()
    found = {
        int(number): sorted({int(rank) for rank in rows.source_rank})
        for number, rows in frame.groupby("layer")
    }
    sums = {number: own.load_E.tolist() for (_, number), own in collect_layer_loads(run).items()}
    assert sums.keys() == found.keys()
    assert all(set(load) == {len(found[number])} for number, load in sums.items())
    assert sorted({int(rank) for rank in run.routed_tokens().source_rank}) == sorted(
        {rank for ranks in found.values() for rank in ranks}
    )
    samples = run.token_samples()
    assert samples.layer.notna().all()
    assert {number: sorted(rows.source_rank) for number, rows in samples.groupby("layer")} == found
    return found


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"experts": 8}, "8 experts, not 4"),
        ({"top_k": 1}, "top-1, not top-2"),
        ({"top_k": None}, "a varying top-k, not top-2"),
        ({"module": "layers.0.moe\u2028x" + "y" * 500}, "module layers.0.moe xyyy"),
        ({"router_digests": [B]}, "other router weights in layers.0.moe"),
        ({"router_digests": [B, C]}, "other router weights in layers.0.moe"),
    ],
)
def test_a_rank_with_another_layer_of_the_same_number_is_stated_and_left_out(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    own = [layer(router_digests=[A]), layer(1, router_digests=[B])]
    run = written(tmp_path / "run", [own, [layer(**{"router_digests": [A], **other}), layer(7)], own])
    (problem,) = run.problems
    assert problem.startswith(f"rank 1 holds another layer 0 than rank 0: {said}")
    assert "rows were left out" in problem
    assert problem.isprintable()
    assert len(problem) < 500
    assert ranks_of_layers(run) == {0: [0, 2], 1: [0, 2]}
    assert run.row_count("routing") == 4
    assert [spec.layer for spec in run.manifest.model.moe_layers] == [0, 1]
    # What it exchanged and when stays, but not as a part of a layer that is another one.
    for frame in (run.exchanges(), run.spans()):
        assert frame.layer.isna().tolist() == [False, True, False]


def test_a_rank_is_stated_once_however_many_of_its_layers_differ(tmp_path: Path) -> None:
    stages = [[layer(n, router_digests=[d * 16]) for n, d in enumerate(ds)] for ds in ("abc", "def", "012")]
    run = written(tmp_path / "run", stages)
    assert [problem.split(":")[0] for problem in run.problems] == [
        "rank 1 holds another layer 0 (and 2 more) than rank 0",
        "rank 2 holds another layer 0 (and 2 more) than rank 0",
    ]
    assert ranks_of_layers(run) == {0: [0], 1: [0], 2: [0]}


@pytest.mark.parametrize(
    ("first", "second"),
    [([A], [A]), ([], [A]), ([A], []), ([], []), ([A, C], [B, C]), ([A, B], [A, C]), ([A], [B, A])],
)
def test_replicas_add_up(tmp_path: Path, first: list[str], second: list[str]) -> None:
    run = written(tmp_path / "run", [[layer(router_digests=first)], [layer(router_digests=second)]])
    assert run.problems == ()
    assert ranks_of_layers(run) == {0: [0, 1]}
    assert run.exchanges().layer.tolist() == [0, 0]


def test_layers_of_all_ranks_make_the_model(tmp_path: Path) -> None:
    """Two pipeline stages of two replicas each, with the same module names and the second half first."""
    later = [layer(n, module=f"layers.{n - 2}.moe", shared_experts=1, router_digests=[A]) for n in (2, 3)]
    earlier = [layer(n, router_digests=[B]) for n in (0, 1)]
    run = written(tmp_path / "run", [later, later, earlier, earlier])
    assert run.problems == ()
    assert ranks_of_layers(run) == {0: [2, 3], 1: [2, 3], 2: [0, 1], 3: [0, 1]}
    assert [(spec.layer, spec.module, spec.shared_experts) for spec in run.manifest.model.moe_layers] == [
        (0, "layers.0.moe", None),
        (1, "layers.1.moe", None),
        (2, "layers.0.moe", 1),
        (3, "layers.1.moe", 1),
    ]
    assert not any("router_digests" in spec.model_dump() for spec in run.manifest.model.moe_layers)
    layers = collect_layer_loads(run)
    assert {loads.top_k for loads in layers.values()} == {2}
    assert {loads.incomplete_rows for loads in layers.values()} == {0}


def test_ranks_that_rank_0_does_not_know_are_held_against_each_other(tmp_path: Path) -> None:
    """Rank 0 holds other layers; of layer 5 its first holder decides, and the first that could be read."""
    fives = [[layer(5, router_digests=d)] for d in ([], [A], [B], [A])]
    run = written(tmp_path / "run", [[layer()], *fives])
    (problem,) = run.problems
    assert problem.startswith("rank 3 holds another layer 5 than rank 2: other router weights")
    assert ranks_of_layers(run) == {0: [0], 5: [1, 2, 4]}


@pytest.mark.parametrize("silent", [None, 1])
def test_a_row_that_a_holder_of_the_layer_lacks_is_still_missed(tmp_path: Path, silent: int | None) -> None:
    """Whether the holder states its layers or may hold any."""
    own = (layer(),)
    writers = [RunWriter.create(tmp_path / "run", manifest_of(3))]
    writers += [RunWriter.join(tmp_path / "run", rank=rank) for rank in (1, 2)]
    for rank, (writer, steps) in enumerate(zip(writers, ([0, 1], [0], [0, 1]), strict=True)):
        if rank != silent:
            writer.set_moe_layers(own if rank < 2 else (layer(1),))
        rows = routing_rows(
            step_N=steps,
            phase_N="prefill",
            layer_N=0 if rank < 2 else 1,
            source_rank=rank,
            tokens_N=2,
            load_NE=[[1] * 4] * len(steps),
        )
        writer.append("routing", rows)
        writer.close()
    loads = collect_layer_loads(open_run(tmp_path / "run"))
    assert loads["prefill", 0].incomplete_rows == 1
    assert loads["prefill", 1].incomplete_rows == (0 if silent is None else 2)


def test_ranks_that_state_no_layers_add_up_as_before(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [[layer()], None])
    assert run.problems == ()
    assert ranks_of_layers(run) == {0: [0, 1]}


def test_a_run_of_schema_1_1_reads_as_before(write_run: WriteRun) -> None:
    path = write_run(ranks=2)
    before = [
        (block.layer, block.load_SE.tolist(), block.present_SP.all()) for block in open_run(path).iter_loads()
    ]
    for file in (path / "run.json", *(path / "ranks").iterdir()):
        document = json.loads(file.read_text())
        if file.name == "run.json":
            document["schema_version"] = "1.1"
        for status in document.get("ranks", [document]):
            del status["moe_layers"]
        file.write_text(json.dumps(document))
    run = open_run(path)
    assert run.problems == ()
    assert run.manifest.model.moe_layers == ()
    assert before == [(b.layer, b.load_SE.tolist(), b.present_SP.all()) for b in run.iter_loads()]


def test_the_manifest_of_many_ranks_stays_small(tmp_path: Path) -> None:
    """run.json holds a status of every rank, and is read only up to a size."""
    own = [layer(n, router_digests=[A]) for n in range(60)]
    written(tmp_path / "run", [own, own])
    document = json.loads((tmp_path / "run/run.json").read_text())
    assert [status["moe_layers"] for status in document["ranks"]] == [None, None]
    assert len(json.loads((tmp_path / "run/ranks/rank-00001.json").read_text())["moe_layers"]) == 60


@pytest.mark.parametrize(
    "layers",
    [
        [{"layer": 0, "module": "m", "experts": 4}] * 2,
        [{"layer": n, "module": "m", "experts": 4} for n in range(16385)],
        [{"layer": 2**31, "module": "m", "experts": 4}],
        [{"layer": -1, "module": "m", "experts": 4}],
        [{"layer": 0, "module": "m", "experts": 0}],
        [{"layer": 0, "module": "m" * 5000, "experts": 4}],
        [{"layer": 0, "module": "m", "experts": 4, "router_digests": ["x" * 16]}],
        [{"layer": 0, "module": "m", "experts": 4, "router_digests": ["a" * 16 + "\n"]}],
        [{"layer": 0, "module": "m", "experts": 4, "router_digests": [A, B, C]}],
        {"layer": 0},
        7,
    ],
)
def test_layers_that_cannot_be_are_one_stated_problem(write_run: WriteRun, layers: object) -> None:
    path = write_run()
    file = path / "ranks/rank-00000.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "moe_layers": layers}))
    run = open_run(path)
    (problem,) = run.problems
    assert problem.startswith("ranks/rank-00000.json cannot be used: moe_layers")
    assert len(problem) < 400
    assert next(run.iter_loads()).step_S.size == 6


def test_a_status_of_a_rank_outside_the_run_adds_no_layers(write_run: WriteRun) -> None:
    path = write_run()
    status = json.loads((path / "ranks/rank-00000.json").read_text())
    status |= {"rank": 9, "moe_layers": [layer(5).model_dump()]}
    (path / "ranks/rank-00009.json").write_text(json.dumps(status))
    assert open_run(path).manifest.model.moe_layers == ()
