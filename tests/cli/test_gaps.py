"""What a run lacks is said by every command that shows its loads, in the same words."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from observatory.cli import main
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import CaptureGap, Manifest, ModelSpec, MoeLayerSpec, Topology

pytestmark = pytest.mark.usefixtures("part_per_flush")

EXPERTS, LAYERS, STEPS = 8, 3, 6
Break = Callable[[Path], None]


def written(
    path: Path,
    *,
    ranks: int = 2,
    steps_of_rank: Sequence[int] = (STEPS, STEPS),
    without: tuple[int, int, int] | None = None,
    partial: tuple[int, int] | None = None,
    gaps: tuple[CaptureGap, ...] = (),
    state: str = "complete",
    left_open: int | None = None,
) -> Path:
    """A run; ``without`` leaves (rank, layer) out from a step on, ``partial`` marks (rank, step)."""
    layers = tuple(
        MoeLayerSpec(layer=i, module=f"layers.{i}", experts=EXPERTS, top_k=2) for i in range(LAYERS)
    )
    manifest = Manifest(
        run_id="r",
        created_unix_s=1.0,
        model=ModelSpec(name="m", moe_layers=layers),
        topology=Topology(ranks=ranks),
    )
    writers = [RunWriter.create(path, manifest), *(RunWriter.join(path, rank=r) for r in range(1, ranks))]
    for writer in reversed(writers):
        for step in range(steps_of_rank[writer.rank]):
            shown = [
                layer
                for layer in range(LAYERS)
                if without is None or (writer.rank, layer) != without[:2] or step < without[2]
            ]
            load_NE = np.tile((np.arange(EXPERTS) + step) % 5, (len(shown), 1))
            rows = routing_rows(
                step_N=step,
                phase_N="prefill",
                layer_N=shown,
                source_rank=writer.rank,
                tokens_N=int(load_NE[0].sum()) // 2,
                load_NE=load_NE,
                partial_N=partial == (writer.rank, step),
            )
            writer.append("routing", rows)
            if step % 2:
                writer.flush()
        if writer.rank == ranks - 1:
            writer.set_gaps(gaps)
        if writer.rank == left_open:
            writer.flush()
        else:
            failed = state == "failed" and writer.rank == 0
            writer.close(
                state="failed" if failed else "complete",
                error="out of memory" if failed else None,
                steps=steps_of_rank[writer.rank],
            )
    return path


def lose_shard(path: Path) -> None:
    shutil.rmtree(path / "routing" / "rank-00001")
    (path / "ranks" / "rank-00001.json").unlink()
    document = json.loads((path / "run.json").read_text())
    document["ranks"] = [status for status in document["ranks"] if status["rank"] != 1]
    (path / "run.json").write_text(json.dumps(document))


def damage_part(path: Path) -> None:
    part = path / "routing" / "rank-00001" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])


REPLACED = CaptureGap(code="replaced", layer=1, module="layers.1", first_step=2, last_step=2)

CASES: list[tuple[dict[str, object], Break | None, str]] = [
    ({}, lose_shard, "rank 1 of 2 left nothing: they never joined or are missing"),
    ({"steps_of_rank": (6, 4)}, None, "rows of rank 1 are there for 4 of 6 steps in prefill"),
    ({}, damage_part, "rows of rank 1 are there for 4 of 6 steps in prefill"),
    ({"without": (1, 2, 3)}, None, "rows of layer 2 of rank 1 are there for 3 of 6 steps in prefill"),
    ({"without": (0, 2, 0), "ranks": 1}, None, "rows of layer 2 are there for 0 of 6 steps in prefill"),
    ({"state": "failed"}, None, "rank 0 failed: out of memory"),
    ({"left_open": 1}, None, "rank 1 never closed: it still runs or was killed"),
    ({"left_open": 0}, None, "the run was never closed: it still runs, or rank 0 was killed"),
    ({"partial": (1, 3)}, None, "3 of 36 rows, on rank 1, are partial: calls were made in step 3"),
    ({"gaps": (REPLACED,)}, None, "rank 1, layer 1 (layers.1): its module was replaced in step 2"),
]


@pytest.mark.parametrize(("options", "damage", "expected"), CASES)
def test_every_command_that_shows_loads_says_what_is_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    damage: Break | None,
    expected: str,
) -> None:
    run = written(tmp_path / "run", **options)  # type: ignore[arg-type]
    if damage is not None:
        damage(run)
    capsys.readouterr()
    assert main(["routing", str(run)]) == 0
    table = capsys.readouterr()
    assert expected in table.err
    assert "Gini" in table.out
    for command in (["routing", str(run), "--json"], ["scan", str(run), "--ep", "4", "--json"]):
        assert main(command) == 0
        document = json.loads(capsys.readouterr().out)
        (sentence,) = [line for line in document["problems"] if expected in line]
        assert f"note: {sentence}" in table.err.splitlines()
        codes = {gap["sentence"]: gap["code"] for gap in document["gaps"]}
        assert re.fullmatch(r"[a-z_]+", codes[sentence])
    assert main(["scan", str(run), "--ep", "4"]) == 0
    assert f"note: {sentence}" in capsys.readouterr().err.splitlines()
    assert main(["report", str(run), "--out", str(tmp_path / "report.html"), "--ep", "4"]) == 0
    page = html.unescape((tmp_path / "report.html").read_text())
    assert sentence.lower() in page.lower()


def test_a_whole_run_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run")
    assert main(["routing", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["problems"], document["gaps"], captured.err) == ([], [], "")


def test_gaps_have_codes_and_values(tmp_path: Path) -> None:
    run = open_run(written(tmp_path / "run", without=(1, 2, 3), gaps=(REPLACED,)))
    list(run.iter_loads())
    replaced, short = run.gaps
    assert (replaced.code, replaced.ranks, replaced.layers, replaced.first_step) == (
        "replaced",
        (1,),
        (1,),
        2,
    )
    assert (short.code, short.ranks, short.layers, short.count, short.of) == ("short", (1,), (2,), 3, 6)


def test_a_code_of_a_newer_writer_is_passed_on(tmp_path: Path) -> None:
    gap = CaptureGap(code="melted_away", layer=0, module="m", first_step=1, last_step=4, steps=2)
    (problem,) = open_run(written(tmp_path / "run", gaps=(gap,))).problems
    assert problem == "rank 1, layer 0 (m): melted away in 2 of the steps 1 to 4"


def test_metrics_note_rows_that_are_partial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", partial=(1, 3))
    assert main(["routing", str(run), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert all("1 of 6 rows are partial" in layer["notes"] for layer in layers)
