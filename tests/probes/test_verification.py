"""Counts are proved: the witnesses confirm readers that are right, and contradict those that are not."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from probes.routing.discover import find_sites
from probes.routing.judgement import Verify
from tests.probes.families import NOT_ROUTED, moe_families, one_thread, tiny_inputs, tiny_model
from tests.probes.framework_cases import EVEN, installed_frameworks
from tests.probes.verification import BREAKS, broken, verdicts

#: families whose experts do not compute what their router decided
_CONTRADICTED = ("nllb_moe",)
FAMILIES = [family for family in moe_families() if family not in (*NOT_ROUTED, *_CONTRADICTED)]
#: names of sites that a text input does not reach
_NOT_CALLED = ("vision_moe.experts",)
#: experts of attention are called by the attention around them, which cannot be run again
_ROWS_ONLY = ("self_attention.experts.router",)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_confirmed_and_broken_readers_are_caught(family: str) -> None:
    model = tiny_model(family)
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


def test_a_family_whose_experts_compute_something_else_is_refused() -> None:
    model = tiny_model("nllb_moe")
    with one_thread():
        found, refusal = verdicts(model, find_sites(model), tiny_inputs(model))
    assert refusal is not None
    assert "gives 0 tokens to expert 0, which computes 24" in refusal
    assert found[0].by == "none"
    assert found[0].reason == refusal


def test_every_family_is_as_it_was_after_an_intervention() -> None:
    with one_thread(), torch.no_grad():
        for family in FAMILIES:
            model = tiny_model(family)
            inputs = tiny_inputs(model)
            state = {name: value.clone() for name, value in model.state_dict().items()}
            versions = [p._version for p in model.parameters()]
            verdicts(model, find_sites(model), inputs, verify="intervention")
            assert versions == [p._version for p in model.parameters()], family
            for name, value in model.state_dict().items():
                assert torch.equal(value, state[name]), (family, name)


def test_the_layers_of_installed_frameworks_are_confirmed_and_broken_readers_are_caught() -> None:
    found = installed_frameworks()
    if not found:
        pytest.skip("no framework is installed: pip install --no-deps megatron-core==0.16.1")
    for name, of_case in found.items():
        expected = [n for n in BREAKS if not (name.endswith(EVEN) and n == "shifted")]
        for verify, by in (("first", "rows"), ("intervention", "intervention")):
            assert set(of_case[verify]["by"]) == {by}, name
            assert of_case[verify]["refusal"] is None, name
            assert of_case[verify]["caught"] == expected, name


def test_the_ways_to_verify_are_those_of_the_documentation() -> None:
    assert get_args(Verify) == ("first", "rows", "intervention", "none")
