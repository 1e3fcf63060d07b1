"""The time of a layer-step: hand-computed layouts, rules of dispatch and exchanges."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.experts.step_time import layer_step_times
from observatory.analysis.experts.words import StepCode, sentence
from observatory.errors import PlacementError
from observatory.run.exchange_algorithms import stages
from tests.analysis.experts.models import cost, network

#: One step, one layer, two source ranks, four experts.
LOAD = np.array([[[[6, 0, 1, 1], [2, 0, 1, 5]]]])
LINEAR = np.array([[[0, 1], [2, 3]]])


def test_the_busiest_rank_of_each_step_decides():
    times = layer_step_times(LOAD, LINEAR, cost(row_s=1.0))
    assert times.assignments_SLP.tolist() == [[[8.0, 8.0]]]
    assert times.activated_SLP.tolist() == [[[1.0, 2.0]]]
    assert times.experts_s.tolist() == [[8.0]]
    two_steps = np.concatenate([LOAD, LOAD[..., [2, 3, 0, 1]] * np.array([1, 1, 2, 1])])
    times = layer_step_times(two_steps, LINEAR, cost(row_s=1.0))
    assert times.experts_s.tolist() == [[8.0], [16.0]]
    assert times.waiting_s.tolist() == [[0.0], [4.0]]


def test_activated_experts_cost_where_rows_do_not():
    times = layer_step_times(LOAD, LINEAR, cost(expert_s=1.0))
    assert times.experts_s.tolist() == [[2.0]]
    assert times.waiting_s.tolist() == [[0.5]]


def test_speeds_divide_the_time_of_their_rank():
    times = layer_step_times(LOAD, LINEAR, cost(row_s=1.0), speed_P=np.array([0.5, 1.0]))
    assert times.experts_s.tolist() == [[16.0]]


def test_equal_shares_split_rows_and_raise_activated_experts():
    replicated = np.array([[[0, 1, -1], [2, 3, 0]]])
    times = layer_step_times(LOAD, replicated, cost(row_s=1.0))
    assert times.assignments_SLP.tolist() == [[[4.0, 12.0]]]
    assert times.activated_SLP.tolist() == [[[1.0, 3.0]]]


def test_weighted_shares_are_those_given():
    replicated = np.array([[[0, 1, -1], [2, 3, 0]]])
    share = np.array([[[0.75, 1.0, 0.0], [1.0, 1.0, 0.25]]])
    times = layer_step_times(LOAD, replicated, cost(row_s=1.0), dispatch="weighted", share_LPK=share)
    assert times.assignments_SLP.tolist() == [[[6.0, 10.0]]]


def test_per_step_splits_leave_the_busiest_rank_least():
    replicated = np.array([[[0, 1, -1], [2, 3, 0]]])
    times = layer_step_times(LOAD, replicated, cost(row_s=1.0), dispatch="per-step")
    assert times.assignments_SLP[0, 0] == pytest.approx([8.0, 8.0])
    assert times.activated_SLP[0, 0] == pytest.approx([1.0, 2.0])


def test_one_copy_activates_each_expert_once():
    replicated = np.array([[[0, 1, -1], [2, 3, 0]]])
    times = layer_step_times(LOAD, replicated, cost(expert_s=1.0), dispatch="one-copy")
    assert times.activated_SLP.tolist() == [[[1.0, 2.0]]]


def test_nearest_copies_are_the_own_then_those_of_the_node():
    load = np.zeros((1, 1, 4, 2), dtype=np.int64)
    load[0, 0, :, 0] = 4
    slots = np.array([[[0], [1], [0], [0]]])  # expert 0 on ranks 0, 2, 3; nodes are (0, 1), (2, 3)
    times = layer_step_times(load, slots, cost(row_s=1.0), dispatch="nearest", node_of_P=(0, 0, 1, 1))
    assert times.assignments_SLP.tolist() == [[[8.0, 0.0, 4.0, 4.0]]]


def test_flat_exchanges_are_of_the_rows_that_move():
    model = network(latency_us=10.0, us_per_byte=1.0)
    times = layer_step_times(LOAD, LINEAR, cost(), network=model, row_extra_bytes=8)
    # Rank 0 keeps 6 rows and sends 2, rank 1 sends 2 and keeps 6; a row has 32 bytes, to experts 40.
    assert times.dispatch_s[0, 0] == pytest.approx((10 + 2 * 40) * 1e-6)
    assert times.combine_s[0, 0] == pytest.approx((10 + 2 * 32) * 1e-6)
    assert times.total_s[0, 0] == pytest.approx(times.dispatch_s[0, 0] + times.combine_s[0, 0])
    assert not times.estimated


def test_gathered_exchanges_are_of_all_tokens():
    model = network(latency_us=10.0, us_per_byte=1.0)
    times = layer_step_times(LOAD, LINEAR, cost(), network=model, algorithm="gather")
    # Eight assignments of two each are four tokens of each rank.
    assert times.dispatch_s[0, 0] == pytest.approx((10 + 4 * 32) * 1e-6)


def test_hierarchical_exchanges_send_a_token_once_between_nodes():
    load = np.zeros((1, 1, 4, 4), dtype=np.int64)
    load[0, 0, 0] = [0, 0, 6, 6]  # six tokens of rank 0, both experts on the other node
    slots = np.arange(4).reshape(1, 4, 1)
    model = network(latency_us=0.0, us_per_byte=1.0)
    nodes = (0, 0, 1, 1)
    times = layer_step_times(load, slots, cost(), network=model, node_of_P=nodes, algorithm="hierarchical")
    # Between nodes six rows; inside, rank 2 keeps its six and sends six to rank 3.
    assert times.dispatch_s[0, 0] == pytest.approx((6 + 6) * 32 * 1e-6)
    assert times.estimated


def test_stages_of_several_matrices_are_those_of_each():
    generator = np.random.default_rng(2)
    bytes_MPP = generator.integers(0, 99, size=(3, 6, 6))
    for algorithm in ("flat", "hierarchical", "gather"):
        for role in (None, "combine"):
            together = stages(bytes_MPP, (0, 0, 0, 1, 1, 1), algorithm, role=role)
            for index, matrix in enumerate(bytes_MPP):
                alone = stages(matrix, (0, 0, 0, 1, 1, 1), algorithm, role=role)
                assert all((a == b[index]).all() for a, b in zip(alone, together, strict=True))


def test_what_is_missing_has_its_reason():
    times = layer_step_times(LOAD, LINEAR, cost(row_s=1.0), shared_experts=1)
    assert times.dispatch_s is None
    assert times.total_s is None
    assert times.shared_s is None
    assert times.reasons["dispatch"][0].code is StepCode.NO_NETWORK
    assert times.reasons["shared"][0].code is StepCode.NOT_TIMED
    assert all(sentence(reason) for part in times.reasons.values() for reason in part)


def test_what_ranks_do_alone_is_of_the_one_with_most_tokens():
    model = network(latency_us=0.0, us_per_byte=0.0)
    known = cost(shared_F=(1.0, 2.0), local_F=(3.0, 0.5))
    load = np.array([[[[6, 0, 1, 1], [2, 0, 1, 1]]]])  # four and two tokens
    times = layer_step_times(load, LINEAR, known, network=model, shared_experts=1)
    assert times.shared_s.tolist() == [[9.0]]
    assert times.local_s.tolist() == [[5.0]]
    assert times.total_s.tolist() == [[14.0]]
    assert times.reasons == {}


def test_what_was_not_measured_is_marked():
    times = layer_step_times(LOAD * 1000, LINEAR, cost(row_s=1.0))
    assert (times.beyond_SL > 1).all()
    assert (layer_step_times(LOAD, LINEAR, cost(row_s=1.0)).beyond_SL <= 1).all()


@pytest.mark.parametrize(
    ("load", "slots", "options"),
    [
        (LOAD, np.array([[[0, 1], [2, 2]]]), {}),
        (LOAD, np.array([[[0, 1], [2, 4]]]), {}),
        (LOAD, np.concatenate([LINEAR, LINEAR]), {}),
        (LOAD[:, :, :1], LINEAR, {}),
        (LOAD, LINEAR, {"node_of_P": (0,)}),
        (LOAD, LINEAR, {"dispatch": "weighted"}),
        (LOAD, LINEAR, {"dispatch": "weighted", "share_LPK": np.zeros((1, 2, 2))}),
    ],
)
def test_what_does_not_fit_is_refused(load, slots, options):
    with pytest.raises(PlacementError):
        layer_step_times(load, slots, cost(), **options)


def test_ranks_that_share_cores_take_turns() -> None:
    alone = layer_step_times(LOAD, LINEAR, cost(row_s=1.0))
    shared = layer_step_times(LOAD, LINEAR, cost(row_s=1.0), shared_cores=1.0)
    assert (alone.experts_s[0, 0], shared.experts_s[0, 0]) == (8.0, 16.0)


def test_announced_counts_are_an_exchange_of_their_own() -> None:
    model = network(latency_us=10.0, us_per_byte=1.0)
    for nodes, algorithm, us in (
        ((0, 0, 0, 0), "flat", 10 + 3 * 24),
        ((0, 0, 1, 1), "hierarchical", 2 * (10 + 24)),
    ):
        load = np.ones((1, 1, 4, 4), dtype=np.int64)
        times = layer_step_times(
            load,
            np.arange(4).reshape(1, 4, 1),
            cost(),
            network=model,
            node_of_P=nodes,
            algorithm=algorithm,
            count_bytes=24,
        )
        assert times.counts_s[0, 0] == pytest.approx(us * 1e-6)
        assert times.total_s[0, 0] == pytest.approx(
            times.counts_s[0, 0] + times.dispatch_s[0, 0] + times.combine_s[0, 0]
        )
