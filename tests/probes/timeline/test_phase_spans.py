"""Spans of the program's phases, beside which power is attributed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.devices.driver import FakeDriver
from tests.devices.scenes import needs_driver, play

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"


def steps_inside_a_phase(_driver: FakeDriver) -> dict[str, Any]:
    import torch

    import observatory
    from observatory.probes.routing.sites import RoutingDecision
    from tests.probes.tiny import ScriptedModel, scripted_adapter

    model, run = ScriptedModel(), Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    decision = RoutingDecision(expert_ids=torch.zeros(4, 1, dtype=torch.int64), tokens=4)
    with observatory.watch(model, run, adapters=[scripted_adapter(3)], power=[UUID]) as watch:
        for phase in ("prefill", "decode"):
            with watch.phase(phase):
                for _ in range(3):
                    model([decision])
                    watch.step()
        with watch.phase("train_backward"):
            torch.ones(8).sum()  # no layer is called in it, and it is a phase all the same
    spans = observatory.open_run(run).spans().query("name == 'phase'")
    return {str(phase): sorted(own["step"].tolist()) for phase, own in spans.groupby("phase")}


@pytest.mark.slow
@needs_driver
def test_a_step_that_ends_inside_its_phase_leaves_no_stretch_of_a_next_one(tmp_path: Path) -> None:
    outcome = play(steps_inside_a_phase, tmp_path)
    assert outcome == {"prefill": [0, 1, 2], "decode": [3, 4, 5], "train_backward": [6]}
