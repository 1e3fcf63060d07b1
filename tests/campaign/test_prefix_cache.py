"""Energy of prefill against the cached fraction, measured on the fake driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from observatory.analysis.energy import fit_reuse
from observatory.campaign.prefix_cache import (
    ReuseJob,
    cached_prefills,
    check_same_device,
    parse_fractions,
    run_reuse,
)
from observatory.campaign.workloads import Window, WorkloadFacts, _decode
from observatory.cli import main
from observatory.errors import DeviceError, EnergyError, ModelError
from observatory.probes.power.watched import gpu_uuid
from observatory.run.documents.prefix_cache import load_reuse
from observatory.zoo.models import load_model
from tests.devices.driver import FakeDriver
from tests.devices.recordings import UUID as RECORDED
from tests.devices.recordings import write_recording
from tests.devices.scenes import needs_driver, play

pytestmark = pytest.mark.slow

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"


class PlayedPrefill:
    """A device that is busy all the time; prefills end 40 times a second, and draw the given power."""

    def __init__(self, driver: FakeDriver, memory_j: float) -> None:
        self.facts = WorkloadFacts(name="played")
        self.driver, self.memory_j = driver, memory_j
        self.truth_mj: list[float] = []

    def measure(self, *, settle_s: float, window_s: float) -> Window:
        self.driver.set(busy=1, mem_j=self.memory_j)
        time.sleep(settle_s)
        before_j, start_ns = self.driver.get("energy_j"), time.monotonic_ns()
        time.sleep(window_s)
        energy_j, end_ns = self.driver.get("energy_j") - before_j, time.monotonic_ns()
        self.driver.set(busy=0)
        prefills = max(1, round((end_ns - start_ns) * 1e-9 * 40))
        self.truth_mj.append(1e3 * energy_j / prefills)
        return Window(start_ns=start_ns, end_ns=end_ns, iterations=prefills)

    def close(self) -> None:
        pass


def known(driver: FakeDriver) -> dict[str, Any]:
    """Miss, partial and exact hit, whose powers the driver works with."""
    out = Path(os.environ["FAKE_NVML_STATE"]).with_name("reuse.json")
    loads = {fraction: PlayedPrefill(driver, 4.0 * (1 - fraction)) for fraction in (0.0, 0.5, 1.0)}
    job = ReuseJob(model="played", device=UUID, prompt_tokens=4096, repeats=2, settle_s=0.3, window_s=2.0)
    run_reuse(job, loads, out)
    return {str(fraction): load.truth_mj for fraction, load in loads.items()}


@needs_driver
def test_energy_of_miss_partial_and_hit_is_what_the_device_used(tmp_path: Path) -> None:
    truth = play(known, tmp_path)
    measured = load_reuse(tmp_path / "reuse.json")
    assert [item.cell for item in measured.measurements].count("PARTIAL") == 2
    assert measured.idle_power_mw == 75_000
    fit = fit_reuse(measured)
    for fraction, values in truth.items():
        assert fit.prefill_mj(float(fraction)) == pytest.approx(sum(values) / len(values), rel=0.06)
    miss, hit = truth["0.0"], truth["1.0"]
    assert fit.saved == pytest.approx(1 - sum(hit) / sum(miss), abs=0.04)
    assert 0.3 < 1 - sum(hit) / sum(miss) < 0.8
    assert main(["reuse", "show", str(tmp_path / "reuse.json"), "--json"]) == 0


def _start(folder: Path, *options: str) -> subprocess.Popen[str]:
    driver = FakeDriver(folder / "driver")
    return subprocess.Popen(
        [sys.executable, "-m", "observatory", "reuse", "measure", "tiny-gqa", "--device", UUID, "--out",
         str(folder / "reuse.json"), "--torch-device", "cpu", *options],
        env=driver.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@needs_driver
def test_the_program_measures_a_model_and_shows_the_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = _start(
        tmp_path, "--prompt-tokens", "128", "--fractions", "0,0.5,1", "--repeats", "1", "--window-s", "1"
    )
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert main(["reuse", "show", str(tmp_path / "reuse.json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    cells = {cell["cell"]: cell for cell in document["reuse"]["cells"]}
    assert cells.keys() == {"MISS", "PARTIAL", "EXACT_HIT"}
    measured = load_reuse(tmp_path / "reuse.json")
    # Nothing makes the device busy: it draws its idle power all the time, whatever is prefilled.
    inside = 0
    for item in measured.measurements:
        assert item.energy_error is not None
        off = item.energy_mj / item.duration_s / 75_000 - 1
        assert abs(off) < 0.1, "of one second"
        inside += abs(off) < item.energy_error
    # A window of one second has ten updates; on a busy machine one of three may lie just outside.
    assert inside >= len(measured.measurements) - 1
    assert document["reuse"]["saved"] > 0  # a hit takes less time
    assert document["reuse"]["saved_reason_code"] == "measured once"


@needs_driver
def test_ctrl_c_keeps_the_windows_that_were_measured(tmp_path: Path) -> None:
    process = _start(tmp_path, "--prompt-tokens", "32", "--repeats", "500", "--window-s", "0.5")
    power = tmp_path / "reuse.run" / "power"
    deadline = time.monotonic() + 90
    while not list(power.glob("**/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 130, errors
    measured = load_reuse(tmp_path / "reuse.json")
    assert 1 <= len(measured.measurements) < 2500
    assert any("ended early" in note for note in measured.notes)


def test_a_prefill_behind_a_cached_prefix_gives_what_the_whole_prompt_gives() -> None:
    with cached_prefills(
        "tiny-mla", fractions=(0.0, 0.5, 1.0), prompt_tokens=64, batch_size=2, device="cpu", dtype=None
    ) as workloads:
        assert list(workloads) == [0.0, 0.5, 1.0]
        outputs = [workload._iterate() for workload in workloads.values() for _ in range(2)]  # type: ignore[attr-defined]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-3)


def test_a_model_whose_state_cannot_be_cut_back_is_refused() -> None:
    with (
        pytest.raises(ModelError, match=r"reuse of .* cannot be measured: .* cannot be cut back"),
        cached_prefills(
            "tiny-gdn", fractions=(0.0, 0.5), prompt_tokens=16, batch_size=1, device="cpu", dtype=None
        ),
    ):
        pass


@pytest.mark.parametrize("model", ["tiny-gqa", "tiny-mla", "tiny-mha", "tiny-mamba2", "tiny-gdn"])
def test_every_decode_step_of_a_clock_sweep_has_the_same_context(model: str) -> None:
    lengths: list[int] = []

    def note(_module: object, _args: object, options: dict[str, Any]) -> None:
        lengths.append(options["past_key_values"].get_seq_length())

    network = load_model(model, device="cpu").model.eval()
    with torch.inference_mode():
        iterate = _decode(network, torch.arange(34).view(2, 17))
        network.register_forward_pre_hook(note, with_kwargs=True)
        for _ in range(3):
            iterate()
    assert lengths == [16, 16, 16]


@pytest.mark.parametrize("text", ["", "0", "0,2", "-1,1", "0,nan", "0;1", "1,1", "0,1e-3", "x" * 1000])
def test_fractions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(EnergyError, match="--fractions"):
        parse_fractions(text, prompt_tokens=4096)


def test_fractions_are_read_in_order() -> None:
    assert parse_fractions("1,0,.5,0.25", prompt_tokens=4096) == (0.0, 0.25, 0.5, 1.0)


def test_a_power_device_that_is_not_the_models_is_refused_where_torch_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = f"replay:{write_recording(tmp_path / 'power.parquet')}"
    note = check_same_device(recorded, "cpu")
    assert note is not None
    assert "was not checked" in note
    monkeypatch.setattr("observatory.campaign.prefix_cache.gpu_uuid", lambda _device: RECORDED.upper())
    assert check_same_device(recorded, "cuda") is None
    monkeypatch.setattr("observatory.campaign.prefix_cache.gpu_uuid", lambda _device: UUID)
    with pytest.raises(DeviceError, match=f"is {RECORDED}, and the model on cuda computes on {UUID}"):
        check_same_device(recorded, "cuda")


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "cuda:x"])
def test_a_torch_device_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(ModelError, match=r"torch has no device .* expected cpu, cuda or cuda:N"):
        gpu_uuid(name)
    assert gpu_uuid("cpu") is None
