"""Verdicts on every change, for each phase of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from observatory.advice.frequency import recommend_clocks
from observatory.advice.mitigations.balance_changes import (
    activated_dispatch,
    dispatch_rules,
    placement,
    reference_rows,
    replicas,
    sharding,
    spill,
)
from observatory.advice.mitigations.change import Change
from observatory.advice.mitigations.elimination import LayerUse, experts_in_use
from observatory.advice.mitigations.expert_choice import route_or_fetch
from observatory.advice.mitigations.lab import Lab, not_applicable, not_known
from observatory.advice.mitigations.memory_changes import expert_cache
from observatory.advice.mitigations.setup import Setup, setup_of_run
from observatory.advice.mitigations.timed import Models, Trace
from observatory.advice.mitigations.traffic_changes import (
    deduplication,
    exchanges,
    fabric_premise,
    node_placement,
    sample_placement,
)
from observatory.advice.mitigations.verdict import (
    Mitigation,
    MitigationCode,
    Premise,
    Verdict,
    VerdictCode,
)
from observatory.advice.placement_layouts import current_layout
from observatory.analysis.energy.device_ownership import devices_of_rank
from observatory.analysis.energy.run_energy import energy_summary
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.frequency.model_file import ClockModel
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.parallel.balancing import linear_layout
from observatory.analysis.parallel.step_loads import FEWEST_STEPS, StepLoads, step_loads
from observatory.analysis.parallel.token_samples import layer_tokens
from observatory.errors import AdviceError, EnergyError
from observatory.reasons import Reason
from observatory.run.device_samples import sampled_devices
from observatory.text import counted

if TYPE_CHECKING:
    from observatory.run import Run
    from observatory.run.manifest import Topology

#: Share of the steps of a phase that layouts are chosen on.
_TRAIN_SHARE = 0.5
#: Numbers of one array of loads by source rank and expert; of more judged steps some are left out, evenly.
_MOST_NUMBERS = 1 << 25
#: Sampled tokens of a layer that are looked at; of more, some are left out, evenly.
_MOST_TOKENS = 20_000
#: Models whose time of today's step differs by more than this factor leave most of it unexplained.
_FAR_OFF = 2.0
#: Spans of the dispatchers that make up the MoE part of a step.
_SPANS = ("count_exchange", "dispatch", "experts", "combine")


#: All changes on today's ranks, in the order of the table.
CHANGES: tuple[Callable[[Lab], Iterator[Verdict]], ...] = (
    reference_rows,
    placement,
    replicas,
    dispatch_rules,
    activated_dispatch,
    spill,
    route_or_fetch,
    sharding,
    exchanges,
    deduplication,
    node_placement,
    sample_placement,
)
#: Largest published gain of a change, as a share (sources in docs/advise.md).
_PUBLISHED = {
    Mitigation.PLACEMENT: 0.17,
    Mitigation.REPLICAS: 0.05,
    Mitigation.PER_STEP_DISPATCH: 0.08,
    Mitigation.ACTIVATED_DISPATCH: 0.22,
    Mitigation.DEDUPLICATION: 0.29,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhaseAdvice:
    """Verdicts on one phase.

    Attributes:
        phase: which.
        steps: steps that layouts were chosen on, and judged on.
        verdicts: in the order of the table; today's set-up first.
        measured_us: MoE part of the judged steps as their spans show it, the busiest rank of each layer; None
            without spans.
        has_tokens: whether enough tokens were sampled to show which experts a token has together.
        elsewhere: gain of the best change in the other phases, by phase; empty without a best change.
    """

    phase: str
    steps: tuple[int, int]
    verdicts: tuple[Verdict, ...]
    measured_us: float | None
    has_tokens: bool
    elsewhere: Mapping[str, float] = field(default_factory=dict)

    def of(self, mitigation: Mitigation) -> Verdict:
        """The first verdict on a change."""
        return next(verdict for verdict in self.verdicts if verdict.mitigation is mitigation)

    @property
    def best(self) -> Verdict | None:
        """The change to make on today's ranks; None where nothing is worth changing.

        Of those that gain about as much as the one that gains most, the first of the table: the simplest.
        """
        worth = [
            (verdict, verdict.gain)
            for verdict in self.verdicts
            if verdict.code is VerdictCode.CHANGE
            and verdict.gain is not None
            and verdict.mitigation is not Mitigation.RANKS
        ]
        if not worth:
            return None
        most = max((gain for _, gain in worth), key=lambda gain: gain.value)
        least = max(most.low or 0.0, most.value / 2)
        return next(verdict for verdict, gain in worth if gain.value >= least)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advice:
    """What is advised for one run.

    Attributes:
        model: what ran, as a command line names it.
        setup: the set-up of today.
        experts: what the times of experts rest on.
        network: what those of exchanges rest on; None without.
        network_source: its name; None without.
        horizon_steps: steps within which changes have to pay.
        phases: by phase.
        premises: of the run as a whole, with whether they hold.
        skipped: phases of too few steps, with their number.
        left_out: parts of a step whose time is not known.
        ran: ranks and nodes of the run.
        hosts: their names; empty where they are not stated.
        unsampled_ranks: ranks of the run none of whose devices were sampled; empty without any power.
        in_use: experts of each layer that always work, and that hardly do: what elimination would look at,
            which makes another model and is no speed-up of this one.
    """

    model: str
    setup: Setup
    experts: ExpertCost
    network: NetworkModel | None
    network_source: str | None
    horizon_steps: int
    phases: tuple[PhaseAdvice, ...]
    premises: tuple[Premise, ...]
    skipped: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    ran: Topology
    hosts: tuple[str, ...]
    in_use: tuple[LayerUse, ...]
    unsampled_ranks: tuple[int, ...] = ()


def above_published(verdict: Verdict) -> float | None:
    """The largest published gain of a change that is predicted to gain more; None for all others."""
    gain, most = verdict.beyond or verdict.gain, _PUBLISHED.get(verdict.mitigation)
    return most if gain is not None and most is not None and gain.value > most else None


def advise_run(
    run: Run,
    setup: Setup,
    *,
    experts: ExpertCost,
    network: NetworkModel | None = None,
    network_source: str | None = None,
    clocks: ClockModel | None = None,
    horizon_steps: int = 10_000,
    ranks: Sequence[int] = (),
    phase: str | None = None,
) -> Advice:
    """Compare every change on a run.

    Args:
        run: an open run.
        setup: the set-up of today.
        experts: time of the experts of one rank.
        network: time of exchanges; None leaves them out, and what changes them without a verdict.
        network_source: its name, for people.
        clocks: energy and time against the SM clock, of `observatory clocks fit`.
        horizon_steps: steps over which a change has to pay for itself.
        ranks: other numbers of ranks to compare; by default half and double.
        phase: only this phase.

    Raises:
        AdviceError: the models are of other experts, or no phase has enough steps.
        PlacementError: the loads or today's placement cannot be used.
    """
    loads = step_loads(run, phase=phase, by_source=True)
    check_shape(run, loads, experts)
    others = tuple(ranks) or (setup.ranks // 2, 2 * setup.ranks)
    labs, skipped = _labs(run, loads, setup, experts, network, horizon_steps, max((setup.ranks, *others)))
    measured_us = _measured_us(run)
    phases = []
    for lab in labs:
        verdicts = [verdict for change in CHANGES for verdict in change(lab)]
        verdicts += _other_ranks(lab, [number for number in others if ranks or number >= 2])
        verdicts += [*expert_cache(lab), *_clock_lock(lab, clocks)]
        took_us = _mean_us(measured_us, lab) if _is_of_run(run, setup) else None
        advice = PhaseAdvice(
            phase=lab.trace.phase,
            steps=(lab.trace.train_steps, len(lab.judged_S)),
            verdicts=tuple(verdicts if took_us is None else held_to(took_us, lab, verdicts)),
            measured_us=took_us,
            has_tokens=lab.has_tokens,
        )
        phases.append(replace(advice, elsewhere=_elsewhere(lab, advice.best, labs)))
    if not phases:
        most = max((steps for _, steps in skipped), default=0)
        raise AdviceError(
            f"{counted(most, 'step')} of a phase: too few to choose on some and judge on others",
            expected=f"at least {2 * FEWEST_STEPS}",
            remedy="profile again with more --steps",
        )
    data = run.manifest.data
    return Advice(
        model=str(run.manifest.config.get("model") or run.manifest.model.name),
        setup=setup,
        experts=experts,
        network=network,
        network_source=network_source,
        horizon_steps=horizon_steps,
        phases=tuple(phases),
        premises=(
            Premise(reason=Reason(MitigationCode.REAL_TOKENS), holds=None if data is None else data.real),
        ),
        skipped=tuple(skipped),
        left_out=tuple(dict.fromkeys(part for lab in labs for part in lab.today.left_out)),
        ran=run.manifest.topology,
        hosts=tuple(dict.fromkeys(host.name for host in run.manifest.hosts)),
        in_use=experts_in_use(run, loads),
        unsampled_ranks=_unsampled_ranks(run) if labs[0].models.power is not None else (),
    )


def _labs(
    run: Run,
    loads: StepLoads,
    setup: Setup,
    experts: ExpertCost,
    network: NetworkModel | None,
    horizon_steps: int,
    most_ranks: int,
) -> tuple[list[Lab], list[tuple[str, int]]]:
    """A lab for each phase of enough steps, and the other phases with their steps."""
    given = None if setup.placement in (None, "recorded") else setup.placement
    is_plain = given in (None, "linear", "round-robin")
    today_LPK, name = current_layout(
        run, loads, ranks=setup.ranks, given=given if is_plain or given is None else Path(given)
    )
    of_layers = {layer.shared_experts for layer in run.manifest.model.moe_layers}
    samples = run.token_samples()
    models = Models(
        experts=experts,
        network=network,
        horizon_steps=horizon_steps,
        power=_power(run),
        power_ranks=run.manifest.topology.ep,
    )
    labs, skipped = [], []
    for named in loads.phases:
        of_phase = loads.of_phase(named)
        steps = len(of_phase.phase_S)
        if steps < 2 * FEWEST_STEPS:
            skipped.append((named, steps))
            continue
        train_steps = int(_TRAIN_SHARE * steps + 0.5)
        layers, in_layer = of_phase.load_SLE.shape[1:]
        most = max(FEWEST_STEPS, _MOST_NUMBERS // (layers * most_ranks * max(in_layer, most_ranks)))
        judged = np.linspace(train_steps, steps - 1, min(most, steps - train_steps))
        trace = Trace(
            phase=named,
            loads=of_phase,
            train_steps=train_steps,
            judged_S=judged.round().astype(np.intp),
            today_LPK=today_LPK,
            named_today=name,
            tokens=layer_tokens(samples[samples["phase"] == named], of_phase.layers, most=_MOST_TOKENS),
            shared_experts=of_layers.copy().pop() if len(of_layers) == 1 else None,
            sequence_tokens=None if run.manifest.data is None else run.manifest.data.sequence_length,
        )
        labs.append(Lab(trace, setup, models))
    return labs, skipped


def _power(run: Run) -> pd.DataFrame | None:
    """Power by phase and span; None where nothing was sampled or its energy is not known."""
    if not run.row_count("power"):
        return None
    try:
        return energy_summary(run).phases
    except EnergyError:
        return None


def _unsampled_ranks(run: Run) -> tuple[int, ...]:
    sampled = {device.uuid for device in sampled_devices(run)}
    owned = devices_of_rank(run.manifest)
    return tuple(rank for rank, uuids in sorted(owned.items()) if not sampled.intersection(uuids))


def _measured_us(run: Run) -> pd.Series[float]:
    """MoE part of every step by its spans, microseconds by phase and step: the busiest rank of each layer."""
    spans = run.spans()
    spans = spans[spans["name"].isin(_SPANS) & spans["end_ns"].notna() & spans["layer"].notna()]
    us = (spans["end_ns"].astype("int64") - spans["start_ns"].astype("int64")) / 1e3
    keys = ["phase", "step", "layer", "source_rank"]
    of_rank = us.groupby([spans[key] for key in keys]).sum()
    return of_rank.groupby(level=[0, 1, 2]).max().groupby(level=[0, 1]).sum()


def _mean_us(measured_us: pd.Series[float], lab: Lab) -> float | None:
    """Of the judged steps, on the ranks of the run; None without spans."""
    steps = lab.trace.loads.step_S
    assert steps is not None
    of_phase = measured_us[measured_us.index.get_level_values(0) == lab.trace.phase]
    wanted = of_phase.index.get_level_values(1).isin([steps[at] for at in lab.judged_S])
    return float(of_phase[wanted].mean()) if wanted.any() else None


def _is_of_run(run: Run, setup: Setup) -> bool:
    """Whether the set-up is that in which the run took its time."""
    if setup.ranks != run.manifest.topology.ep or setup.placement not in (None, "recorded"):
        return False
    ran = setup_of_run(run.manifest.topology, dict(run.manifest.config), ranks=None)
    return all(
        getattr(ran, name) == getattr(setup, name) for name in ("algorithm", "deduplicate", "node_of_P")
    )


def held_to(measured_us: float, lab: Lab, verdicts: Sequence[Verdict]) -> Iterator[Verdict]:
    """Verdicts as they stand where today's steps took so long: no change by models that are far off."""
    predicted_us = float(lab.today.total_S.mean())
    off = max(measured_us, predicted_us) / max(min(measured_us, predicted_us), 1e-300)
    is_far_off = lab.models.network is not None and lab.today.reason is None and off > _FAR_OFF
    reason = Reason(MitigationCode.FAR_OFF, {"predicted_us": predicted_us, "measured_us": measured_us})
    for verdict in verdicts:
        if is_far_off and verdict.code is VerdictCode.CHANGE and verdict.gain is not None:
            yield replace(verdict, code=VerdictCode.FAR_OFF, reason=reason)
        else:
            yield verdict


