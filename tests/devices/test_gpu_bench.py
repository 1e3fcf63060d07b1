"""The parts of the GPU suite, on a CPU and on the driver that plays GPUs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import observatory
from benchmarks.interleaved import interleaved
from observatory.analysis.energy import energy_summary
from tests.devices.driver import FakeDriver
from tests.devices.gpu_bench import SHAPES, alternate, make_stack, profile_stack
from tests.devices.scenes import needs_driver, play
from tests.probes.tiny import RoutedModel, routed_adapter

pytestmark = pytest.mark.slow

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
#: Everything small but the structure.
SMALL: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": {
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "vocab_size": 97,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_stack_of_all_layers_has_the_published_number_of_parameters(name: str) -> None:
    _, _, layers, published = SHAPES[name]
    model = make_stack(name, layers=layers, device="meta", dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(published, rel=0.01)


def test_an_interleaved_comparison_finds_a_slowdown_and_not_a_drift() -> None:
    state = {"on": False, "runs": 0}

    def block() -> tuple[float]:
        state["runs"] += 1
        return ((1.0 + 0.01 * state["runs"]) * (1.1 if state["on"] else 1.0),)

    ((ratio, low, high),) = interleaved(block, lambda on: state.update(on=on), groups=10)
    assert ratio == pytest.approx(1.1, abs=0.001)
    assert low <= ratio <= high


def square_scene(driver: FakeDriver) -> list[Any]:
    run = driver.state.with_name("run")

    def work(busy: int, seconds: float) -> None:
        driver.set(busy=busy)
        time.sleep(seconds)

    watch = observatory.watch(RoutedModel(), run, adapters=[routed_adapter()], power=[UUID])
    with watch as watching:
        phases = {"prefill": lambda s: work(1, s), "decode": lambda s: work(0, s)}
        alternate(watching, phases, seconds=14)
        driver.set(busy=1)
        busy_w = driver.get("watts")
    rows = energy_summary(observatory.open_run(run)).phases.set_index("phase")
    return [busy_w * 1e3, rows["power_mw"].to_dict(), rows["method"].to_dict()]


@needs_driver
def test_the_square_wave_shows_both_powers_of_the_fake_device(tmp_path: Path) -> None:
    busy_mw, power_mw, method = play(square_scene, tmp_path, timeout_s=300)
    assert [method["prefill"], method["decode"]] == ["least squares"] * 2
    assert power_mw["prefill"] == pytest.approx(busy_mw, rel=0.04)
    assert power_mw["decode"] == pytest.approx(75_000, rel=0.04)


def stack_scene(driver: FakeDriver, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    driver.set(busy=1)
    model = make_stack(name, layers=2, device="cpu", dtype=torch.float32, **SMALL[name])
    summary = profile_stack(
        model, driver.state.with_name("run"), device_uuid=UUID, batch=2, context=16, vocabulary=97,
        seconds=5.4,
    )  # fmt: skip
    run = observatory.open_run(driver.state.with_name("run"))
    tokens = run.routed_tokens().groupby("phase")["tokens"].sum()
    steps = run.spans().query("name == 'phase'").groupby("phase")["step"].nunique()
    return {
        "busy": driver.get("watts") * 1e3,
        "power": summary.phases.set_index("phase")["power_mw"].to_dict(),
        "tokens": [
            int(tokens["prefill"]) / int(steps["prefill"]),
            int(tokens["decode"]) / int(steps["decode"]),
        ],
        "known": summary.tokens["mj_per_token"].notna().tolist(),
    }


def deepseek_scene(driver: FakeDriver) -> dict[str, Any]:
    return stack_scene(driver, "deepseek-v2-lite")


@needs_driver
def test_a_stack_is_profiled_by_phase_with_its_tokens_and_power(tmp_path: Path) -> None:
    outcome = play(deepseek_scene, tmp_path, timeout_s=300)
    assert outcome["tokens"] == [32, 2]
    assert outcome["known"] == [True, True]
    for phase in ("prefill", "decode"):
        # by repetition, unless the machine is so busy that a phase pauses for 50 ms
        assert outcome["power"][phase] == pytest.approx(outcome["busy"], rel=0.05)
