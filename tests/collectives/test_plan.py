"""Who holds what, and what one rank sends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from observatory.collectives.dispatch.plan import NO_SLOT, DispatchPlan, ExpertMap
from observatory.collectives.expert_parallel import linear_placement
from observatory.collectives.layout import Layout, nodes_in_order, split_into_nodes
from observatory.collectives.transport.mpi import MAX_MPI_COUNT, check_mpi_counts
from observatory.errors import ExchangeError, PlacementError


def layout(rank: int, size: int = 4, ranks_per_node: int = 2) -> Layout:
    return Layout(rank=rank, node_of_P=split_into_nodes(size, ranks_per_node))


def test_slots_are_numbered_rank_by_rank() -> None:
    experts = ExpertMap([[1], [0], [1], [0, 1]], layout(0, 2))
    # rank 0 holds experts 1 and 3 in slots 0 and 1; rank 1 holds 0, 2 and 3 in slots 2, 3 and 4
    assert experts.first_slot_P.tolist() == [0, 2, 5]
    assert experts.rank_of_Z.tolist() == [0, 0, 1, 1, 1]
    assert experts.experts_here == (1, 3)
    assert experts.slots(torch.tensor([[0, 1], [2, 3], [-1, 4]])).tolist() == [[2, 0], [3, 1], [-1, -1]]


def test_a_replica_on_the_own_node_is_nearer_and_equals_take_turns() -> None:
    ids = torch.zeros(4, 1, dtype=torch.int64)

    def goes_to(rank: int, holders: list[int]) -> list[int]:
        experts = ExpertMap([holders], layout(rank))
        slots: list[int] = experts.rank_of_Z[experts.slots(ids)].squeeze(1).tolist()
        return slots

    assert goes_to(1, [0, 1, 2, 3]) == [1, 1, 1, 1]  # itself
    assert goes_to(1, [0, 2, 3]) == [0, 0, 0, 0]  # the other rank of its node
    assert goes_to(0, [2, 3]) == [2, 3, 2, 3]  # another node: by turns, from its own rank on
    assert goes_to(1, [2, 3]) == [3, 2, 3, 2]


def test_copies_with_shares_get_them_wherever_they_are() -> None:
    """Three quarters to rank 3, a quarter to rank 0, none to rank 1; expert 1 has one holder."""
    ids = torch.zeros(4000, 1, dtype=torch.int64)
    for rank in range(4):
        experts = ExpertMap([[3, 0, 1], [2]], layout(rank), [[0.75, 0.25, 0.0], [1.0]])
        sent_P = experts.rank_of_Z[experts.slots(ids)].flatten().bincount(minlength=4) / 4000
        assert sent_P.tolist() == pytest.approx([0.25, 0.0, 0.0, 0.75], abs=1e-3)
        assert experts.rank_of_Z[experts.slots(ids + 1)].unique().tolist() == [2]
        assert experts.slots(ids - 1).unique().tolist() == [NO_SLOT]


@pytest.mark.parametrize("holders", [[], [0, 0], [4], [-1]])
def test_an_expert_sits_once_on_ranks_that_exist(holders: list[int]) -> None:
    with pytest.raises(PlacementError, match="expert 1 is placed on ranks"):
        ExpertMap([[0], holders], layout(0))


def test_rows_are_sorted_by_destination_and_expert() -> None:
    slots = torch.tensor([[3, 0], [1, NO_SLOT], [0, 2]])
    plan = DispatchPlan.make(slots, torch.tensor([0, 0, 1, 1]), 2, deduplicate=False)
    assert plan.slots_NM.squeeze(1).tolist() == [0, 0, 1, 2, 3]
    assert plan.source_N.tolist() == [0, 2, 1, 2, 0]
    assert plan.send_G == (3, 2)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    assert plan.weights(weights).squeeze(1).tolist() == pytest.approx([0.2, 0.5, 0.3, 0.6, 0.1])


def test_deduplicated_rows_name_all_their_experts_behind_a_rank() -> None:
    slots = torch.tensor([[3, 2], [1, NO_SLOT], [0, 2]])
    plan = DispatchPlan.make(slots, torch.tensor([0, 0, 1, 1]), 2, deduplicate=True)
    assert plan.source_N.tolist() == [1, 2, 0, 2]
    assert plan.slots_NM.tolist() == [[1, -1], [0, -1], [3, 2], [-1, 2]]
    assert plan.send_G == (2, 2)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    assert plan.weights(weights).flatten().tolist() == pytest.approx([0.3, 0, 0.5, 0, 0.1, 0.2, 0, 0.6])


@given(
    st.lists(st.lists(st.integers(NO_SLOT, 7), min_size=2, max_size=2), min_size=0, max_size=20),
    st.booleans(),
)
def test_every_assignment_is_sent_once_to_its_member(rows: list[list[int]], deduplicate: bool) -> None:
    slots = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    member_of_Z = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    plan = DispatchPlan.make(slots, member_of_Z, 4, deduplicate=deduplicate)
    destination = torch.repeat_interleave(torch.arange(4), torch.tensor(plan.send_G)).tolist()
    sent = []
    for member, source, places, named in zip(
        destination,
        plan.source_N.tolist(),
        plan.assignment_NM.tolist(),
        plan.slots_NM.tolist(),
        strict=True,
    ):
        for place, slot in zip(places, named, strict=True):
            if slot != NO_SLOT:
                assert member_of_Z[slot] == member
                sent.append((source, place, slot))
    wanted = [(t, k, z) for t, row in enumerate(rows) for k, z in enumerate(row) if z != NO_SLOT]
    assert sorted(sent) == sorted(wanted)
    if deduplicate:
        pairs = list(zip(destination, plan.source_N.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)


def test_ranks_that_do_not_divide_the_experts_are_refused_with_those_that_do() -> None:
    assert linear_placement(4, 2) == (0, 0, 1, 1)
    with pytest.raises(PlacementError, match=r"3 ranks do not divide 8 experts; .* 1, 2, 4, 8"):
        linear_placement(8, 3)


def test_groups_lead_from_anywhere_to_anywhere_in_two_steps() -> None:
    for rank in range(6):
        own = layout(rank, 6, 3)
        reached = {
            end
            for middle in own.members("across")
            for end in Layout(rank=middle, node_of_P=own.node_of_P).members("node")
        }
        assert reached == set(range(6))
    assert layout(4, 6, 3).members("across") == (1, 4)
    assert layout(4, 6, 3).members("node") == (3, 4, 5)


def test_nodes_of_different_size_cannot_cross() -> None:
    own = Layout(rank=0, node_of_P=nodes_in_order(["b", "a", "b"]))
    assert own.node_of_P == (0, 1, 0)
    with pytest.raises(ExchangeError, match="the nodes have 2, 1 ranks"):
        own.members("across")
    with pytest.raises(ExchangeError, match="3 ranks per node do not divide 4 ranks"):
        split_into_nodes(4, 3)


def test_mpi_counts_beyond_32_bits_are_refused_before_they_wrap() -> None:
    check_mpi_counts([MAX_MPI_COUNT - 5, 5], "sent")
    with pytest.raises(ExchangeError, match="2147483648 bytes are to be sent"):
        check_mpi_counts([MAX_MPI_COUNT, 1], "sent")
