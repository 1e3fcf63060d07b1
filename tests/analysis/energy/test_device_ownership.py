"""Which device works for which rank, and on which clock."""

from __future__ import annotations

from typing import Any

import pytest

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.device_ownership import device_ranks
from observatory.analysis.energy.phase_intervals import ClockShift
from observatory.reasons import Reason
from observatory.run.manifest import (
    ClockSpec,
    DeviceSpec,
    Manifest,
    ModelSpec,
    RankPower,
    RankStatus,
    Topology,
)
from tests.analysis.energy.runs import codes


def manifest(ranks: int = 1, **more: Any) -> Manifest:
    nodes = more.pop("nodes", None)
    return Manifest(
        run_id="m",
        created_unix_s=1.0,
        model=ModelSpec(name="m"),
        topology=Topology(ranks=ranks, node_of_rank=nodes),
        **more,
    )


def _codes(rank: int | Reason) -> set[str]:
    assert isinstance(rank, Reason)
    return codes(rank)


def status(rank: int, host: str, clock: ClockSpec | None = None) -> RankStatus:
    return RankStatus(rank=rank, state="complete", host=host, clock=clock)


def owning(rank: int, uuid: str) -> RankStatus:
    return status(rank, "n").model_copy(update={"power": RankPower(own_devices=(uuid,))})


def aligned(offset_ns: int, *, identity: str | None = None, error_ns: int = 1000, **more: Any) -> ClockSpec:
    return ClockSpec(
        offset_ns=offset_ns, uncertainty_ns=error_ns, method="ping-pong", identity=identity, **more
    )


def test_the_only_rank_has_all_devices() -> None:
    assert device_ranks(manifest(), [(0, "GPU-a"), (0, "GPU-b")]) == {(0, "GPU-a"): 0, (0, "GPU-b"): 0}


def test_the_only_rank_of_a_node_has_the_nodes_devices() -> None:
    found = device_ranks(manifest(2, nodes=(0, 1)), [(0, "GPU-a"), (1, "GPU-b")])
    assert found == {(0, "GPU-a"): 0, (1, "GPU-b"): 1}


def test_ranks_that_share_a_node_have_none_unless_the_run_says_so() -> None:
    shared = manifest(2, nodes=(0, 0))
    assert "rank not known" in _codes(device_ranks(shared, [(0, "GPU-a")])[0, "GPU-a"])
    own = (owning(0, "GPU-b"), owning(1, "GPU-a"))
    stated = manifest(2, nodes=(0, 0)).model_copy(update={"ranks": own})
    assert device_ranks(stated, [(0, "GPU-a"), (0, "GPU-b")]) == {(0, "GPU-a"): 1, (0, "GPU-b"): 0}
    extra = DeviceSpec.model_validate({"kind": "gpu", "uuid": "GPU-a", "rank": 1})
    assert device_ranks(manifest(2, nodes=(0, 0), devices=(extra,)), [(0, "GPU-a")]) == {(0, "GPU-a"): 1}


def test_a_device_of_two_ranks_and_one_of_none_have_no_rank_and_say_why() -> None:
    def outcome(*uuids: str) -> Manifest:
        statuses = [
            status(rank, "n0").model_copy(update={"power": RankPower(own_devices=(uuid,) if uuid else ())})
            for rank, uuid in enumerate(uuids)
        ]
        base = manifest(len(uuids), nodes=(0,) * len(uuids)).model_dump()
        return Manifest.model_validate(base | {"ranks": [one.model_dump() for one in statuses]})

    sampled = [(0, "GPU-a"), (0, "GPU-b")]
    assert device_ranks(outcome("GPU-b", "GPU-a"), sampled) == {(0, "GPU-a"): 1, (0, "GPU-b"): 0}
    same = device_ranks(outcome("GPU-a", "GPU-a", "GPU-a"), sampled)
    assert Reason(EnergyCode.SHARED_BY_RANKS, {"ranks": [0, 1, 2]}) == same[0, "GPU-a"]
    assert "no rank names it" in _codes(same[0, "GPU-b"])
    assert device_ranks(outcome("GPU-a"), sampled)[0, "GPU-b"] == same[0, "GPU-b"]  # an idle neighbour
    assert "rank not known" in _codes(device_ranks(outcome("GPU-a", ""), sampled)[0, "GPU-b"])
    # Processors may be named as well: a rank on each socket.
    sockets = [(0, "rapl:package-0@n0"), (0, "rapl:package-1@n0")]
    found = device_ranks(outcome("rapl:package-0@n0", "rapl:package-1@n0"), sockets)
    assert list(found.values()) == [0, 1]


