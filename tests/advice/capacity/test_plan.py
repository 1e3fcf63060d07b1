"""Plans with answers that can be worked out by hand, and set-ups that were published."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from observatory.advice.capacity.make import Request, make_plan
from observatory.advice.capacity.plan import Planner
from observatory.advice.capacity.power import token_energy
from observatory.advice.capacity.site import Site, load_prices, load_site
from observatory.advice.capacity.targets import Targets
from observatory.advice.conclusions import conclude_plan
from observatory.advice.frequency import recommend_clocks
from observatory.advice.words import conclusion_sentences
from observatory.analysis.capacity.loads import BalancedLoads
from observatory.analysis.capacity.model_shape import model_shape
from observatory.analysis.capacity.power import PhasePower, measured_power
from observatory.analysis.capacity.routed import Routed
from observatory.analysis.capacity.serving import Server
from observatory.analysis.capacity.step import CAPTURED, Parallel, Work, captured_size
from observatory.analysis.frequency.model_file import load_clock_model
from observatory.analysis.frequency.views import ClockChoice
from observatory.analysis.hardware import load_profile
from observatory.analysis.statistics import Interval
from observatory.cli import main
from observatory.errors import BatchError, PlanError
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec
from tests.advice.clocks import model_of
from tests.analysis.capacity.configs import DEEPSEEK_V3, DEEPSEEK_V32, GPT_OSS_120B, QWEN3_30B
from tests.analysis.energy.test_rank_energy import two_ranks

SKEWED = {**QWEN3_30B, "num_hidden_layers": 12, "max_position_embeddings": 4000}


def balanced(config) -> Routed:
    model = model_shape(config)
    loads = BalancedLoads(model.moe_layers, model.moe.experts, model.moe.top_k)
    return Routed(loads, loads, chosen_on_LE=None, layers=model.moe_layers, experts=model.moe.experts)


def request(config=QWEN3_30B, *, hardware=("h200-sxm",), modes=("together", "apart"), site=None, **targets):
    wanted = {"tokens_per_s": 20_000, "context": 4096, "output": 512, **targets}
    return Request(
        model=model_shape(config),
        runs=[],
        targets=Targets(**wanted),
        hardware=hardware,
        modes=modes,
        site=site or Site(),
        routing="balanced",
    )


@pytest.mark.parametrize(
    ("config", "device", "ranks", "work", "overlap", "measured"),
    [
        # InferSim's README at f2293da: measured tokens per second and GPU of balanced routing.
        (DEEPSEEK_V3, "h800", 32, Work(decode=0, context=0, prefill=16384, prompt=4096), True, 7839),
        (DEEPSEEK_V3, "h800", 128, Work(decode=128, context=4096), True, 2324),
        (QWEN3_30B, "h20", 4, Work(decode=100, context=5120), False, 2749),
        (QWEN3_30B, "h20", 4, Work(decode=0, context=0, prefill=16384, prompt=4096), False, 16594),
    ],
)
def test_published_throughputs_are_near(config, device, ranks, work, overlap, measured):
    model = model_shape(config)
    server = Server(model, load_profile(device), overlap=overlap)
    parallel = Parallel(ranks=ranks, tp=1, slots=model.moe.experts // ranks, gpus_per_node=8)
    per_s_3 = work.tokens / server.step(parallel, work, balanced(config)).s_3
    fast, likely, slow = per_s_3
    assert slow < likely < fast
    assert measured == pytest.approx(likely, rel=0.5)


def test_weights_are_read_once_a_step_at_batch_one():
    """One sequence reads every weight that it passes once: the likely time is bytes over bandwidth."""
    model = model_shape(QWEN3_30B)
    server = Server(model, load_profile("h200-sxm"))
    alone = Parallel(ranks=1, tp=1, slots=128, gpus_per_node=8)
    step = server.step(alone, Work(decode=1, context=0), balanced(QWEN3_30B))
    parts = {part.name: part.s_3[1] for part in step.parts}
    read = sum(parts[name] for name in ("mixers", "dense", "experts", "head"))
    assert read == pytest.approx(model.active_values * 2 / 3840e9, rel=1e-6)


def test_the_fewest_devices_come_first_and_meet_every_target():
    document = make_plan(request(max_ms_per_token=30.0, max_ttft_ms=2000.0))
    rows = document["candidates"]
    assert rows
    assert [row["gpus"] for row in rows] == sorted(row["gpus"] for row in rows)
    for row in rows:
        assert row["tokens_per_s"] >= 20_000
        assert row["ms_per_token"] <= 30.0
        assert row["ttft_ms"] <= 2000.0
        assert row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
        assert row["gpus_low"] <= row["gpus"] <= row["gpus_high"]
        used = sum(value for name, value in row["memory_gb"].items() if name != "usable")
        assert used <= row["memory_gb"]["usable"]
        assert sum(row["grades"].values()) == pytest.approx(1.0)
    assert {row["code"] for row in document["conclusion"]} >= {"plan", "plan_times", "plan_assumed"}


def test_a_limit_inside_of_the_interval_is_stated():
    generous = make_plan(request(max_ms_per_token=1e3, max_ttft_ms=1e6))
    best = generous["candidates"][0]
    assert "plan_may_miss" not in {row["code"] for row in generous["conclusion"]}
    limit = (best["ms_per_token"] + best["ms_per_token_high"]) / 2
    document = make_plan(request(max_ms_per_token=limit))
    best = document["candidates"][0]
    assert best["ms_per_token"] <= limit < best["ms_per_token_high"]
    (missed,) = [row for row in document["conclusion"] if row["code"] == "plan_may_miss"]
    assert missed["ms_per_token"] == [best["ms_per_token_high"], limit]
    assert "ttft_ms" not in missed


@pytest.mark.slow
def test_more_tokens_never_need_fewer_devices():
    needed = [
        make_plan(request(SKEWED, tokens_per_s=rate, max_ms_per_token=10.0))["candidates"][0]["gpus"]
        for rate in (2_000, 20_000, 200_000)
    ]
    assert needed == sorted(needed)
    assert needed[0] < needed[-1]


def test_a_target_that_nothing_meets_is_never_relaxed():
    document = make_plan(request(max_ms_per_token=0.5))
    assert document["candidates"] == []
    assert {row["reason"]["code"] for row in document["rejected"]} == {"ms_per_token"}
    codes = [reason["code"] for reason in document["conclusion"]]
    assert codes == ["no_plan", "nearest_plan"]


def test_weights_that_do_not_fit_are_named():
    document = make_plan(request(DEEPSEEK_V3, hardware=("a100-pcie",), tokens_per_s=100))
    refused = [row for row in document["rejected"] if row["reason"]["code"] == "weights_do_not_fit"]
    assert refused
    assert all(row["reason"]["needed_gb"] > row["reason"]["usable_gb"] for row in refused)
    assert {row["ranks"] for row in refused} >= {1, 2, 4, 8}


def test_a_profile_without_links_serves_single_devices_only():
    document = make_plan(request(hardware=("mi300x",), modes=("apart",)))
    assert {row["ranks"] for row in document["candidates"]} == {1}
    assert "no_figure" in {row["reason"]["code"] for row in document["rejected"]}
    stated = make_plan(request(hardware=("mi300x",), site=Site(link_bandwidth=350.0, gpus_per_node=8)))
    assert {row["ranks"] for row in stated["candidates"]} >= {1, 2, 4, 8}


def test_a_batch_is_padded_to_a_captured_size():
    assert [captured_size(size) for size in (1, 3, 9, 250, 257, 600)] == [1, 4, 16, 256, 272, 600]


def test_the_command(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B))
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "EUR"\n[gpu_hour]\nh200-sxm = 3.0\n')
    site = tmp_path / "site.toml"
    site.write_text("[hardware]\ngpus_per_node = 4\ngpus_per_rack = 32\nnic_bandwidth = 25\n")
    argv = ["plan", str(path), "--target-tokens-per-s", "20000", "--context", "4096", "--output", "512"]
    argv += ["--hardware", "h200-sxm", "--price", str(prices), "--site", str(site)]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    best = document["candidates"][0]
    assert best["per_million"] == pytest.approx(3.0 * best["gpus"] / best["tokens_per_s"] / 3600 * 1e6)
    assert best["currency"] == "EUR"
    assert document["routing"] == "power-law"
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "plan: " in printed
    assert "per million tokens EUR" in " ".join(printed.split())
    prices.write_text('currency = "EUR"\n[gpu_hour]\nh200-sxm = 3.0\nh20 = 0.1\n')
    assert main([*argv, "--hardware", "h20", "--max-ms-per-token", "12"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"cheapest: \d+ devices?, h20: .* EUR for a million generated tokens", printed)
    assert "slow end of these intervals misses a target: " in printed
    assert " ms per token, 12 wanted" in printed
    prices.write_text('currency = "EUR"\n[gpu_hour]\nh100-sxm = 3.0\n')
    assert main(argv) == 1
    assert "no price of h200-sxm" in capsys.readouterr().err
    prices.write_text('currency = "EUR"\n[gpu_hour]\nh200-sxm = 3.0\n')
    assert main([*argv, "--max-ms-per-token", "0.01"]) == 2
    assert "no set-up meets the targets" in capsys.readouterr().out
    assert main([*argv, "--max-ms-per-token", "0.01", "--csv"]) == 2
    assert capsys.readouterr().out.startswith("gpus,hardware,set_up,")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--hardware", "h9000"], "does not exist"),
        (["--mode", "odd"], "--mode 'odd'"),
        (["--dtype", "int3"], "--dtype 'int3'"),
        (["--dtype", "float32"], "no rate for float32"),
        (["--routing", "odd"], "--routing 'odd'"),
        (["--routing", "captured"], "captured routing needs a run"),
        (["--site", "missing.toml"], "site file missing.toml cannot be read"),
        (["--price", "missing.toml"], "price list missing.toml"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B))
    argv = ["plan", str(path), "--target-tokens-per-s", "100", "--context", "64", "--output", "64"]
    argv += [] if change[0] == "--hardware" else ["--hardware", "h200-sxm"]
    assert main([*argv, *change]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "content",
    ["gpus_per_node = 0", "nic_bandwidth = -1", "nic_bandwidth = 1e-300", "rack_power = 1000", "odd = 1"],
)
def test_hostile_figures_of_a_site_are_refused(tmp_path, content):
    path = tmp_path / "site.toml"
    path.write_text(f"[hardware]\n{content}")
    with pytest.raises(PlanError, match=r"\[hardware\] of site file"):
        load_site(path)


@pytest.mark.parametrize("content", ["gpus_per_node = 4", "x", "\x00", "currency = 1"])
def test_hostile_site_files_and_prices_are_refused(tmp_path, content):
    path = tmp_path / "site.toml"
    path.write_text(content)
    with pytest.raises(BatchError, match="is not valid"):
        load_site(path)
    with pytest.raises(PlanError, match="is not valid"):
        load_prices(path)


def test_a_hot_expert_costs_devices():
    """All tokens at one expert: its rank is the whole step, and the plan under balance is too small."""
    model = model_shape(QWEN3_30B)
    server = Server(model, load_profile("h200-sxm"))
    parallel = Parallel(ranks=8, tp=1, slots=16, gpus_per_node=8)

    class Hot:
        kind = "captured"

        def draw(self, tokens, draws, generator):
            del generator
            load = np.zeros((draws, model.moe_layers, 128), dtype=np.int64)
            load[:, :, :8] = tokens
            return load

    hot = Routed(Hot(), Hot(), chosen_on_LE=None, layers=model.moe_layers, experts=128)
    work = Work(decode=0, context=0, prefill=8192, prompt=4096)
    times = {
        name: {part.name: part.s_3[1] for part in server.step(parallel, work, routed).parts}
        for name, routed in (("even", balanced(QWEN3_30B)), ("hot", hot))
    }
    assert times["hot"]["experts"] == pytest.approx(8 * times["even"]["experts"], rel=0.05)


def skewed_run(folder, *, phases=("decode", "prefill"), hot=8):
    """The first ``hot`` experts get half of the assignments."""
    manifest = Manifest(
        run_id="skewed",
        created_unix_s=1.0,
        model=ModelSpec(
            name="m",
            hidden_size=2048,
            dtype="bfloat16",
            config=SKEWED,
            moe_layers=tuple(
                MoeLayerSpec(layer=at, module=f"m.{at}", experts=128, top_k=8) for at in range(12)
            ),
        ),
    )
    share_E = np.full(128, 0.5 / (128 - hot))
    share_E[:hot] = 0.5 / hot
    generator = np.random.default_rng(0)
    with RunWriter.create(folder, manifest) as writer:
        for first, phase in enumerate(phases):
            for layer in range(12):
                rows = routing_rows(
                    step_N=np.arange(8) + 8 * first,
                    phase_N=phase,
                    layer_N=np.full(8, layer),
                    source_rank=0,
                    tokens_N=np.full(8, 2048),
                    load_NE=generator.multinomial(2048 * 8, share_E, size=8),
                )
                writer.append("routing", rows)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["captured", "balanced"])
def test_what_the_usual_assumption_costs(tmp_path, routing):
    """With hot experts a plan is its own measure, and balance promises prompts faster than they come."""
    run = open_run(skewed_run(tmp_path / "run"))
    wanted = request(SKEWED, hardware=("l40s",), context=3000, output=500, max_ttft_ms=900.0)
    document = make_plan(replace(wanted, runs=[run], routing=routing))
    rows = {row["routing"]: row for row in document["assumptions"]}
    assert rows["captured"]["gpus_with_captured"] == rows["captured"]["gpus"]
    assert rows["balanced"]["gpus_with_captured"] >= rows["balanced"]["gpus"]
    best = document["candidates"][0]
    if routing == "captured":
        assert best["ms_per_token"] == pytest.approx(rows["captured"]["ms_per_token_with_captured"])
        assert best["ttft_ms"] == pytest.approx(rows["captured"]["ttft_ms_with_captured"])
    assert document["sources"]["phases"] == ["decode", "prefill"]


def test_the_cost_of_an_assumption_follows_the_set_up():
    document = make_plan(request())
    assert [row["routing"] for row in document["assumptions"]] == ["balanced", "power-law"]
    assert document["conclusion"][1]["code"] == "plan_uncaptured"
    balanced_row = {
        **document["assumptions"][0],
        "gpus": 6,
        "gpus_with_captured": 9,
        "ms_per_token_with_captured": 41.0,
        "ttft_ms_with_captured": 100.0,
    }
    document |= {
        "routing": "captured",
        "assumptions": [balanced_row],
        "sources": {"runs": ["r"], "phases": ["decode"], "hardware": []},
        "targets": {**document["targets"], "max_ms_per_token": 40.0},
    }
    document["candidates"][0]["gpus"] = 8
    reason = conclude_plan(document)[1]
    assert (reason.code, reason.values) == (
        "plan_routing",
        {
            "routing": "balanced",
            "gpus": 6,
            "needed": 9,
            "planned": 8,
            "ms_per_token": 41.0,
            "ttft_ms": None,
        },
    )
    assert "plan_phase" in {reason.code for reason in conclude_plan(document)}
    balanced_row |= {"gpus": 8, "gpus_with_captured": 8, "ms_per_token_with_captured": 20.0}
    document["assumptions"] = [balanced_row]
    assert conclude_plan(document)[1].code == "plan_routing_same"
    nothing = conclude_plan({**document, "candidates": [], "rejected": [], "rejected_by": []})
    assert [(reason.code, reason.values.get("planned")) for reason in nothing][1] == ("plan_routing", None)


def test_what_a_run_does_not_cover_is_stated(tmp_path):
    run = open_run(skewed_run(tmp_path / "run", phases=("prefill",)))
    document = make_plan(replace(request(SKEWED, context=3990, output=20), runs=[run], routing=None))
    reasons = [dict(reason) for reason in document["conclusion"]]
    assert {"code": "plan_phase", "missing": "decode", "phase": "prefill"} in reasons
    assert {"code": "plan_too_long", "tokens": 4010, "longest": 4000} in reasons


def test_runs_of_another_model_with_as_many_experts_are_refused(tmp_path):
    run = open_run(skewed_run(tmp_path / "run"))
    other = {**SKEWED, "num_key_value_heads": 2 * SKEWED["num_key_value_heads"]}
    with pytest.raises(PlanError, match="whose layers are not those of the model"):
        make_plan(replace(request(other), runs=[run], routing=None))


def test_short_prompts_share_a_chunk():
    """Each of B sequences brings 64 for 64 generated tokens: B prompt tokens a step, in whole prompts."""
    document = make_plan(request(SKEWED, context=64, output=64, modes=("together",), tokens_per_s=100))
    chunks = {row["sequences"]: row["prefill_chunk"] for row in document["candidates"]}
    assert (chunks[1], chunks[64], chunks[96], chunks[512]) == (64, 64, 128, 512)


def test_short_prompts_are_not_kept_for_a_full_chunk():
    """A limit that a full chunk misses is met by steps of one prompt each."""
    hasty = make_plan(request(SKEWED, context=512, output=512, modes=("apart",), max_ttft_ms=30.0))[
        "candidates"
    ]
    patient = make_plan(request(SKEWED, context=512, output=512, modes=("apart",)))["candidates"]
    assert {row["prefill_chunk"] for row in hasty} == {512}
    assert hasty[0]["gpus"] >= patient[0]["gpus"]


@pytest.mark.slow
def test_looser_limits_never_need_more_devices():
    for name, limits in (("max_ms_per_token", (4.5, 6, 8, 30)), ("max_ttft_ms", (30, 45, 100, 2000))):
        plans = [make_plan(request(SKEWED, modes=("apart",), **{name: limit})) for limit in limits]
        needed = [plan["candidates"][0]["gpus"] for plan in plans if plan["candidates"]]
        assert len(needed) > 2
        assert needed == sorted(needed, reverse=True)


def test_the_largest_batch_that_the_cache_allows_is_tried():
    rows = make_plan(request(modes=("apart",), hardware=("l40s",), tokens_per_s=100))["candidates"]
    most = max((row for row in rows if (row["ranks"], row["tp"]) == (4, 1)), key=lambda row: row["sequences"])
    memory = most["memory_gb"]
    room = memory["usable"] - sum(memory[use] for use in ("weights", "experts", "workspace", "program"))
    fits = room / (memory["cache"] / most["sequences"])
    assert most["sequences"] == max(size for size in CAPTURED if size <= fits)
    assert most["limit"] == "cache"


def test_racks_get_no_more_power_than_they_have():
    """H200s of 700 W, eight a rack: 5000 W are enough for seven, or for 625 W each."""
    site = Site(gpus_per_rack=8, rack_power=5000)
    document = make_plan(request(SKEWED, modes=("together",), site=site, tokens_per_s=400_000))
    assert all(row["gpus"] < 8 for row in document["candidates"])
    reasons = [row["reason"] for row in document["rejected"]]
    assert reasons
    assert {row["code"] for row in reasons} == {"rack_power"}
    full = next(row for row in reasons if row["devices"] == 8)
    assert (full["drawn_w"], full["fit"], full["each_w"]) == (5600, 7, 625)
    enough = Site(gpus_per_rack=8, rack_power=5000, power_limit=625)
    assert make_plan(request(SKEWED, modes=("together",), site=enough, tokens_per_s=400_000))["candidates"]


def test_a_lock_slows_decode_and_saves_its_energy():
    clock = ClockChoice(
        sm_clock_mhz=1200.0,
        slowdown=Interval(value=0.02, low=0.01, high=0.03),
        saving=Interval(value=0.2, low=0.1, high=0.3),
    )
    model = model_shape(SKEWED)
    servers = {"h200-sxm": Server(model, load_profile("h200-sxm"))}
    targets = Targets(tokens_per_s=1000, context=4096, output=512)
    planner = Planner(servers, balanced(SKEWED), targets, ("apart", "together"))
    free = {(one.mode, one.parallel, one.sequences): one for one in planner.search().candidates}
    planner.clocks = ((64, clock), (1, None))
    for one in planner.search().candidates:
        unlocked = free[one.mode, one.parallel, one.sequences]
        factor = np.ones(3)
        if one.mode == "apart" and one.sequences >= 8:
            factor = np.array([1.01, 1.02, 1.03])
            each = 700 / float(one.tokens_per_s_3[1])
            decode, prompts = (
                0.9 * one.instances * one.parallel.ranks,
                one.gpus - one.instances * one.parallel.ranks,
            )
            if (one.instances, one.gpus) == (unlocked.instances, unlocked.gpus):
                assert one.joules_per_token_most == pytest.approx(each * (decode / 1.02 + prompts))
        assert one.ms_per_token_3 == pytest.approx(unlocked.ms_per_token_3 * factor)


def test_clocks_of_a_device(tmp_path):
    path = tmp_path / "clocks.json"
    path.write_text(model_of("memory-bound").model_dump_json())
    wanted = replace(request(SKEWED, modes=("apart",)), clocks=path)
    advice = recommend_clocks(load_clock_model(path)).series[0]
    clocks = {row["clock"] for row in make_plan(wanted)["candidates"]}
    assert clocks == {f"decode at {advice.choice.sm_clock_mhz:.0f} MHz" if advice.choice else "unlocked"}
    with pytest.raises(PlanError, match="one device"):
        make_plan(replace(wanted, hardware=("h200-sxm", "h20")))


@pytest.mark.slow
def test_redundant_experts_are_in_the_name_of_a_set_up(tmp_path):
    run = open_run(skewed_run(tmp_path / "run", hot=1))
    document = make_plan(
        replace(request(SKEWED, modes=("together",), tokens_per_s=2e5), runs=[run], routing=None)
    )
    rows = [row for row in document["candidates"] if row["slots"] > 128 // row["ranks"]]
    assert rows
    assert all(row["set_up"].endswith(f"/r {row['ranks']}") for row in rows)


def test_windows_keep_no_more_than_the_sequence():
    """gpt-oss: 18 layers keep all tokens, 18 keep 128, of 2 x 8 x 64 values each."""
    server = Server(model_shape(GPT_OSS_120B), load_profile("h200-sxm"))
    memory = server.memory(Parallel(ranks=1, tp=1, slots=128, gpus_per_node=8), 1)
    for tokens in (100, 128, 5000):
        kept = 18 * tokens + 18 * min(tokens, 128)
        assert memory.of_sequence(tokens) == kept * 2 * 8 * 64 * 2


def test_no_more_is_generated_than_prompts_are_computed():
    document = make_plan(request(modes=("apart",), tokens_per_s=200_000, max_ms_per_token=60.0))
    assert document["candidates"]
    for row in document["candidates"]:
        groups = row["prefill_instances"] * row["prefill_ranks"] / row["prefill_tp"]
        prompt_tokens_per_s = groups * row["prefill_chunk"] / (sum(row["prefill_ms"].values()) / 1e3)
        assert row["tokens_per_s"] <= prompt_tokens_per_s * 512 / 4096 * (1 + 1e-9)
        assert row["tokens_per_s"] >= 200_000


def phase_power(phase, watts, tokens, *, is_simulated=False):
    watts_3 = np.array([0.9, 1.0, 1.2]) * watts
    return PhasePower(phase=phase, watts_3=watts_3, tokens=tokens, ranks=None, is_simulated=is_simulated)


@pytest.mark.parametrize("mode", ["together", "apart"])
def test_energy_of_a_token_is_measured_power_over_its_rate(mode):
    """All devices draw 400 W in both phases: J per token = W x devices / tokens per second."""
    wanted = request(modes=(mode,))
    servers = {"h200-sxm": Server(wanted.model, load_profile("h200-sxm"))}
    power = [phase_power("decode", 400.0, 64), phase_power("prefill", 400.0, 8192)]

    def plan(power):
        return Planner(
            servers, balanced(QWEN3_30B), wanted.targets, modes=(mode,), power={"h200-sxm": power}
        ).search()

    for one in plan(power).candidates:
        assert one.energy.joules_3[1] * float(one.tokens_per_s_3[1]) == pytest.approx(400.0 * one.gpus)
        assert one.energy.joules_3[0] < one.energy.joules_3[1] < one.energy.joules_3[2]
        # Rates of this device are parts of peaks, so times are assumed whatever the power is.
        assert (one.energy.grade, one.energy.is_simulated) == ("assumed", False)
    assert all(one.energy is None for one in plan(power[:1]).candidates)  # prompts were not measured
    simulated = [phase_power("decode", 400.0, 64, is_simulated=True), power[1]]
    assert {one.energy.is_simulated for one in plan(simulated).candidates} == {True}
    # A real device is preferred, however far its batch is.
    both = [*simulated, phase_power("decode", 300.0, 1)]
    assert {one.energy.is_simulated for one in plan(both).candidates} == {False}


@pytest.mark.parametrize(
    ("tokens", "is_simulated", "grade"),
    [(64, False, "measured"), (16, False, "assumed"), (64, True, "assumed")],
)
def test_only_power_of_a_like_batch_on_a_real_device_is_measured(tokens, is_simulated, grade):
    model = model_shape(QWEN3_30B)
    server = Server(model, load_profile("h200-sxm"))
    targets = Targets(tokens_per_s=20_000, context=4096, output=512)
    planner = Planner({"h200-sxm": server}, balanced(QWEN3_30B), targets, modes=("together",))
    one = next(one for one in planner.search().candidates if one.sequences == 64 and one.parallel.tp == 1)
    measured = replace(one, graded={"measured": 0.95, "fitted": 0.0, "published": 0.0, "assumed": 0.05})
    power = [
        phase_power("decode", 400.0, tokens, is_simulated=is_simulated),
        phase_power("prefill", 600.0, one.prefill_chunk),
    ]
    assert token_energy(measured, power).grade == grade


def test_power_of_phases_counts_for_devices_of_its_kind_alone(tmp_path):
    path, loads = two_ranks(tmp_path, stated=True)
    run = open_run(path)
    for name in ("H100 SXM", None):
        found = {one.phase: one for one in measured_power([run], name)}
        for phase, tokens in (("decode", 16), ("prefill", 2048)):
            # The sensor of the second rank reads 5 % more.
            truth = np.mean(
                [load.truth()[phase][0] * gain for load, gain in zip(loads, (1.0, 1.05), strict=True)]
            )
            low, likely, high = found[phase].watts_3
            assert likely == pytest.approx(truth, rel=0.01)
            assert low < likely < high
            assert (found[phase].tokens, found[phase].is_simulated) == (tokens, False)
    assert not measured_power([run], "H100 PCIe")
    assert not measured_power([run], "H200 SXM")
    file = path / "run.json"
    file.write_text(re.sub(r'"kind": *"gpu"', '"kind": "replay"', file.read_text()))
    assert {one.is_simulated for one in measured_power([open_run(path)], "H100 SXM")} == {True}


def test_a_plan_states_what_its_energy_rests_on():
    document = make_plan(request())
    assert "plan_power_limit" in [reason["code"] for reason in document["conclusion"]]
    best = document["candidates"][0]
    best |= {"joules_per_token": 1.0, "joules_per_token_low": 0.9, "joules_per_token_high": 1.2}
    best |= {"joules_grade": "assumed", "is_simulated": True}
    stated = "1 J per token (0.9 to 1.2) by the power of a simulated device: nothing of it was measured"
    assert stated in conclusion_sentences(conclude_plan(document))


def test_one_token_of_output_needs_no_instances_that_decode():
    document = make_plan(request(SKEWED, output=1, tokens_per_s=10))
    assert {row["mode"] for row in document["candidates"]} == {"together"}
    assert {row["reason"]["code"] for row in document["rejected"] if row["mode"] == "apart"} == {
        "nothing_to_decode"
    }


def test_sparse_attention_reads_less_of_long_contexts_and_pays_for_its_indexer():
    server, sparse = (
        Server(model_shape(config), load_profile("h200-sxm")) for config in (DEEPSEEK_V3, DEEPSEEK_V32)
    )
    parallel = Parallel(ranks=32, tp=1, slots=8, gpus_per_node=8)

    def mixers_s(one, context):
        parts = one.step(parallel, Work(decode=64, context=context), balanced(DEEPSEEK_V3)).parts
        return next(float(part.s_3[1]) for part in parts if part.name == "mixers")

    assert mixers_s(sparse, 131072) < 0.5 * mixers_s(server, 131072)
    assert mixers_s(sparse, 1024) > mixers_s(server, 1024)
    # Only the indexer's part grows with the context beyond what it chooses.
    of_index = 64 * (131072 - 65536) * 61 * max(128 * 2 / 3.84e12, 2 * 64 * 128 / (0.6 * 989e12))
    assert mixers_s(sparse, 131072) - mixers_s(sparse, 65536) == pytest.approx(of_index, rel=0.35)
