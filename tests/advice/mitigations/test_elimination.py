"""Experts that always work and experts that hardly do, of runs written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from observatory.advice.mitigations.elimination import LayerUse, experts_in_use
from observatory.analysis.parallel.step_loads import step_loads
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec

EXPERTS, STEPS = 8, 16
#: Two experts have 60 of 101 assignments of a step; the last three have none, one, and none.
LOAD = np.array([30, 30, 14, 13, 13, 0, 1, 0])
#: Expert 6 is used rarely but with all of its weight.
MASS = np.array([20.0, 20.0, 5.0, 5.0, 5.0, 0.0, 40.0, 0.0])


def used(folder: Path, load_SE: np.ndarray, *, mass_E: np.ndarray | None = None) -> LayerUse:
    layer = MoeLayerSpec(layer=3, module="m.3", experts=EXPERTS, top_k=1)
    manifest = Manifest(run_id="use", created_unix_s=1.0, model=ModelSpec(name="use", moe_layers=(layer,)))
    steps = len(load_SE)
    with RunWriter.create(folder, manifest) as writer:
        writer.append(
            "routing",
            routing_rows(
                step_N=np.arange(steps),
                phase_N="decode",
                layer_N=np.full(steps, 3),
                source_rank=0,
                tokens_N=load_SE.sum(axis=1),
                load_NE=load_SE,
                gate_mass_NE=None if mass_E is None else np.tile(mass_E, (steps, 1)),
            ),
        )
    run = open_run(folder)
    (use,) = experts_in_use(run, step_loads(run))
    return use


def test_the_committee_is_named_with_its_shares_and_gate_mass_saves_a_rare_expert(tmp_path: Path) -> None:
    load_SE = np.tile(LOAD, (STEPS, 1))
    use = used(tmp_path / "mass", load_SE, mass_E=MASS)
    assert (use.layer, use.committee) == (3, (0, 1))
    assert use.load_share == pytest.approx(60 / 101)
    assert use.mass_share == pytest.approx(40 / 95)
    assert use.hardly_used == (5, 7)
    # By load alone expert 6 is hardly used as well: one assignment, the mean is 12.6.
    by_load = used(tmp_path / "load", load_SE)
    assert by_load.hardly_used == (5, 6, 7)
    assert by_load.mass_share is None


def test_who_misses_a_step_or_leads_one_half_only_is_no_member(tmp_path: Path) -> None:
    load_SE = np.tile(LOAD, (STEPS, 1))
    load_SE[3, 0] = 0
    assert used(tmp_path / "absent", load_SE).committee == (1,)
    turned = np.tile(LOAD, (STEPS, 1))
    turned[STEPS // 2 :, [1, 2]] = turned[STEPS // 2 :, [2, 1]]
    turned[STEPS // 2 :, 2] = 31
    assert used(tmp_path / "half", turned).committee == (0,)


def test_a_layer_of_equal_experts_has_none_that_are_hardly_used(tmp_path: Path) -> None:
    use = used(tmp_path / "even", np.full((STEPS, EXPERTS), 5))
    assert use.load_share == pytest.approx(0.5)
    assert use.hardly_used == ()
