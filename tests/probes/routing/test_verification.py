"""Counts are proved: the witnesses confirm readers that are right, and contradict those that are not."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import observatory
from observatory.errors import CaptureError
from observatory.probes.options import Verify
from observatory.probes.routing import stacks
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.stacks import far_away
from observatory.probes.routing.words import Witness, verdict
from observatory.run.manifest import Manifest, Verified
from tests.probes.routing.families import NOT_ROUTED, moe_families, one_thread, tiny_inputs, tiny_model
from tests.probes.routing.framework_cases import EVEN
from tests.probes.routing.verification import BREAKS, broken, verdicts

#: families whose experts do not compute what their gates say
_CONTRADICTED = ("nllb_moe",)
EXPERTS, HIDDEN = 4, 16
FAMILIES = [family for family in moe_families() if family not in (*NOT_ROUTED, *_CONTRADICTED)]
#: names of sites that a text input does not reach
_NOT_CALLED = ("vision_moe.experts",)
#: experts of attention are called by the attention around them, which cannot be run again
_ROWS_ONLY = ("self_attention.experts.router",)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_confirmed_broken_readers_are_caught_and_the_model_is_as_it_was(family: str) -> None:
    model = tiny_model(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    sites = [s for s in find_sites(model) if not s.spec.module.endswith(_NOT_CALLED)]
    inputs = tiny_inputs(model)
    with one_thread():
        for verify, expected in (("first", "rows"), ("rows", "rows"), ("intervention", "intervention")):
            found, refusal = verdicts(model, sites, inputs, verify=verify)
            assert refusal is None
            for site, verdict in zip(sites, found, strict=True):
                by = "rows" if site.spec.module.endswith(_ROWS_ONLY) else expected
                assert (verdict.by, site.spec.module) == (by, site.spec.module)
        for verify in ("first", "intervention"):
            for change in BREAKS.values():
                found, refusal = verdicts(model, [broken(s, change) for s in sites], inputs, verify=verify)
                if any(
                    site.infers for site in sites
                ):  # what the block chose, or its rows, are counted instead
                    assert refusal is not None or all(v.by != "none" for v in found)
                else:
                    assert refusal is not None
                    assert f"in layer {sites[0].spec.layer} the reading of {sites[0].spec.module}" in refusal
    assert versions == [parameter._version for parameter in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def manifest_of(model: nn.Module, path: Path, verify: Any) -> Manifest:
    """What a watched pass of the model leaves."""
    with one_thread(), observatory.watch(model, path, verify=verify) as watch, torch.no_grad():
        model(**tiny_inputs(model))
        watch.step()
    return observatory.open_run(path).manifest


@pytest.mark.filterwarnings("ignore:run .*the experts compute other tokens")
def test_experts_that_do_not_follow_the_gates_are_stated(tmp_path: Path) -> None:
    model = tiny_model("nllb_moe")
    for verify in ("first", "intervention"):
        manifest = manifest_of(model, tmp_path / verify, verify)
        assert any("the experts compute other tokens than they say" in note for note in manifest.notes)
        for layer in manifest.model.moe_layers:
            assert layer.verified is not None
            assert layer.verified.by == "none"
            assert layer.verified.code == Witness.CONTRADICTED


@pytest.mark.slow
def test_layers_of_installed_frameworks_count_as_these_do_and_broken_readers_are_caught(
    frameworks: dict[str, dict[str, Any]],
) -> None:
    if not frameworks:
        pytest.skip("no framework is installed: pip install --no-deps megatron-core==0.16.1")
    for name, of_case in frameworks.items():
        assert of_case["counted"] == of_case["own"], name
        expected = [n for n in BREAKS if not (name.endswith(EVEN) and n == "shifted")]
        for verify, by in (("first", "rows"), ("intervention", "intervention")):
            assert set(of_case[verify]["by"]) <= {by, *of_case["also_by"]}, name
            assert of_case[verify]["refusal"] is None, name
            caught = of_case[verify]["caught"]
            assert caught == expected or (of_case["is_replaceable"] and "padding counted" in caught), name


class PackedExperts(nn.Module):
    """Weights as bytes with a scale per expert, used by a loop or all at once into room for C rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        weights = torch.randn(EXPERTS, HIDDEN, HIDDEN)
        packed = {
            "int8": (40 * weights).clamp(-127, 127).to(torch.int8),
            "fp8": weights.to(torch.float8_e4m3fn),
        }[kind]
        self.num_experts = EXPERTS
        self.register_buffer("scales", 1 + torch.rand(EXPERTS, 1, HIDDEN))
        self.register_buffer("packed", packed)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = self.packed.float() * self.scales
        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            rows = (hidden_states[token] @ weights[expert]) * top_k_weights[token, place, None]
            output.index_add_(0, token, rows)
        return output


