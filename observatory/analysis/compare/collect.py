"""The series of a run: one pass over its loads, and its spans, exchanges and power samples where it has them.

Shapes: S steps, G groups of consecutive steps, E experts, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.compare.metrics import Key
from observatory.analysis.compare.provenance import provenance_facts
from observatory.analysis.compare.saved import MOST_SAMPLES, add_energy
from observatory.analysis.compare.series import Series, mean_of, mean_series, standard_error
from observatory.analysis.compare.subject import GroupedLoads, Subject
from observatory.analysis.compare.words import CompareCode
from observatory.analysis.energy.document import energy_document
from observatory.analysis.energy.phase_intervals import device_bands
from observatory.analysis.exchange.alignment import rank_clocks
from observatory.analysis.exchange.waiting import wait_and_transfer
from observatory.analysis.parallel.placement import Placement
from observatory.analysis.parallel.scan import fitting_degrees, place, placement_rule
from observatory.analysis.parallel.traffic import load_by_rank
from observatory.analysis.routing.imbalance import max_over_mean_rows
from observatory.analysis.routing.loads import LayerLoads, collect_layer_loads
from observatory.analysis.step_times import step_times
from observatory.errors import EnergyError, PlacementError
from observatory.reasons import Reason
from observatory.run import LoadBlock, Run
from observatory.run.device_samples import device_samples, sampled_devices
from observatory.run.manifest import Manifest
from observatory.run.usable_cores import short_of_cores

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Groups of steps whose loads are kept of each layer.
_MOST_GROUPS = 1024
#: Kind of devices that replay a recording.
_SIMULATED = "replay"
#: Where a checkpoint's name states its training step.
_STEP_IN_NAME = re.compile(
    r"(?:checkpoint|step|iter(?:ation)?|global_step)[-_]?(\d{1,15})(?!\d)", re.IGNORECASE
)
_STEP_OPTIONS = ("training_step", "global_step")


def measure_run(run: Run, *, degrees: Sequence[int] | None = None) -> Subject:
    """Everything of a run that can be compared.

    Args:
        run: an open run.
        degrees: EP degrees for the busiest rank; None: that of the run, or the first usual one that fits.

    Raises:
        LoadError: loads are negative or inconsistent.
    """
    manifest = run.manifest
    series: dict[Key, Series] = {}
    missing: dict[str, Reason] = {}
    loads = _add_routing(run, degrees or own_degrees(manifest), series, missing)
    _add_times(run, step_times(run), series, missing)
    _add_exchanges(run, series, missing, _places(run))
    _add_power(run, series, missing)
    experts = {spec.layer: spec.experts for spec in manifest.model.moe_layers}
    return Subject(
        name=str(run.path),
        source="run",
        model=manifest.model.name,
        mixer=manifest.model.mixer,
        condition=manifest.data.condition if manifest.data else None,
        run_id=manifest.run_id,
        started_unix_s=manifest.created_unix_s,
        ended_unix_s=manifest.ended_unix_s,
        training_step=_training_step(run),
        experts_L=tuple(experts[layer] for layer in sorted(experts)),
        facts=_facts(run),
        tokens=tokens_fed(run),
        series=series,
        loads=loads,
        bias_ranges=_bias_ranges(run),
        missing=missing,
        short_of_cores=any(share.short for share in short_of_cores(rank.cores for rank in manifest.ranks)),
        simulated_device=any(device.kind == _SIMULATED for device in manifest.device_specs.values()),
        problems=run.problems,
    )


def timing_rows(run: Run, steps: pd.DataFrame) -> list[dict[str, Any]]:
    """Times of steps and in exchanges of each phase, as saved documents hold them.

    Args:
        run: an open run.
        steps: what `step_times` returns of it.

    Returns:
        ``metric``, ``phase``, ``value``; ``samples`` and ``at``, values of single steps and their numbers,
        both None of more than `MOST_SAMPLES`; ``error`` (standard error) where they are, else None.
    """
    series: dict[Key, Series] = {}
    missing: dict[str, Reason] = {}
    _add_times(run, steps, series, missing)
    _add_exchanges(run, series, missing, {})
    rows = []
    for key, item in series.items():
        kept = item.sample_N is not None and item.step_N is not None and item.steps <= MOST_SAMPLES
        rows.append(
            {
                "metric": key.metric,
                "phase": key.phase,
                "value": item.value,
                "samples": item.sample_N.tolist() if kept and item.sample_N is not None else None,
                "at": item.step_N.tolist() if kept and item.step_N is not None else None,
                "error": None if kept else standard_error(item),
            }
        )
    return rows


def own_degrees(manifest: Manifest) -> tuple[int, ...]:
    """The EP degree of a run that spread its experts, else the first usual one that fits all layers."""
    ep = manifest.topology.ep
    return (ep,) if ep > 1 else fitting_degrees(manifest, "auto")[:1]


def _places(run: Run) -> dict[int, int]:
    """Place of each MoE layer in the model, by its number."""
    return {
        spec: place for place, spec in enumerate(sorted({s.layer for s in run.manifest.model.moe_layers}))
    }


def _bias_ranges(run: Run) -> dict[int, tuple[Int64, Float64]]:
    """Range of the correction bias of each router, by place of its layer; of replicas the first rank's."""
    rows = run.router_biases()
    ranges = {}
    for layer, index in _places(run).items():
        of_layer = rows[rows["layer"] == layer]
        first = of_layer[of_layer["source_rank"] == of_layer["source_rank"].min()].sort_values("step")
        if len(first):
            spread = [float(np.max(bias) - np.min(bias)) for bias in first["bias"]]
            ranges[index] = first["step"].to_numpy(np.int64), np.array(spread)
    return ranges


