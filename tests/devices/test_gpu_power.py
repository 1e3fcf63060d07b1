"""What only an NVIDIA GPU can show of power; reads, and sets nothing. Run by ``make test-gpu``.

Figures go as properties into the JUnit file that ``make test-gpu`` writes, for docs/evidence/hardware.md.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import observatory
from benchmarks.interleaved import interleaved
from observatory.analysis.energy import energy_of_window, energy_summary, sensor_of
from observatory.analysis.energy.traces import trace_of_frame
from observatory.devices.find import open_device, open_devices
from observatory.devices.nvml import NvmlDevice
from observatory.locks.control import ClockControl
from observatory.probes.power.sampler import PowerSampler
from observatory.run.manifest import RankPower
from tests.conftest import MakeRun
from tests.devices.contract import CHECKS, Bench
from tests.devices.gpu_bench import SHAPES, alternate, make_stack, profile_stack, repeat_for
from tests.probes.tiny import RoutedModel, routed_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setter of the driver can be called, and the settings that can be read are the same afterwards."""

    def refused(*_: object) -> None:
        raise AssertionError("the GPU suite must not change a device")

    monkeypatch.setattr(ClockControl, "_set", refused)
    before = _settings()
    yield
    assert _settings() == before


def _settings() -> list[Any]:
    with open_device(_uuid()) as device:
        return [device.read().enforced_limit_mw, device.spec.model_dump()]


def _uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def matmul(seconds: float) -> int:
    """Keep the tensor cores busy."""
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return repeat_for(seconds, lambda: left @ left)


def copying(seconds: float) -> int:
    """Keep the memory busy and the multiprocessors mostly waiting for it."""
    source = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return repeat_for(seconds, lambda: target.copy_(source))


def sampled(run: Path, work: Callable[[], Any]) -> RankPower:
    """Sample while something runs."""
    sampler = PowerSampler(run, rank=0, ranks=1, selectors=[_uuid()])
    sampler.start()
    work()
    return sampler.stop()


def test_the_gpu_of_torch_is_found_by_its_uuid_and_tells_power_or_why_not(record_property: Record) -> None:
    found = open_devices()
    for device in found:
        device.close()
    assert _uuid() in [device.uuid for device in found]
    with open_device(_uuid()) as device:
        record_property("device", device.spec.model_dump_json())
        record_property("unavailable", dict(device.unavailable))
        sample = device.read()
        assert sample.power_mw is not None or "power_mw" in device.unavailable
        assert sample.energy_mj is not None or "energy_mj" in device.unavailable


@pytest.mark.parametrize("name", CHECKS)
def test_the_contract_of_devices_holds_on_hardware(name: str) -> None:
    CHECKS[name](Bench(open=lambda: NvmlDevice(_uuid()), step=lambda: time.sleep(0.12)))


def test_update_periods_latencies_and_cost_of_sampling(make_run: MakeRun, record_property: Record) -> None:
    matmul(1.0)
    outcome = sampled(make_run(), lambda: matmul(10.0))
    assert outcome.notes == ()
    for name, field in outcome.calibration[_uuid()].fields.items():
        record_property(f"update_period_ms_{name}", field.update_period_ms or field.reason)
        assert field.reason or 1 <= (field.update_period_ms or 0) <= 1500
    assert outcome.cost is not None
    record_property("sampler_cost", outcome.cost.model_dump())
    assert outcome.cost.read_us_p99 is not None
    assert outcome.cost.read_us_p99 < 50_000, "a reading takes longer than the period"
    assert outcome.cost.cpu_share is not None
    assert outcome.cost.cpu_share < 0.02


