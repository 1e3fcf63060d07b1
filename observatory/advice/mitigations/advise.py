"""Verdicts on every change, for each phase of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from observatory.advice.frequency import recommend_clocks
from observatory.advice.mitigations.changes import CHANGES, fabric_premise
from observatory.advice.mitigations.lab import Change, Lab, Models, Trace, not_applicable, not_known, shown
from observatory.advice.mitigations.setup import Setup
from observatory.advice.mitigations.verdict import (
    Mitigation,
    MitigationCode,
    Premise,
    Verdict,
    VerdictCode,
)
from observatory.advice.placement_layouts import current_layout
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.frequency.model_file import ClockModel
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.parallel.step_loads import FEWEST_STEPS, StepLoads, step_loads
from observatory.analysis.parallel.token_samples import layer_tokens
from observatory.errors import AdviceError, PlacementError
from observatory.reasons import Reason

if TYPE_CHECKING:
    from observatory.run import Run

#: Share of the steps of a phase that layouts are chosen on.
_TRAIN_SHARE = 0.5
#: Gains that are this close are the same.
_TIE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhaseAdvice:
    """Verdicts on one phase.

    Attributes:
        phase: which.
        steps: steps that layouts were chosen on, and judged on.
        verdicts: in the order of the table; today's set-up first.
    """

    phase: str
    steps: tuple[int, int]
    verdicts: tuple[Verdict, ...]

    def of(self, mitigation: Mitigation) -> Verdict:
        """The first verdict on a change."""
        return next(verdict for verdict in self.verdicts if verdict.mitigation is mitigation)

    @property
    def best(self) -> Verdict | None:
        """The change to make on today's ranks; None where nothing is worth changing.

        Of those that gain about as much as the one that gains most, the first of the table: simplest.
        """
        worth = {
            verdict: verdict.gain.value
            for verdict in self.verdicts
            if verdict.code is VerdictCode.CHANGE
            and verdict.gain is not None
            and verdict.mitigation is not Mitigation.RANKS
        }
        most = max(worth.values(), default=0.0)
        return next((verdict for verdict, gain in worth.items() if gain >= most - _TIE), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advice:
    """What is advised for one run.

    Attributes:
        setup: the set-up of today.
        experts: what the times of experts rest on.
        network: what those of exchanges rest on; None without.
        network_source: its name; None without.
        horizon_steps: steps within which changes have to pay.
        phases: by phase.
        premises: of the run as a whole, with whether they hold.
        skipped: phases of too few steps, with their number.
    """

    setup: Setup
    experts: ExpertCost
    network: NetworkModel | None
    network_source: str | None
    horizon_steps: int
    phases: tuple[PhaseAdvice, ...]
    premises: tuple[Premise, ...]
    skipped: tuple[tuple[str, int], ...]


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
    _check_shape(run, loads, experts)
    given = None if setup.placement in (None, "recorded") else setup.placement
    plain = given in (None, "linear", "round-robin")
    today_LPK, name = current_layout(
        run, loads, ranks=setup.ranks, given=given if plain or given is None else Path(given)
    )
    model, data = run.manifest.model, run.manifest.data
    of_layers = {layer.shared_experts for layer in model.moe_layers}
    shared_experts = of_layers.pop() if len(of_layers) == 1 else None
    samples = run.token_samples()
    phases, skipped = [], []
    for named in loads.phases:
        of_phase = loads.of_phase(named)
        steps = len(of_phase.phase_S)
        if steps < 2 * FEWEST_STEPS:
            skipped.append((named, steps))
            continue
        trace = Trace(
            phase=named,
            loads=of_phase,
            train_steps=int(_TRAIN_SHARE * steps + 0.5),
            today_LPK=today_LPK,
            named_today=name,
            tokens=layer_tokens(samples, phase=named, layers=of_phase.layers),
            shared_experts=shared_experts,
            sequence_tokens=None if data is None else data.sequence_length,
        )
        models = Models(experts=experts, network=network, horizon_steps=horizon_steps)
        lab = Lab(trace, setup, models)
        verdicts = [verdict for change in CHANGES for verdict in change(lab)]
        verdicts += _other_ranks(lab, ranks or (setup.ranks // 2, 2 * setup.ranks))
        verdicts += [_expert_cache(lab), *_clock_lock(lab, clocks)]
        phases.append(
            PhaseAdvice(phase=named, steps=(trace.train_steps, len(lab.judged_S)), verdicts=tuple(verdicts))
        )
    if not phases:
        most = max((steps for _, steps in skipped), default=0)
        raise AdviceError(
            f"{most} steps of one phase are too few to choose on some and judge on others",
            expected=f"at least {2 * FEWEST_STEPS}",
            remedy="profile again with more --steps",
        )
    is_real = None if data is None else data.real
    return Advice(
        setup=setup,
        experts=experts,
        network=network,
        network_source=network_source,
        horizon_steps=horizon_steps,
        phases=tuple(phases),
        premises=(Premise(reason=Reason(MitigationCode.REAL_TOKENS), holds=is_real),),
        skipped=tuple(skipped),
    )


def _check_shape(run: Run, loads: StepLoads, experts: ExpertCost) -> None:
    """Refuse expert times of another model."""
    shape, model = experts.shape, run.manifest.model
    ours = {
        "hidden": model.hidden_size,
        "experts": loads.load_SLE.shape[2],
        "expert_bytes": model.expert_bytes,
    }
    theirs = {"hidden": shape.hidden, "experts": shape.experts, "expert_bytes": shape.expert_bytes}
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
        if ranks < 2 or ranks == lab.setup.ranks or ranks > lab.experts:
            continue
        setup = lab.setup.model_copy(
            update={"ranks": ranks, "gpus_per_node": min(lab.setup.gpus_per_node, ranks)}
        )
        try:
            other = Lab(replace(lab.trace, tokens=None), setup, lab.models)
            layout = other.chosen_layout(-lab.experts % ranks)
            timed = other.timed(Change(work=other.work(layout)))
        except PlacementError:
            yield replace(
                not_applicable(Mitigation.RANKS, MitigationCode.UNEVEN, experts=lab.experts, ranks=ranks),
                setting=f"EP {ranks}",
            )
            continue
        verdict = lab.judge_times(
            Mitigation.RANKS, timed, setting=f"EP {ranks}", premise=fabric_premise(lab), assumed=True
        )
        more = layout.shape[2] - lab.trace.today_LPK.shape[2]
        yield replace(verdict, memory_bytes=more * lab.layers * lab.models.experts.shape.expert_bytes)


def _expert_cache(lab: Lab) -> Verdict:
    """Keep the experts that training steps used most on the device and fetch the others from the host."""
    memory, expert_bytes = lab.setup.memory_bytes, lab.models.experts.shape.expert_bytes
    if memory is None:
        return not_known(Mitigation.EXPERT_CACHE, MitigationCode.NO_MEMORY)
    premise = Premise(
        reason=Reason(
            MitigationCode.EXPERTS_DO_NOT_FIT, {"held_bytes": lab.held_bytes, "memory_bytes": int(memory)}
        ),
        holds=lab.over_memory(0),
    )
    if not premise.holds:
        return replace(
            not_applicable(Mitigation.EXPERT_CACHE, MitigationCode.EXPERTS_DO_NOT_FIT), premise=premise
        )
    if lab.setup.host_bytes_per_s is None:
        return replace(not_known(Mitigation.EXPERT_CACHE, MitigationCode.NO_HOST_RATE), premise=premise)
    layers, ranks, slots = lab.trace.today_LPK.shape
    kept = int(memory // (layers * expert_bytes))
    used_LE = (lab.train_SLE > 0).mean(axis=0)
    missed_SL = np.zeros(lab.test_SLE.shape[:2])
    for layer in range(layers):
        missed_SP = np.zeros((len(lab.judged_S), ranks))
        for rank in range(ranks):
            held_K = lab.trace.today_LPK[layer, rank]
            order_K = held_K[np.argsort(-used_LE[layer, held_K], kind="stable")]
            missed_SP[:, rank] = (lab.test_SLE[:, layer, order_K[kept:]] > 0).sum(axis=1)
        missed_SL[:, layer] = missed_SP.max(axis=1)
    extra_us_S = 1e6 * missed_SL.sum(axis=1) * expert_bytes / lab.setup.host_bytes_per_s
    total_S = lab.today.total_S + extra_us_S
    return Verdict(
        mitigation=Mitigation.EXPERT_CACHE,
        setting=f"{kept} of {slots} kept",
        code=VerdictCode.NEEDED,
        memory_bytes=-int(lab.held_bytes - kept * layers * expert_bytes),
        premise=premise,
        grades=lab.grades(assumed=True),
        **shown(lab.today, total_S, extra_us_S),
    )


def _clock_lock(lab: Lab, clocks: ClockModel | None) -> Iterator[Verdict]:
    """What `observatory clocks recommend` advises for the phase, as a change of this set-up."""
    if clocks is None:
        yield not_known(Mitigation.CLOCK_LOCK, MitigationCode.NO_CLOCKS)
        return
    for series in recommend_clocks(clocks).series:
        if lab.trace.phase not in series.title and len(clocks.series) > 1:
            continue
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