def _elsewhere(lab: Lab, best: Verdict | None, labs: Sequence[Lab]) -> dict[str, float]:
    """What the best change of a phase gains in the others: a set-up has one layout and one exchange."""
    if best is None or best.change is None or best.change.of_phase:
        return {}
    change = best.change
    gains = {}
    for other in labs:
        if other is lab:
            continue
        slot_LPK = other.trace.today_LPK if change.slot_LPK is None else change.slot_LPK
        rule = "equal" if change.rule == "weighted" else change.rule
        timed = other.timed(replace(change, work=other.work(slot_LPK, rule=rule)))
        gains[other.trace.phase] = 1.0 - float(timed.total_S.sum() / max(other.today.total_S.sum(), 1e-300))
    return gains


def check_shape(run: Run, loads: StepLoads, experts: ExpertCost) -> None:
    """Refuse expert times of another model.

    Raises:
        AdviceError: they are of other experts than the run's.
    """
    shape, model = experts.shape, run.manifest.model
    ours = {
        "hidden": model.hidden_size,
        "experts": loads.load_SLE.shape[2],
        "expert_bytes": model.expert_bytes,
        "top_k": loads.top_k,
        "dtype": None if model.dtype is None else model.dtype.removeprefix("torch."),
    }
    theirs = shape.model_dump() | {"dtype": shape.dtype.removeprefix("torch.")}
    for name, value in ours.items():
        if value is not None and value != theirs[name]:
            raise AdviceError(
                f"expert times of {experts.source} are of {name} {theirs[name]}, the run has {value}",
                expected="a benchmark of the model that ran",
                remedy="measure it with `observatory bench experts`",
            )