def test_nodes_are_known_by_clock_or_by_host_and_else_not_at_all() -> None:
    two = Manifest.model_validate(
        manifest(2).model_dump() | {"ranks": [status(0, "n0").model_dump(), status(1, "n1").model_dump()]}
    )
    assert device_ranks(two, [(1, "GPU-a")]) == {(1, "GPU-a"): 1}
    one = Manifest.model_validate(
        two.model_dump() | {"ranks": [status(0, "n0").model_dump(), status(1, "n0").model_dump()]}
    )
    assert "rank not known" in _codes(device_ranks(one, [(0, "GPU-a")])[0, "GPU-a"])
    assert "node not known" in _codes(device_ranks(manifest(2), [(0, "GPU-a")])[0, "GPU-a"])


def test_a_rank_of_another_node_is_not_believed() -> None:
    wrong = manifest(2, nodes=(0, 1)).model_copy(update={"ranks": (owning(1, "GPU-a"),)})
    assert "rank on other node" in _codes(device_ranks(wrong, [(0, "GPU-a")])[0, "GPU-a"])


def test_a_processors_package_belongs_to_the_node() -> None:
    rapl = DeviceSpec(kind="rapl", uuid="rapl:package-0")
    found = device_ranks(manifest(devices=(rapl,)), [(0, "rapl:package-0")])
    assert "processor package" in _codes(found[0, "rapl:package-0"])


def with_clocks(first: ClockSpec | None, second: ClockSpec | None) -> Manifest:
    statuses = [status(0, "n0", first).model_dump(), status(1, "n0", second).model_dump()]
    return Manifest.model_validate(manifest(2).model_dump() | {"ranks": statuses})


def test_ranks_that_read_the_same_clock_need_no_shift() -> None:
    same = with_clocks(aligned(0, identity="c"), aligned(77_000, identity="c"))
    assert ClockShift.between(same, 1, 0, 10**12) == ClockShift()
    assert ClockShift.between(with_clocks(None, None), 1, 1, 10**12) == ClockShift()


def test_aligned_clocks_are_related_through_the_reference() -> None:
    run = with_clocks(aligned(500, identity="a"), aligned(2_000, identity="b", error_ns=3000))
    found = ClockShift.between(run, 1, 0, 10**12)
    assert found.reason is None
    assert found.shift_ns == 2_000 - 500
    assert found.error_ns == 4000
    assert ClockShift.between(run, 0, 1, 10**12).shift_ns == 500 - 2_000


def test_a_drift_counts_at_the_middle_of_the_run() -> None:
    drifting = aligned(0, identity="b", drift_ppm=10.0, measured_ns=0)
    run = with_clocks(aligned(0, identity="a"), drifting)
    assert ClockShift.between(run, 1, 0, 10**11).shift_ns == pytest.approx(1_000_000, abs=2)
    assert ClockShift.between(run, 0, 1, 10**11).shift_ns == pytest.approx(-1_000_000, abs=20)


def test_clocks_that_were_not_aligned_cannot_be_compared() -> None:
    run = with_clocks(aligned(0, identity="a"), ClockSpec(method="none", identity="b"))
    assert "clocks not aligned" in codes(ClockShift.between(run, 1, 0, 10**12).reason)
