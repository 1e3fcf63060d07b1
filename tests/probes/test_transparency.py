"""The model does not notice that it is watched."""

# ruff: noqa: PT012, PT031  # what is raised or warned about is that the whole block ends so

from __future__ import annotations

import copy
import io
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import observatory
from observatory.errors import CaptureError
from observatory.probes.routing.probe import RoutingProbe
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.tiny import (
    HIDDEN,
    RoutedModel,
    ScriptedModel,
    assert_untouched,
    ids,
    loads,
    routed_adapter,
    scripted_adapter,
)

LAYERS, EXPERTS, TOP_K, TOKENS = 2, 4, 2, 12


def routed(reentrant: bool | None = None) -> tuple[RoutedModel, torch.Tensor]:
    torch.manual_seed(0)
    return RoutedModel(LAYERS, EXPERTS, TOP_K, reentrant), torch.randn(TOKENS, HIDDEN, requires_grad=True)


def totals(path: Path) -> dict[int, int]:
    """Layer -> assignments over all steps and phases."""
    found: dict[int, int] = {}
    for (_, _, layer), load in loads(path, experts=EXPERTS).items():
        found[layer] = found.get(layer, 0) + sum(load)
    return found


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_outputs_and_gradients_are_bit_identical_and_recomputation_is_not_counted(
    tmp_path: Path, reentrant: bool | None
) -> None:
    def run(model: nn.Module, tokens_TH: torch.Tensor) -> list[torch.Tensor]:
        output = model(tokens_TH)
        output.square().sum().backward()
        gradients = [p.grad.clone() for p in [*model.parameters(), tokens_TH] if p.grad is not None]
        model.zero_grad()
        tokens_TH.grad = None
        return [output.detach(), *gradients]

    model, tokens_TH = routed(reentrant)
    plain = run(model, tokens_TH)
    options = {"gate_mass": True, "sample_tokens": 3}
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()], **options) as watch:
        watched = run(model, tokens_TH)
        watch.step()
    assert len(plain) == 2 + 3 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert totals(tmp_path / "r") == {0: TOKENS * TOP_K, 1: TOKENS * TOP_K}
    assert_untouched(model)


def test_a_forward_inside_a_custom_autograd_function_counts(tmp_path: Path) -> None:
    model, tokens_TH = routed()

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: object, hidden: torch.Tensor) -> torch.Tensor:
            return model(hidden)

        @staticmethod
        def backward(_ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0]

    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        Through.apply(tokens_TH).sum().backward()
        watch.step()
    assert totals(tmp_path / "r") == {0: TOKENS * TOP_K, 1: TOKENS * TOP_K}


def test_gradient_accumulation_adds_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        for micro_TH in tokens_TH.split(4):
            model(micro_TH).sum().backward()
        watch.step()
    assert totals(tmp_path / "r") == {0: TOKENS * TOP_K, 1: TOKENS * TOP_K}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_modes_can_be_entered_inside_and_outside_of_the_watch(
    tmp_path: Path, mode: type[AbstractContextManager[object]], inside: bool
) -> None:
    model, tokens_TH = routed()
    outer, inner = (nullcontext(), mode()) if inside else (mode(), nullcontext())
    with (
        outer,
        observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()], gate_mass=True) as watch,
    ):
        with inner:
            model(tokens_TH)
        watch.step()
        model(tokens_TH)
        watch.step()
    assert totals(tmp_path / "r") == {0: 2 * TOKENS * TOP_K, 1: 2 * TOKENS * TOP_K}


def test_a_model_may_change_its_type_while_it_is_watched(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        model(tokens_TH)
        model.to(torch.float64)(tokens_TH.double())
        watch.step()
    assert totals(tmp_path / "r") == {0: 2 * TOKENS * TOP_K, 1: 2 * TOKENS * TOP_K}


class NoSync(TorchDispatchMode):
    """Fails on operators that make the host wait for a device, and lists the others."""

    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "masked_select",
        "unique",
        "equal",
        "item",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func.overloadpacket).removeprefix("aten.")
        assert name not in self.forbidden, name
        assert not (name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])), name
        if name == "_to_copy":
            assert (kwargs or {}).get("device") in (None, args[0].device)
        self.seen.append(name)
        return func(*args, **(kwargs or {}))


VIEWS = {"view", "_unsafe_view", "slice", "expand", "detach", "unsqueeze", "alias"}


@pytest.mark.parametrize(
    ("decision", "options", "kernels"),
    [
        (ids([0, 1], [2, 3]), {}, 3),
        (RoutingDecision(routing_map=torch.eye(4, dtype=torch.bool), tokens=4), {}, 5),
        (
            RoutingDecision(
                expert_ids=torch.zeros(2, 2, dtype=torch.int64),
                weights=torch.ones(2, 2),
                token_mask=torch.tensor([True, False]),
                tokens=2,
            ),
            {"gate_mass": True, "sample_tokens": 2},
            16,
        ),
    ],
)
def test_counting_launches_few_kernels_and_never_waits(
    decision: RoutingDecision, options: dict[str, int], kernels: int
) -> None:
    from observatory.probes.options import RoutingOptions
    from observatory.probes.routing.discover import find_sites

    model = ScriptedModel()
    sites = find_sites(model, adapters=[scripted_adapter(4)])
    probe = RoutingProbe(model, sites, RoutingOptions(**options))  # type: ignore[arg-type]
    device = next(iter(probe._devices.values()))
    with NoSync() as mode:
        probe.counters[0].add(decision, 0, device.parts[0][0], device)
    launched = [name for name in mode.seen if name not in VIEWS]
    assert 0 < len(launched) <= kernels, launched


def test_a_dispatch_mode_of_the_caller_sees_one_operator_and_the_counts_stay_right(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        with FlopCounterMode(display=False) as flops:
            model(tokens_TH)
        watch.step()
    assert flops.get_total_flops() > 0
    assert totals(tmp_path / "r") == {0: TOKENS * TOP_K, 1: TOKENS * TOP_K}


def test_fake_and_meta_tensors_pass_through_uncounted(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ScriptedModel()
    with (
        pytest.warns(UserWarning, match="nothing was counted"),
        observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)]) as watch,
    ):
        model([RoutingDecision(expert_ids=torch.zeros(2, 2, dtype=torch.int64, device="meta"), tokens=2)])
        with FakeTensorMode():
            model.layers[0](
                torch.zeros(1), RoutingDecision(expert_ids=torch.zeros(2, 2, dtype=torch.int64), tokens=2)
            )
        watch.step()


def test_copies_and_pickles_of_a_watched_model_are_not_watched(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    model.eval()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        twin = copy.deepcopy(model)
        twin(tokens_TH)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        loaded(tokens_TH)
        model(tokens_TH)
        watch.step()
    assert totals(tmp_path / "r") == {0: TOKENS * TOP_K, 1: TOKENS * TOP_K}
    assert_untouched(twin)
    assert_untouched(loaded)


def test_a_decision_that_cannot_be_read_is_one_clear_error_and_the_model_runs_on(tmp_path: Path) -> None:
    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)])
    with pytest.raises(CaptureError, match=r"routing of layers\.0 could not be read: .*boom"), watch:
        output = model([ids([1])])
        model([_Boom()])  # type: ignore[list-item]
        assert torch.equal(model([ids([1])]), output)
        watch.step()
    assert_untouched(model)
    run = observatory.open_run(tmp_path / "r")
    assert run.manifest.state == "failed"
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [0, 2]}


class _Boom:
    """A decision that fails when it is looked at."""

    weights = None

    @property
    def expert_ids(self) -> torch.Tensor:
        raise RuntimeError("boom")