class _StepValues:
    """Values of single steps of one layer and phase that take the loads themselves."""

    def __init__(self, placements: Mapping[int, Placement]) -> None:
        self.placements = placements
        self.activated: list[NDArray[np.int64]] = []
        self.ratios: dict[int, list[Float64]] = {ep: [] for ep in placements}

    def add(self, block: LoadBlock) -> None:
        """Add the steps of a block."""
        load_SE = block.load_SE
        self.activated.append(np.count_nonzero(load_SE, axis=1))
        for ep, placement in self.placements.items():
            load_SR = load_by_rank(load_SE[:, None, :], placement)[:, 0]
            self.ratios[ep].append(max_over_mean_rows(load_SR))


def _add_routing(
    run: Run, degrees: Sequence[int], series: dict[Key, Series], missing: dict[str, Reason]
) -> dict[tuple[str, int], GroupedLoads]:
    rule = placement_rule("auto", run.manifest.topology)
    values: dict[tuple[str, int], _StepValues] = {}

    def each(block: LoadBlock) -> None:
        key = (block.phase, block.layer)
        if key not in values:
            placements = {}
            for ep in degrees:
                try:
                    placements[ep] = place(rule, layer=block.layer, experts=block.experts, ep=ep)
                except PlacementError as error:
                    missing["rank_max_over_mean"] = Reason(
                        CompareCode.DEGREE, {"ep": ep, "detail": str(error)}
                    )
            values[key] = _StepValues(placements)
        values[key].add(block)

    gathered = collect_layer_loads(run, each=each)
    if not gathered:
        missing |= dict.fromkeys(
            ("gini", "entropy_bits", "dead_experts", "activated_experts", "rank_max_over_mean"),
            Reason(CompareCode.NO_ROUTING),
        )
    places = _places(run) or {layer: i for i, layer in enumerate(sorted({layer for _, layer in gathered}))}
    grouped: dict[tuple[str, int], GroupedLoads] = {}
    for (phase, layer), of_layer in gathered.items():
        if of_layer.assignments == 0 or layer not in places:
            continue
        at = places[layer]
        grouped[phase, at] = _grouped(of_layer)
        _add_steps(of_layer, values.pop((phase, layer)), Key("", phase, at), series, missing)
    _add_wholes(series)
    return grouped