def _other_ranks(lab: Lab, numbers: Sequence[int]) -> Iterator[Verdict]:
    """The same tokens on fewer or more ranks, with the layout that the training steps suggest."""
    for ranks in dict.fromkeys(numbers):
        if ranks == lab.setup.ranks:
            continue
        setting = f"EP {ranks}"
        if ranks < 2:
            yield replace(not_applicable(Mitigation.RANKS, MitigationCode.ONE_RANK), setting=setting)
            continue
        if ranks > lab.experts or lab.experts % ranks:
            uneven = not_applicable(Mitigation.RANKS, MitigationCode.UNEVEN, experts=lab.experts, ranks=ranks)
            yield replace(uneven, setting=setting)
            continue
        if lab.models.network is None:
            yield replace(not_known(Mitigation.RANKS, MitigationCode.NO_NETWORK), setting=setting)
            continue
        setup = lab.setup.model_copy(
            update={"ranks": ranks, "gpus_per_node": min(lab.setup.gpus_per_node, ranks)}
        )
        start_LPK = linear_layout(lab.layers, lab.experts, ranks)
        other = Lab(replace(lab.trace, today_LPK=start_LPK), setup, lab.models)
        layout = other.chosen_layout(0)
        timed = other.timed(Change(work=other.work(layout), slot_LPK=layout))
        verdict = lab.judge_times(
            Mitigation.RANKS,
            timed,
            setting=setting,
            premise=fabric_premise(lab),
            assumed=True,
            is_other_fabric=True,
        )
        more = layout.shape[2] - lab.trace.today_LPK.shape[2]
        memory_bytes = more * lab.layers * lab.models.experts.shape.expert_bytes
        if verdict.code is VerdictCode.CHANGE and lab.over_memory(memory_bytes):
            verdict = lab.without_room(verdict, memory_bytes)
        yield replace(verdict, memory_bytes=memory_bytes)


