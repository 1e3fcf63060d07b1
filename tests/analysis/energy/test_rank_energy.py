"""Energy of ranks: whose device is whose, and whose clock is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from observatory.analysis.energy import energy_summary
from observatory.run import open_run
from observatory.run.manifest import ClockSpec, DeviceSpec
from tests.analysis.energy.runs import write_energy_run
from tests.analysis.energy.served import H100, UUID, numbered, served
from tests.devices.sensor import Load, SimulatedSensor

pytestmark = pytest.mark.slow


def two_ranks(
    tmp_path: Path, *, own_devices: tuple[tuple[str, ...], ...] = (), sampled: int = 2, **manifest: Any
) -> tuple[Path, list[Load]]:
    """Two ranks on one node, a device each, sampled by rank 0; the second device is 5 % off."""
    loads = [served(0), served(1)]
    uuids = [UUID, UUID.replace("GPU-0", "GPU-1")]
    sensors = [
        SimulatedSensor(device_uuid=uuid, gain=gain, counter_gain=gain)
        for uuid, gain in zip(uuids, (1.0, 1.05), strict=True)
    ]
    power = pd.concat(
        [sensor.sample(load, poll_ms=53.0) for sensor, load in zip(sensors, loads, strict=True)][:sampled]
    ).sort_values("time_ns", kind="stable")
    clock = ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock", identity="host")
    run = write_energy_run(
        tmp_path / "run",
        power=power,
        spans=[numbered(load) for load in loads],
        tokens={"prefill": 2048, "decode": 16},
        clocks=[clock, clock],
        own_devices=[(uuid,) for uuid in uuids] if manifest.pop("stated", False) else own_devices,
        devices=tuple(DeviceSpec(kind="gpu", name=H100, uuid=uuid) for uuid in uuids),
        topology={"ranks": 2, "node_of_rank": (0, 0)},
        **manifest,
    )
    return run, loads


def test_two_devices_of_one_node_go_to_their_own_ranks(tmp_path: Path) -> None:
    run, loads = two_ranks(tmp_path, stated=True)
    summary = energy_summary(open_run(run))
    assert summary.problems == ()
    phases = summary.phases.set_index(["source_rank", "phase"])
    for rank, (load, gain) in enumerate(zip(loads, (1.0, 1.05), strict=True)):
        for name, (watts, _) in load.truth().items():
            assert phases.loc[(rank, name or "idle"), "power_mw"] == pytest.approx(
                gain * watts * 1e3, rel=0.01
            )
    assert len(summary.tokens) == 4


SECOND = UUID.replace("GPU-0", "GPU-1")


def test_energy_of_all_ranks_is_that_of_their_own_devices_over_all_their_tokens(tmp_path: Path) -> None:
    run, loads = two_ranks(tmp_path, own_devices=((UUID,), (SECOND,)))
    summary = energy_summary(open_run(run))
    assert summary.problems == ()
    totals, tokens = summary.totals.set_index("phase"), summary.tokens.set_index(["phase", "source_rank"])
    for name, per_step in (("prefill", 2048), ("decode", 16)):
        row = totals.loc[name]
        truth_mj = sum(
            gain * watts * seconds * 1e3
            for gain, load in zip((1.0, 1.05), loads, strict=True)
            for watts, seconds in [load.truth()[name]]
        )
        assert (row["ranks"], row["devices"]) == (2, 2)
        assert row["energy_mj"] == pytest.approx(truth_mj, rel=0.01)
        assert row["tokens"] == tokens.loc[name, "tokens"].sum()
        assert row["tokens"] % per_step == 0
        assert row["mj_per_token"] == pytest.approx(truth_mj / row["tokens"], rel=0.01)
        assert row["mj_per_token_low"] < row["mj_per_token"] < row["mj_per_token_high"]
        assert row["idle_mj_per_token"] + row["above_idle_mj_per_token"] == pytest.approx(row["mj_per_token"])


def test_a_rank_whose_device_is_shared_or_was_not_sampled_has_no_energy_and_says_why(tmp_path: Path) -> None:
    run, _ = two_ranks(tmp_path / "shared", own_devices=((UUID,), (UUID,)))
    shared = energy_summary(open_run(run))
    assert shared.phases.empty
    assert shared.tokens["mj_per_token"].isna().all()
    assert shared.tokens["tokens"].notna().all()
    assert all("ranks 0 and 1 compute on it" in reason for reason in shared.tokens["reason"])
    run, _ = two_ranks(tmp_path / "unsampled", own_devices=((UUID,), (SECOND,)), sampled=1)
    partly = energy_summary(open_run(run)).tokens.set_index(["source_rank", "phase"])
    assert partly.loc[(0, "decode"), "mj_per_token"] > 0
    assert f"{SECOND}, on which it computes, was not sampled" in partly.loc[(1, "decode"), "reason"]
    totals = energy_summary(open_run(run)).totals
    assert totals["energy_mj"].isna().all()
    assert all("the energy of 1 of 2 ranks" in reason for reason in totals["reason"])
    # Of a rank with two devices, the energy of one of them is not its energy.
    run, _ = two_ranks(tmp_path / "half", own_devices=((UUID, SECOND), ()), sampled=1)
    half = energy_summary(open_run(run)).tokens.set_index(["source_rank", "phase"])
    assert "was not sampled" in half.loc[(0, "prefill"), "reason"]
    assert np.isnan(half.loc[(0, "prefill"), "mj_per_token"])


def test_devices_nobody_can_place_give_node_level_energy_only(tmp_path: Path) -> None:
    run, _ = two_ranks(tmp_path, stated=False)
    summary = energy_summary(open_run(run))
    assert summary.phases.empty
    assert summary.devices["energy_mj"].notna().all()
    assert summary.devices["source_rank"].isna().all()
    assert summary.devices["reason_code"][0] == "rank not known"


def test_spans_of_another_clock_are_moved_onto_that_of_the_samples(tmp_path: Path) -> None:
    load = served()
    offset_ns = 3_000_000_000
    moved = numbered(load).assign(
        start_ns=lambda rows: rows["start_ns"] + offset_ns, end_ns=lambda rows: rows["end_ns"] + offset_ns
    )

    def aligned(offset: int, identity: str) -> ClockSpec:
        return ClockSpec(offset_ns=offset, uncertainty_ns=100_000, method="ping-pong", identity=identity)

    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor().sample(load, poll_ms=53.0),
        spans=[numbered(load).iloc[:1], moved],
        clocks=[aligned(0, "a"), aligned(-offset_ns, "b")],
        devices=(DeviceSpec.model_validate({"kind": "gpu", "name": H100, "uuid": UUID, "rank": 1}),),
        topology={"ranks": 2, "node_of_rank": (0, 0)},
    )
    phases = energy_summary(open_run(run)).phases.set_index("phase")
    assert phases.loc["prefill", "power_mw"] == pytest.approx(650e3, rel=0.01)
    assert phases.loc["decode", "power_mw"] == pytest.approx(310e3, rel=0.01)


def test_clocks_that_cannot_be_compared_leave_the_device_without_phases(tmp_path: Path) -> None:
    load = served()
    none = ClockSpec(method="none", identity="b")
    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor().sample(load),
        spans=[numbered(load).iloc[:1], numbered(load)],
        clocks=[ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock", identity="a"), none],
        devices=(DeviceSpec.model_validate({"kind": "gpu", "name": H100, "uuid": UUID, "rank": 1}),),
        topology={"ranks": 2, "node_of_rank": (0, 0)},
    )
    summary = energy_summary(open_run(run))
    assert summary.phases.empty
    assert summary.devices["reason_code"][0] == "clocks not aligned"
    assert summary.devices["energy_mj"].notna().all()
