"""The last lines of a command: worst place, cost and next step, or that nothing is worth changing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observatory.advice.conclusions import (
    Code,
    Conclusion,
    conclude_bench,
    conclude_clocks,
    conclude_energy,
    conclude_exchanges,
    conclude_experts,
    conclude_fit,
    conclude_replay,
    conclude_reuse,
    conclude_routing,
    conclude_scan,
    conclude_sweep,
)
from observatory.advice.words import _SENTENCES, conclusion_sentences
from observatory.analysis.network.layouts import ScanRequest, scan_document
from observatory.analysis.routing.document import routing_document
from observatory.cli import main
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec
from tests.conftest import MakeRun

RUN = Path("runs/a b")


def codes(conclusion: Conclusion) -> list[Code]:
    assert 1 <= len(conclusion) <= 3
    assert all(conclusion_sentences(conclusion))
    return [Code(reason.code) for reason in conclusion]


def run_of_loads(folder: Path, load_SLE: np.ndarray[Any, Any]) -> Path:
    """A run of top-1 routing with these loads."""
    steps, layers, experts = load_SLE.shape
    specs = tuple(MoeLayerSpec(layer=i, module=f"m.{i}", experts=experts, top_k=1) for i in range(layers))
    manifest = Manifest(run_id="made", created_unix_s=1.0, model=ModelSpec(name="made", moe_layers=specs))
    with RunWriter.create(folder, manifest) as writer:
        for layer in range(layers):
            writer.append(
                "routing",
                routing_rows(
                    step_N=np.arange(steps),
                    phase_N="prefill",
                    layer_N=np.full(steps, layer),
                    source_rank=0,
                    tokens_N=load_SLE[:, layer].sum(axis=1),
                    load_NE=load_SLE[:, layer],
                ),
            )
    return folder


def test_every_code_has_a_sentence() -> None:
    assert set(_SENTENCES) == set(Code)


def test_uniform_routing_is_not_worth_changing(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    load_SLE = generator.multinomial(256, [1 / 8] * 8, size=(40, 3))
    run = open_run(run_of_loads(tmp_path / "run", load_SLE))
    assert codes(conclude_routing(routing_document(run, bootstrap=200, seed=0), RUN)) == [Code.NOTHING]
    scanned = scan_document(run, ScanRequest(ep=(2, 4), gpus_per_node=4, placements=("linear",)))
    assert codes(conclude_scan(scanned, RUN)) == [Code.NOTHING]


def test_the_layer_that_is_most_unbalanced_beyond_chance_is_named_with_its_cost(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    load_SLE = generator.multinomial(256, [1 / 8] * 8, size=(40, 3))
    load_SLE[:, 1] = generator.multinomial(256, [0.3, *[0.1] * 7], size=40)
    run = open_run(run_of_loads(tmp_path / "run", load_SLE))
    worst, cost, step = conclude_routing(routing_document(run, bootstrap=200, seed=0), RUN)
    assert (worst.code, worst.values["layer"]) == (Code.BUSIEST_EXPERT, 1)
    assert cost.values["max_over_mean"] == pytest.approx(0.3 * 8, rel=0.05)
    assert step.values["command"] == "observatory scan 'runs/a b'"
    scanned = scan_document(run, ScanRequest(ep=(2, 4), gpus_per_node=4, placements=("linear",)))
    worst, cost, step = conclude_scan(scanned, RUN)
    assert step.values["command"] == "observatory place 'runs/a b' --ranks 4 --out placement.json"
    assert (worst.values["layer"], worst.values["ep"]) == (1, 4)
    assert cost.values["max_over_mean"] == pytest.approx(0.4 * 4, rel=0.05)


def test_a_run_of_two_steps_is_called_too_short(make_run: MakeRun) -> None:
    document = routing_document(open_run(make_run(steps=2)), bootstrap=200, seed=0)
    assert codes(conclude_routing(document, RUN)) == [Code.TOO_FEW_STEPS, Code.MORE_STEPS]


def test_layouts_are_only_slower_where_predicted_times_are_apart() -> None:
    row = {
        "phase": "decode", "first_ep": 4, "first_placement": "linear", "second_ep": 8,
        "second_placement": "linear", "first_us": 3000.0, "second_us": 2000.0, "ratio": 1.5,
        "code": "within_error",
    }  # fmt: skip
    assert codes(conclude_scan({"comparisons": [row], "rows": []}, RUN)) == [Code.NOTHING]
    worst, step = conclude_scan({"comparisons": [{**row, "code": "apart"}], "rows": []}, RUN)
    assert (worst.values["slower_ep"], worst.values["better_ep"], worst.values["extra_ms"]) == (4, 8, 1.0)
    assert step.values["command"] == "observatory replay 'runs/a b' --ep 8 --out replay.json"


def waits(**values: object) -> dict[str, Any]:
    layer = {
        "layer": 2, "phase": "prefill", "role": "combine", "rows": 40, "rows_unknown": 0, "wait_s": 0.4,
        "duration_s": 1.0, "unknown_s": 0.0, "slowest_rank": 1, "slowest_share": 0.75,
        "slowest_cause": "compute load",
    }  # fmt: skip
    return {"short_of_cores": [], "layers": [{**layer, **values}, {**layer, "layer": 3, "wait_s": 0.0}]}


def test_the_layer_with_most_waiting_is_named_unless_ranks_lacked_cores() -> None:
    worst, cost, step = conclude_exchanges(waits(), RUN)
    assert (worst.values["layer"], worst.values["slowest_rank"]) == (2, 1)
    assert (cost.values["wait_share"], cost.values["wait_ms"]) == (0.2, 10.0)
    assert step.values["command"] == "observatory scan 'runs/a b'"
    assert conclusion_sentences((cost,))[0].endswith("10 ms in each combine of layer 2 in prefill")
    assert "mostly for rank 1 (75 % of it; it computed longer)" in conclusion_sentences((worst,))[0]
    assert codes(conclude_exchanges(waits(wait_s=0.01), RUN)) == [Code.NOTHING]
    crowded = {**waits(), "short_of_cores": [{"ranks": 4}]}
    assert codes(conclude_exchanges(crowded, RUN)) == [Code.SHORT_OF_CORES, Code.MORE_CORES]
    unknown = {**waits(), "layers": [{**waits()["layers"][0], "wait_s": None}]}
    assert codes(conclude_exchanges(unknown, RUN)) == [Code.WAIT_UNKNOWN, Code.RUN_COMMAND]


def test_the_phase_with_most_energy_is_named_or_that_none_is_known() -> None:
    phase = {
        "phase": "decode", "span": None, "source_rank": 0, "device_uuid": "GPU-1", "energy_mj": 3e3,
        "energy_low_mj": 2.9e3, "energy_high_mj": 3.1e3, "energy_flag": None,
    }  # fmt: skip
    token = {"phase": "decode", "mj_per_token": 5.0, "mj_per_token_low": 4.8, "mj_per_token_high": 5.2}
    document = {
        "phases": [phase, {**phase, "phase": "prefill", "energy_mj": 1e3}],
        "tokens": [token],
        "totals": [],
        "devices": [{"energy_mj": 12e3}],
    }
    worst, cost, _ = conclude_energy(document, RUN)
    assert (worst.values["phase"], worst.values["share"]) == ("decode", 0.75)
    assert conclusion_sentences((worst,)) == ["most energy: decode on rank 0, 75 % of it"]
    partly = {**document, "phases": [phase, {**phase, "phase": "prefill", "energy_mj": None}]}
    (sentence,) = conclusion_sentences(conclude_energy(partly, RUN)[:1])
    assert sentence.startswith("most energy of the phases whose energy is known: decode on rank 0, 100 %")
    assert sentence.endswith("75 % of the energy of the devices is attributed to no phase")
    assert conclusion_sentences((cost,)) == ["that is 3 J (2.9 to 3.1), 5 mJ per token (4.8 to 5.2)"]
    nothing = {**document, "phases": [{**phase, "energy_mj": None}]}
    assert codes(conclude_energy(nothing, RUN)) == [Code.ENERGY_UNKNOWN, Code.RUN_COMMAND]


def test_a_clock_is_only_named_where_the_advice_is_to_lock() -> None:
    choice = {
        "sm_clock_mhz": 1200.0,
        "saving": {"value": 0.2, "low": 0.15, "high": 0.25},
        "slowdown": {"value": 0.01, "low": 0.0, "high": 0.02},
    }
    series = {"verdict": "lock", "title": "decode", "reference_mhz": 1980.0, "choice": choice}
    assert codes(conclude_clocks({"series": [series]})) == [
        Code.CLOCK_TOO_HIGH, Code.CLOCK_COST, Code.LOCK_CLOCK,
    ]  # fmt: skip
    assert codes(conclude_clocks({"series": [{**series, "verdict": "leave unlocked"}]})) == [Code.NOTHING]
    common = {"sm_clock_mhz": 1305.0, "saving": {"value": 0.1, "low": 0.08, "high": 0.12}}
    *_, cost, step = conclude_clocks({"series": [series, series], "common": common})
    assert (cost.code, step.values["sm_clock_mhz"]) == (Code.COMMON_COST, 1305.0)
    nothing = {"sm_clock_mhz": None, "saving": None}
    assert codes(conclude_clocks({"series": [series, series], "common": nothing})) == [
        Code.CLOCK_TOO_HIGH, Code.NO_COMMON_CLOCK,
    ]  # fmt: skip
    device = {"device_uuid": "GPU-1", "phase": None, "cap": "binds", "power_cap_busy_share": 0.5}
    assert codes(conclude_clocks({"telemetry": {"devices": [device]}}))[0] == Code.HELD_BY_CAP
    device = {**device, "cap": "does not bind"}
    found = codes(conclude_clocks({"telemetry": {"devices": [device]}}))
    assert found == [Code.CLOCK_UNKNOWN, Code.RUN_COMMAND]


def test_clocks_without_energies_are_not_called_right() -> None:
    series = {"verdict": "no energy", "title": "decode"}
    assert codes(conclude_clocks({"series": [series]})) == [Code.CLOCK_UNKNOWN, Code.RUN_COMMAND]


def sweep_of(*energies_mj: float, error: float = 0.01, **series: object) -> dict[str, Any]:
    """Two windows of each setting: unlocked, then one clock lower each; of one iteration, which takes 1 s."""
    points = [
        {
            "label": "ok", "energy_mj": energy_mj, "energy_error": error, "iterations": 2,
            "duration_s": 2.0 + index,
            "requested_sm_clock_mhz": None if index == 0 else 1500.0 - index, "requested_limit_mw": None,
        }
        for index, energy_mj in enumerate(energies_mj)
        for _ in range(2)
    ]  # fmt: skip
    return {"set_outside": False, "series": [{"name": "decode", "points": points, **series}]}


def test_the_setting_of_least_energy_is_named_beyond_the_errors() -> None:
    worst, cost, step = conclude_sweep(sweep_of(100.0, 90.0, 80.0), RUN)
    assert worst.values["requested_sm_clock_mhz"] == 1498.0
    assert cost.values == {"saving": pytest.approx(0.2), "slowdown": 1.0}
    assert conclusion_sentences((worst, cost)) == [
        "least energy: decode, locked to 1498 MHz",
        "that saves 20 % of the energy of an iteration for 100 % more time",
    ]
    assert step.values["command"] == "observatory clocks fit 'runs/a b' --out clocks.json"
    assert codes(conclude_sweep(sweep_of(100.0, 80.0, error=0.2), RUN)) == [Code.NOTHING, Code.RUN_COMMAND]
    outside = {**sweep_of(100.0), "set_outside": True}
    assert codes(conclude_sweep(outside, RUN)) == [Code.ONE_SETTING, Code.RUN_COMMAND]


def test_a_cached_prompt_saves_only_what_its_interval_shows() -> None:
    cells = [{"cached_fraction": 1.0, "prefill_mj": 10.0}, {"cached_fraction": 0.0, "prefill_mj": 4e4}]
    curve = {"cells": cells, "saved": 0.6, "saved_low": 0.55, "saved_high": 0.65}
    document = {"model": "m", "prompt_tokens": 4096, "reuse": curve}
    worst, cost, step = conclude_reuse(document, RUN)
    assert conclusion_sentences((worst, cost)) == [
        "most energy: a prompt of 4096 tokens with 0 % cached, 40 J",
        "an exact hit saves 60 % (55 % to 65 %) of the energy of a miss",
    ]
    assert step.values["command"] == "observatory energy RUN --reuse 'runs/a b'"
    assert codes(conclude_reuse({**document, "reuse": {**curve, "saved_low": -0.1}}, RUN)) == [Code.NOTHING]
    unknown = {**document, "reuse": {**curve, "saved_low": None}}
    assert codes(conclude_reuse(unknown, RUN)) == [Code.REUSE_UNKNOWN, Code.MORE_REPEATS]


def test_a_benchmark_is_judged_by_its_bytes_first_then_by_its_noise() -> None:
    case = {
        "algorithm": "flat", "pattern": "uniform", "mean_send_bytes": 1024, "median_us": 10.0, "p90_us": 11.0,
        "correct": True,
    }  # fmt: skip
    quiet = {"short_of_cores": [], "rows": [case]}
    assert codes(conclude_bench(quiet, Path("b.json"))) == [Code.NOTHING, Code.RUN_COMMAND]
    noisy = {**quiet, "rows": [case, {**case, "p90_us": 20.0}]}
    assert codes(conclude_bench(noisy, RUN)) == [Code.NOISY_CASE, Code.NOISE_COST, Code.MORE_REPEATS]
    wrong = {**noisy, "rows": [{**case, "correct": False}]}
    assert codes(conclude_bench(wrong, RUN)) == [Code.WRONG_BYTES, Code.CHECK_FABRIC]


def test_realism_costs_nothing_within_its_interval() -> None:
    row = {
        "algorithm": "flat", "phase": "prefill", "layer": 1, "role": "dispatch", "ratio": 1.3,
        "ratio_low": 1.2, "ratio_high": 1.4, "extra_us": 30.0,
    }  # fmt: skip
    document = {"short_of_cores": [], "rows": [row]}
    assert codes(conclude_replay(document, RUN))[:2] == [Code.DEAREST_REALISM, Code.REALISM_COST]
    document = {"short_of_cores": [], "rows": [{**row, "ratio_low": 0.9}]}
    assert codes(conclude_replay(document, RUN)) == [Code.NOTHING]


def test_a_model_that_is_not_valid_is_named() -> None:
    verdict = {"code": "too_noisy", "median_error": 0.3, "p90_error": 0.9}
    document = {"short_of_cores": [], "fits": [{"algorithm": "flat", "verdict": verdict}]}
    assert codes(conclude_fit(document, RUN)) == [Code.UNRELIABLE_FIT, Code.FIT_COST, Code.MORE_REPEATS]
    document["fits"] = [{"algorithm": "flat", "verdict": {**verdict, "code": "valid"}}]
    assert codes(conclude_fit(document, RUN)) == [Code.NOTHING, Code.RUN_COMMAND]


def test_commands_end_with_it_and_json_has_its_codes_and_csv_has_none(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run(steps=40))
    for command in ("routing", "scan"):
        assert main([command, run]) == 0
        *_, last = capsys.readouterr().out.splitlines()
        assert last.startswith(("next: observatory ", "nothing here is worth changing"))
        assert main([command, run, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["conclusion"]
        assert {reason["code"] for reason in found} <= set(Code)
        assert main([command, run, "--csv"]) == 0
        assert "next:" not in capsys.readouterr().out


def test_experts_conclude_from_where_on_rows_count() -> None:
    document = {
        "p90_error": 0.1,
        "median_error": 0.05,
        "even_rows": 512.4,
        "experts_here": 8,
        "coefficients": [
            {"term": "call", "us_per_unit": 300.0},
            {"term": "activated expert", "us_per_unit": 20.0},
            {"term": "row", "us_per_unit": 0.5},
        ],
    }
    below, each, _ = conclude_experts(document, RUN)
    assert (below.code, below.values["assignments"]) == (Code.EXPERTS_BELOW, 512)
    assert (each.code, each.values["rows"]) == (Code.EXPERTS_PER_EXPERT, 40)
    assert codes(conclude_experts({**document, "even_rows": None}, RUN)) == [
        Code.NOTHING,
        Code.RUN_COMMAND,
    ]
    assert codes(conclude_experts({**document, "p90_error": 0.9}, RUN)) == [
        Code.EXPERTS_UNSURE,
        Code.MORE_REPEATS,
    ]