def _add_steps(
    of_layer: LayerLoads,
    values: _StepValues,
    at: Key,
    series: dict[Key, Series],
    missing: dict[str, Reason],
) -> None:
    if not of_layer.keeps_steps:
        folded = Reason(CompareCode.STEPS_FOLDED)
        missing |= {"activated_experts": folded, "rank_max_over_mean": folded}
        return
    tokens = int(np.median(of_layer.tokens_S))
    for metric, ep, value_S in (
        ("activated_experts", None, np.concatenate(values.activated).astype(np.float64)),
        *(("rank_max_over_mean", ep, np.concatenate(ratio)) for ep, ratio in values.ratios.items()),
    ):
        item = mean_series(value_S, of_layer.step_S)
        if item is not None:
            series[Key(metric, at.phase, at.layer, ep)] = Series(
                value=item.value, sample_N=item.sample_N, step_N=item.step_N, tokens=tokens
            )


def _add_wholes(series: dict[Key, Series]) -> None:
    """Means over layers of what is known of each."""
    of_all: dict[Key, list[Series]] = {}
    for key, item in series.items():
        if key.layer is not None:
            of_all.setdefault(Key(key.metric, key.phase, None, key.ep), []).append(item)
    series |= {key: mean_of(items) for key, items in of_all.items()}