class PaddedExperts(PackedExperts):
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gates_TE = torch.zeros(len(hidden_states), EXPERTS).scatter(1, top_k_index, top_k_weights)
        chosen_TE = torch.zeros(len(hidden_states), EXPERTS).scatter(1, top_k_index, 1)
        places_TE = chosen_TE.long().cumsum(0)
        slots_ETH = hidden_states.new_zeros(EXPERTS, len(hidden_states), HIDDEN)
        token, expert = chosen_TE.nonzero(as_tuple=True)
        place = places_TE[token, expert] - 1
        slots_ETH[expert, place] = hidden_states[token]
        results_ETH = torch.bmm(slots_ETH, self.packed.float() * self.scales)
        rows = results_ETH[expert, place] * gates_TE[token, expert, None]
        return torch.zeros_like(hidden_states).index_add(0, token, rows)


class Block(nn.Module):
    def __init__(self, experts: nn.Module, noise: torch.Generator | None = None) -> None:
        super().__init__()
        self.gate, self.top_k, self.experts, self.noise = nn.Linear(HIDDEN, EXPERTS), 2, experts, noise

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.gate(hidden)
        if self.noise is not None:
            scores = scores + torch.randn(scores.shape, generator=self.noise)
        weights, ids = scores.softmax(-1).topk(self.top_k)
        return self.experts(hidden, ids, weights)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("experts", [PackedExperts, PaddedExperts])
def test_packed_weights_are_followed_and_changed(experts: type[PackedExperts], kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(experts(kind)), Block(experts(kind)))  # the second gate saturates
    packed = [block.experts.packed.clone() for block in model]
    inputs = {"input": torch.randn(30, HIDDEN)}
    sites = find_sites(model)
    for verify, by in (("first", "rows"), ("intervention", "intervention")):
        found, refusal = verdicts(model, sites, inputs, verify=verify)
        assert ([v.by for v in found], refusal) == ([by, by], None)
        for change in BREAKS.values():
            assert verdicts(model, [broken(s, change) for s in sites], inputs, verify=verify)[1] is not None
    for block, before in zip(model, packed, strict=True):
        assert torch.equal(block.experts.packed.view(torch.uint8), before.view(torch.uint8))


class Counted(Block):
    """Noise from outside, which no run can repeat."""

    passes = itertools.count()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.noise = torch.Generator().manual_seed(next(self.passes))
        return super().forward(hidden)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Block, Verified(by="intervention")),
        (Counted, verdict("rows", Witness.RERUN_DIFFERS)),
    ],
)
def test_a_generator_that_a_block_holds_is_put_back(kind: type[Block], expected: Verified) -> None:
    model = nn.Sequential(kind(PackedExperts("int8"), noise=torch.Generator().manual_seed(0)))
    found, refusal = verdicts(
        model, find_sites(model), {"input": torch.randn(30, HIDDEN)}, verify="intervention"
    )
    assert (found, refusal) == ((expected,), None)


class ReluExperts(nn.Module):
    """Experts whose ReLU lets nothing through for some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 2, HIDDEN))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            rows = (hidden_states[token] @ self.up_proj[expert]).relu().square() @ self.down_proj[expert]
            output.index_add_(0, token, rows * top_k_weights[token, place, None])
        return output


def test_experts_that_give_zeros_are_seen_by_an_intervention() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(ReluExperts()))
    inputs, sites = {"input": torch.randn(60, HIDDEN)}, find_sites(model)
    found, refusal = verdicts(model, sites, inputs, verify="intervention")
    assert (found, refusal) == ((Verified(by="intervention"),), None)
    assert verdicts(model, [broken(sites[0], BREAKS["one token wrong"])], inputs, verify="intervention")[1]


def test_ctrl_c_in_an_intervention_leaves_weights_and_operators_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    changes = itertools.count()

    def interrupted(part: torch.Tensor) -> torch.Tensor:
        if next(changes) == 3:
            signal.raise_signal(signal.SIGINT)
        return far_away(part)

    monkeypatch.setattr(stacks, "far_away", interrupted)
    with one_thread(), pytest.raises(KeyboardInterrupt):
        verdicts(model, find_sites(model), tiny_inputs(model), verify="intervention")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch._C._len_torch_dispatch_stack() == 0


def test_code_that_is_compiled_inside_a_block_stays_compiled() -> None:
    compiled = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    class Compiled(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(act(hidden))

    act = torch.compile(lambda hidden: torch.nn.functional.silu(hidden) * 2, backend=backend)
    model = nn.Sequential(Compiled(PackedExperts("int8")))
    inputs = {"input": torch.randn(30, HIDDEN)}
    found, _ = verdicts(model, find_sites(model), inputs)
    assert [verdict.by for verdict in found] == ["rows"]
    assert compiled


def test_the_verdicts_are_in_the_manifest(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    for verify, by in (("first", "rows"), ("intervention", "intervention"), ("none", "none")):
        layers = manifest_of(model, tmp_path / verify, verify).model.moe_layers
        assert {layer.verified.by for layer in layers if layer.verified} == {by}
    with pytest.raises(CaptureError, match="verify is 'twice'; expected one of first, rows,"):
        observatory.watch(model, tmp_path / "x", verify="twice")  # type: ignore[arg-type]


def test_the_ways_to_verify_are_those_of_the_documentation() -> None:
    assert get_args(Verify) == ("first", "rows", "intervention", "none")