def test_counter_and_integral_agree_under_steady_load(make_run: MakeRun, record_property: Record) -> None:
    run = make_run()
    window: list[int] = []

    def work() -> None:
        time.sleep(1.0)
        matmul(1.0)
        window.append(time.monotonic_ns())
        matmul(8.0)
        window.append(time.monotonic_ns())
        matmul(1.0)

    outcome = sampled(run, work)
    trace = trace_of_frame(observatory.open_run(run).power())
    energy = energy_of_window(trace, *window, sensor=sensor_of(outcome.sampled[0].name))
    if energy.disagreement is None:
        pytest.skip(f"counter: {energy.counter_reason}; power: {energy.integral_reason}")
    record_property("counter_over_integral_minus_1", energy.disagreement)
    assert abs(energy.disagreement) < 0.05


def test_a_square_wave_is_attributed_what_each_half_draws_alone(
    tmp_path: Path, record_property: Record
) -> None:
    found: list[dict[str, float]] = []
    for number, mean_s in enumerate((0.4, None)):
        run = tmp_path / str(number)
        watch = observatory.watch(
            RoutedModel().cuda(), run, adapters=[routed_adapter()], power=[_uuid()], overwrite=True
        )
        with watch as watching:
            work = {"prefill": matmul, "decode": copying}
            matmul(2.0)
            if mean_s is not None:
                alternate(watching, work, seconds=40, mean_s=mean_s)
            for phase in work if mean_s is None else ():
                with watching.phase(phase):  # type: ignore[arg-type]
                    work[phase](8.0)
                watching.step()
        phases = energy_summary(observatory.open_run(run)).phases.set_index("phase")
        record_property(f"square_wave_{'alone' if mean_s is None else 'mixed'}", phases.to_json())
        found.append(phases["power_mw"].to_dict())
    mixed, alone = found
    assert alone["prefill"] > 1.2 * alone["decode"], "the two loads must differ for this to mean anything"
    for phase in ("prefill", "decode"):
        assert mixed[phase] == pytest.approx(alone[phase], rel=0.1)


def test_sampling_does_not_slow_a_program_down(make_run: MakeRun, record_property: Record) -> None:
    left = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def block() -> tuple[float]:
        began = time.monotonic()
        for _ in range(2000):
            left @ left
        torch.cuda.synchronize()
        return (time.monotonic() - began,)

    sampler = PowerSampler(make_run(), rank=0, ranks=1, selectors=[_uuid()])
    sampler.start()
    assert sampler._process is not None
    pid = sampler._process.pid
    block()
    ((ratio, low, high),) = interleaved(
        block, lambda on: os.kill(pid, signal.SIGCONT if on else signal.SIGSTOP), groups=12
    )
    os.kill(pid, signal.SIGCONT)
    sampler.stop()
    record_property("perturbation", [ratio, low, high])
    assert low < 1.02


@pytest.fixture(params=SHAPES)
def stack(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    yield request.param, make_stack(request.param, layers=4, device="cuda", dtype=torch.bfloat16)
    torch.cuda.empty_cache()


def test_a_real_sized_stack_is_profiled_in_prefill_and_decode(
    stack: tuple[str, Any], tmp_path: Path, record_property: Record
) -> None:
    name, model = stack
    summary = profile_stack(
        model, tmp_path / "run", device_uuid=_uuid(), batch=8, context=1024,
        vocabulary=SHAPES[name][1]["vocab_size"], seconds=8.0,
    )  # fmt: skip
    for frame in ("devices", "phases", "tokens", "aliasing"):
        record_property(f"{name}_{frame}", getattr(summary, frame).to_json(orient="records"))
    tokens = summary.tokens.set_index("phase")
    assert tokens["mj_per_token"].notna().all(), tokens["reason"].tolist()
    # 8192 tokens share the reading of the weights in prefill, 8 in decode
    assert tokens.loc["decode", "mj_per_token"] > 3 * tokens.loc["prefill", "mj_per_token"]
    run = observatory.open_run(tmp_path / "run")
    loads = run.expert_load().groupby(["phase", "layer"])["load"].sum()
    layers = {layer.layer: layer.top_k for layer in run.manifest.model.moe_layers}
    for (phase, layer), load in loads.items():
        assert load == layers[layer] * tokens.loc[phase, "tokens"]