def _grouped(of_layer: LayerLoads) -> GroupedLoads:
    """Loads in at most `_MOST_GROUPS` groups."""
    load_GE = of_layer.load_GE
    rows = of_layer.rows_per_group
    first_G = np.arange(0, len(of_layer.step_S), rows)[: len(load_GE)]
    tokens_G = np.add.reduceat(of_layer.tokens_S, first_G)
    step_G = of_layer.step_S[first_G]
    fold = -(-len(load_GE) // _MOST_GROUPS)
    at = np.arange(0, len(load_GE), fold)
    return GroupedLoads(
        load_GE=np.add.reduceat(load_GE, at, axis=0),
        tokens_G=np.add.reduceat(tokens_G, at),
        step_G=step_G[at],
    )


def _add_times(run: Run, steps: pd.DataFrame, series: dict[Key, Series], missing: dict[str, Reason]) -> None:
    """Times of steps, of the rank that takes longest, from the spans of phases."""
    if steps.empty:
        missing |= dict.fromkeys(("ms", "ms_per_token", "tokens_per_s"), Reason(CompareCode.NO_TIMES))
        return
    sequences = run.manifest.data.batch_size if run.manifest.data else None
    if not sequences:
        missing["ms_per_token"] = Reason(CompareCode.NO_BATCH_SIZE)
    for phase, of_phase in steps.groupby("phase"):
        ms_S: Float64 = of_phase["ms"].to_numpy(np.float64)
        step_S = of_phase["step"].to_numpy(np.int64)
        tokens_S: Float64 = of_phase["tokens"].to_numpy(np.float64)
        values = {"ms": ms_S}
        if np.any(np.isfinite(tokens_S)):
            rate = _rate(ms_S, tokens_S, step_S)
            if rate is not None:
                series[Key("tokens_per_s", str(phase))] = rate
            if sequences and phase == "decode":
                if np.all(tokens_S == sequences):
                    missing["ms_per_token"] = Reason(CompareCode.ONE_TOKEN)
                else:
                    values["ms_per_token"] = ms_S * sequences / np.where(tokens_S > 0, tokens_S, np.nan)
        for metric, value_S in values.items():
            item = mean_series(value_S, step_S, trimmed=True)
            if item is not None:
                series[Key(metric, str(phase))] = item


def _rate(ms_S: Float64, tokens_S: Float64, step_S: Int64) -> Series | None:
    """Tokens per second: mean tokens of a step over the trimmed mean of its time."""
    counted_S = np.isfinite(tokens_S)
    time = mean_series(ms_S[counted_S], step_S[counted_S], trimmed=True)
    tokens = mean_series(tokens_S[counted_S], step_S[counted_S])
    if time is None or tokens is None or tokens.value <= 0:
        return None
    assert time.sample_N is not None
    assert tokens.sample_N is not None
    value = tokens.value / time.value * 1e3
    shift_N = tokens.sample_N / tokens.value - time.sample_N / time.value
    return Series(value=value, sample_N=value * (1 + shift_N), step_N=time.step_N)


def _add_exchanges(
    run: Run, series: dict[Key, Series], missing: dict[str, Reason], places: Mapping[int, int]
) -> None:
    """Time in exchanges and waiting of a step, mean over ranks."""
    names = {"exchange_ms": "duration_s", "wait_ms": "wait_s"}
    if not run.row_count("exchange"):
        missing |= dict.fromkeys(names, Reason(CompareCode.NO_EXCHANGES))
        return
    topology = run.manifest.topology
    waits = wait_and_transfer(
        run.exchanges(arrow_lists=True),
        ranks=topology.ranks,
        clocks=rank_clocks(run.manifest),
        node_of_rank=topology.node_of_rank,
    )
    ranks = max(int(waits["source_rank"].nunique()), 1)
    waits = waits.assign(at=waits["layer"].map(places).astype("float64").fillna(-1.0))
    for metric, column in names.items():
        if waits[column].isna().any() and metric == "wait_ms":
            share = float(waits[column].isna().mean())
            missing[metric] = Reason(CompareCode.WAIT_UNKNOWN, {"share": share})
            continue
        per_step = waits.groupby(["phase", "at", "step"])[column].sum().reset_index()
        per_step[column] *= 1e3 / ranks
        for phase, at in per_step[["phase", "at"]].drop_duplicates().to_numpy(object).tolist():
            if at >= 0:
                of_layer = per_step[(per_step["phase"] == phase) & (per_step["at"] == at)]
                _add_trimmed(series, Key(metric, str(phase), int(at)), of_layer, column)
        whole = per_step.groupby(["phase", "step"])[column].sum().reset_index()
        for phase, of_phase in whole.groupby("phase"):
            _add_trimmed(series, Key(metric, str(phase)), of_phase, column)


def _add_trimmed(series: dict[Key, Series], key: Key, frame: pd.DataFrame, column: str) -> None:
    ordered = frame.sort_values("step")
    value_S, step_S = ordered[column].to_numpy(dtype=np.float64), ordered["step"].to_numpy(dtype=np.int64)
    item = mean_series(value_S, step_S, trimmed=True)
    if item is not None:
        series[key] = item


def _add_power(run: Run, series: dict[Key, Series], missing: dict[str, Reason]) -> None:
    names = ("mj_per_token", "power_w", "clock_mhz")
    if not run.row_count("power"):
        missing |= dict.fromkeys(names, Reason(CompareCode.NO_POWER))
        return
    try:
        add_energy(energy_document(run), series)
    except EnergyError as error:
        missing |= dict.fromkeys(names, Reason(CompareCode.POWER_UNUSABLE, {"detail": str(error)}))
        return
    _add_clock(run, series, missing)
    for metric in names:
        if metric not in missing and not any(key.metric == metric for key in series):
            missing[metric] = Reason(CompareCode.POWER_UNUSABLE, {"detail": "no phase has a value"})


def _add_clock(run: Run, series: dict[Key, Series], missing: dict[str, Reason]) -> None:
    """Clock of the samples inside each phase, all devices."""
    sampled = sampled_devices(run)
    bands_of = device_bands(run, [(device.rank, device.uuid) for device in sampled])
    has_clock = False
    by_phase: dict[str, list[Float64]] = {}
    for device, samples in device_samples(run, sampled, ["sm_clock_mhz"]):
        rows, bands = samples[samples["sm_clock_mhz"].notna()], bands_of[device.rank, device.uuid]
        has_clock |= not rows.empty
        time_N = rows["time_ns"].to_numpy(np.int64)
        clock_N = rows["sm_clock_mhz"].to_numpy(np.float64)
        if rows.empty or not len(bands.start_ns):
            continue
        band_N = np.searchsorted(bands.start_ns, time_N, side="right") - 1
        inside_N = (band_N >= 0) & (time_N <= bands.end_ns[np.maximum(band_N, 0)])
        phase_N = np.array(bands.phase, dtype=object)[np.maximum(band_N, 0)]
        for phase in set(bands.phase):
            by_phase.setdefault(phase, []).append(clock_N[inside_N & (phase_N == phase)])
    if not has_clock:
        missing["clock_mhz"] = Reason(CompareCode.NO_CLOCK)
    for phase, clocks in by_phase.items():
        item = mean_series(np.concatenate(clocks))
        if item is not None:
            series[Key("clock_mhz", phase)] = item


def _facts(run: Run) -> dict[str, Any]:
    """What may explain a difference, by code."""
    manifest = run.manifest
    topology, data = manifest.topology, manifest.data
    software = dict(manifest.software)
    options = manifest.config
    devices = manifest.device_specs.values()
    return {
        CompareCode.OTHER_MODEL: manifest.model.name,
        CompareCode.OTHER_DATA: data and (data.condition, data.source),
        CompareCode.OTHER_SHAPE: data and (data.batch_size, data.sequence_length),
        CompareCode.OTHER_SEED: options.get("seed"),
        CompareCode.OTHER_RANKS: (topology.ranks, topology.ep),
        CompareCode.OTHER_PLACEMENT: topology.placement and hash(topology.placement),
        CompareCode.OTHER_DTYPE: manifest.model.dtype,
        CompareCode.OTHER_MACHINE: sorted({host.name for host in manifest.hosts}),
        CompareCode.OTHER_CPU: sorted({host.cpu or "" for host in manifest.hosts}),
        CompareCode.OTHER_CORES: sorted({rank.cores.cpus for rank in manifest.ranks if rank.cores}),
        **provenance_facts(manifest),
        CompareCode.OTHER_SOFTWARE: software,
        CompareCode.OTHER_COMMIT: manifest.git_sha,
        CompareCode.OTHER_DEVICE: sorted({f"{item.kind} {item.name or ''}".strip() for item in devices}),
        CompareCode.OTHER_DRIVER: sorted({item.driver for item in devices if item.driver}),
        CompareCode.OTHER_LIMIT: sorted(
            {item.enforced_limit_mw for item in devices if item.enforced_limit_mw}
        ),
        CompareCode.OTHER_SCHEMA: manifest.schema_version,
        CompareCode.OTHER_STATE: manifest.state,
    }


def tokens_fed(run: Run) -> tuple[Any, ...] | None:
    """What two runs that were fed the same tokens in the same order have in common."""
    data, options = run.manifest.data, run.manifest.config
    if data is None or not data.batch_size or not data.sequence_length or options.get("seed") is None:
        return None
    return (
        data.condition, data.source, data.real, data.batch_size, data.sequence_length, data.wrapped,
        options.get("seed"), options.get("steps"), run.manifest.topology.ranks,
    )  # fmt: skip


def _training_step(run: Run) -> int | None:
    options = run.manifest.config
    for name in _STEP_OPTIONS:
        value = options.get(name)
        if isinstance(value, int) and 0 <= value < 1 << 53:
            return value
    names = (run.manifest.model.name, str(options.get("model") or ""))
    stated = [match for name in names for match in _STEP_IN_NAME.findall(name[-200:])]
    return int(stated[-1]) if stated else None
