"""One rank: the same calls, nothing to join; and what cannot be made parallel says so."""

from __future__ import annotations

import pytest
import torch

from observatory.collectives.expert_parallel import shard_experts
from observatory.collectives.transport.base import AloneTransport
from observatory.collectives.transport.open import open_transport
from observatory.errors import ExchangeError, ModelError, PlacementError
from observatory.probes.exchange.labels import Label, MemorySink, current_label
from observatory.probes.routing.discover import find_sites
from tests.probes.routing.families import one_thread, tiny_inputs, tiny_model
from tests.probes.tiny import assert_untouched


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash", "jetmoe", "nllb_moe", "switch_transformers"])
def test_experts_that_are_not_stacked_behind_one_call_are_refused_by_name(family: str) -> None:
    with one_thread(), pytest.raises(ModelError, match=r"cannot be made expert-parallel"):
        shard_experts(tiny_model(family), AloneTransport())


def test_leaving_gives_the_model_back_as_it_was() -> None:
    with one_thread(), torch.no_grad():
        model = tiny_model("mixtral")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with shard_experts(model, AloneTransport()):
            assert "forward" in vars(find_sites(model)[0].module)
        assert_untouched(model)
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_of_others_can_be_freed() -> None:
    with one_thread(), torch.no_grad():
        model = tiny_model("gpt_oss")
        inputs = tiny_inputs(model)
        expected = model(**inputs)[0]
        with shard_experts(model, AloneTransport(), keep_full=False) as sharded:
            assert torch.allclose(sharded(**inputs)[0], expected, atol=1e-5)
            module = sharded.layers[0].site.module
            assert {p.device.type for p in module.parameters()} == {"meta"}
            assert [site.spec.experts for site in find_sites(model)] == [8, 8]


def test_a_placement_of_the_wrong_length_is_refused() -> None:
    with one_thread():
        model = tiny_model("mixtral")
        with pytest.raises(PlacementError, match="places 7 experts, layer 0 has 8"):
            shard_experts(model, AloneTransport(), placement=[0] * 7)
        with pytest.raises(PlacementError, match="no layer 1"):
            shard_experts(model, AloneTransport(), placement={0: [0] * 8})
        with pytest.raises(ExchangeError, match=r"'ring' does not exist; expected flat"):
            shard_experts(model, AloneTransport(), algorithm="ring")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_refused_before_torch_stumbles_over_it() -> None:
    with pytest.raises(ExchangeError, match="torch finds no GPU here"):
        open_transport("nccl", environment={})


def test_an_exchange_says_what_it_is_for_while_it_runs() -> None:
    seen: list[Label | None] = []

    class Watched(AloneTransport):
        def _all_to_all(self, rows, send_G, receive_G, group):  # type: ignore[no-untyped-def]
            seen.append(current_label())
            return super()._all_to_all(rows, send_G, receive_G, group)

    with one_thread():
        model = tiny_model("mixtral")
        sink = MemorySink()
        with shard_experts(model, Watched(), sink=sink) as sharded:
            seen.clear()
            sharded(**tiny_inputs(model))[0].sum().backward()
    forward = [("other", 0), ("dispatch", 0), ("combine", 0), ("other", 1), ("dispatch", 1), ("combine", 1)]
    # The gradient of a combine travels like a dispatch, and the other way round.
    backward = [("dispatch", 1), ("combine", 1), ("dispatch", 0), ("combine", 0)]
    outcome = [(label.role, label.layer) for label in seen if label is not None]
    assert outcome == forward + backward
    assert [label.backward for label in seen if label is not None] == [False] * 6 + [True] * 4
    assert [(e.role, e.layer) for e in sink.exchanges] == [x for x in outcome if x[0] != "other"]
    assert current_label() is None


def test_a_backend_that_does_not_fit_is_refused() -> None:
    assert open_transport("alone", environment={}).backend == "alone"
    with pytest.raises(ExchangeError, match="backend 'ucx' does not exist"):
        open_transport("ucx", environment={})  # type: ignore[arg-type]
    with pytest.raises(ExchangeError, match="alone was asked for on rank 1 of 2"):
        open_transport("alone", environment={"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(ExchangeError, match="MASTER_ADDR is None"):
        open_transport("gloo", environment={"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"})


def test_splits_that_do_not_fit_are_refused() -> None:
    alone, rows = AloneTransport(), torch.zeros(3, 2)
    with pytest.raises(ExchangeError, match="3 rows were given and 2 are to be sent"):
        alone.all_to_all_v(rows, [2], [2])
    with pytest.raises(ExchangeError, match=r"receive rows are \[-1\]"):
        alone.all_to_all_v(rows, [3], [-1])
    with pytest.raises(ExchangeError, match="expected int64"):
        alone.exchange_counts(torch.ones(1))
    with pytest.raises(ExchangeError, match="rank 0 gives 3 rows"):
        alone.all_gather_v(rows, [2])
    with pytest.raises(ExchangeError, match="3 rows are to be summed"):
        alone.reduce_scatter_v(rows, [2])
