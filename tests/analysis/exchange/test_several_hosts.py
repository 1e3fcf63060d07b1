"""Two hosts with two ranks each: networks, names and clocks of their own, and a link (tests/hosts.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

import observatory
from observatory.analysis.exchange import run_waits
from observatory.run import Run
from observatory.run.manifest import ClockSpec
from tests.analysis.exchange.several_hosts import DELAY_S, DELAYED, STEPS
from tests.hosts import ahead_s, run_on_hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timing]

_LIMIT_S = 300


@pytest.fixture(scope="module", autouse=True)
def _hosts() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("profiled")
    profile = ["-m", "observatory", "profile", "tiny-gqa", "--ep", "4", "--algorithm", "hierarchical"]
    profile += [
        "--data",
        "mock",
        "--batch-size",
        "1",
        "--sequence-length",
        "16",
        "--steps",
        "2",
        "--out",
        "run",
    ]
    run_on_hosts(profile, ranks_on_host=2, folder=folder, timeout_s=_LIMIT_S)
    return observatory.open_run(folder / "run")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a program of its own, which tells gloo its interface itself."""
    folder = tmp_path_factory.mktemp("watched")
    run_on_hosts(
        ["-m", "tests.analysis.exchange.several_hosts", str(folder)],
        ranks_on_host=2,
        folder=folder,
        timeout_s=_LIMIT_S,
        environment={"GLOO_SOCKET_IFNAME": "eth0"},
    )
    return folder


def clocks_of(run: Run) -> list[ClockSpec]:
    found = [status.clock for status in run.manifest.ranks]
    assert None not in found
    return [clock for clock in found if clock is not None]


def assert_aligned(run: Run, ranks: tuple[int, ...]) -> None:
    for rank in ranks:
        clock = clocks_of(run)[rank]
        assert clock.method == "ping-pong"
        assert clock.offset_ns is not None
        assert clock.uncertainty_ns is not None
        assert abs(clock.offset_ns + ahead_s() * 10**9) <= clock.uncertainty_ns < 20_000_000


def test_hosts_are_distinguished_by_name_and_the_hierarchical_dispatch_follows_them(profiled: Run) -> None:
    manifest = profiled.manifest
    assert profiled.problems == ()
    assert [status.host for status in manifest.ranks] == ["host0", "host0", "host1", "host1"]
    assert manifest.topology.node_of_rank == (0, 0, 1, 1)
    assert {"0-1", "2-3", "0,2", "1,3"} <= set(profiled.exchanges().group)


def test_a_profile_over_hosts_has_their_clocks_aligned_and_its_waiting_split(profiled: Run) -> None:
    if not ahead_s():
        pytest.skip("this kernel has one clock for all (time namespaces need Linux 5.6)")
    assert [clock.method for clock in clocks_of(profiled)] == ["shared clock"] * 2 + ["ping-pong"] * 2
    assert_aligned(profiled, (2, 3))
    assert clocks_of(profiled)[2].offset_ns == clocks_of(profiled)[3].offset_ns
    assert run_waits(profiled)["problem"].isna().all()


def test_a_program_of_one_s_own_is_aligned_without_asking_and_the_delay_is_found(watched: Path) -> None:
    run = observatory.open_run(watched / "default")
    assert run.problems == ()
    assert all("the model takes no cache" in note for note in run.manifest.notes)
    if ahead_s():
        assert_aligned(run, (2, 3))
        assert all(clock.drift_ppm is not None for clock in clocks_of(run)[2:])
    waits = run_waits(run)
    assert waits["problem"].isna().all()
    late = waits[waits["step"] % 2 == 1]
    assert set(late["last_rank"].dropna()) == {DELAYED}
    medians = late.groupby("source_rank")["wait_s"].median()
    assert medians[DELAYED] == 0
    for rank in (0, 1, 3):
        assert medians[rank] == pytest.approx(DELAY_S, rel=0.1)


def test_who_says_no_gets_no_split_between_hosts_but_a_reason(watched: Path) -> None:
    if not ahead_s():
        pytest.skip("this kernel has one clock for all (time namespaces need Linux 5.6)")
    run = observatory.open_run(watched / "not aligned")
    assert [clock.method for clock in clocks_of(run)] == ["none"] * 4
    waits = run_waits(run)
    assert len(waits) == 4 * STEPS
    assert waits["wait_s"].isna().all()
    assert set(waits["problem"]) == {
        "its clock and that of rank 2 are not aligned",
        "its clock and that of rank 0 are not aligned",
    }


def test_a_rank_that_leaves_by_an_exception_keeps_its_first_alignment_and_holds_nobody_up(
    watched: Path,
) -> None:
    if not ahead_s():
        pytest.skip("this kernel has one clock for all (time namespaces need Linux 5.6)")
    run = observatory.open_run(watched / "fails")
    assert run.manifest.ranks[DELAYED].state == "failed"
    assert_aligned(run, (2, 3))
    assert [clock.drift_ppm is None for clock in clocks_of(run)[2:]] == [True, False]
    assert run_waits(run)["problem"].isna().all()