def _clock_lock(lab: Lab, clocks: ClockModel | None) -> Iterator[Verdict]:
    """What `observatory clocks recommend` advises for the phase, as a change of this set-up."""
    if clocks is None:
        yield not_known(Mitigation.CLOCK_LOCK, MitigationCode.NO_CLOCKS)
        return
    advised = [
        series
        for series in recommend_clocks(clocks).series
        if clocks.series[series.index].phase in ("unknown", lab.trace.phase)
    ]
    if not advised:
        yield not_known(Mitigation.CLOCK_LOCK, MitigationCode.OTHER_PHASES, phase=lab.trace.phase)
    for series in advised:
        choice = series.choice
        if choice is None:
            yield replace(
                not_applicable(Mitigation.CLOCK_LOCK, MitigationCode.ENERGY_FALLS), setting=series.title
            )
            continue
        yield Verdict(
            mitigation=Mitigation.CLOCK_LOCK,
            setting=f"{choice.sm_clock_mhz:.0f} MHz, {series.title}",
            code=VerdictCode.CHANGE,
            energy_saving=choice.saving,
            slowdown=choice.slowdown,
            memory_bytes=0,
            premise=Premise(reason=Reason(MitigationCode.ENERGY_FALLS), holds=True),
            grades=("fitted",),
        )
