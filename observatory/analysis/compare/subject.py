"""What is compared: a run, or the saved results of one, with its series and the facts that set it apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.compare.metrics import Key
from observatory.analysis.compare.series import Series
from observatory.reasons import Reason

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupedLoads:
    """Loads of one layer in one phase, by groups of consecutive steps.

    Attributes:
        load_GE: assignments per expert.
        tokens_G: tokens of each group.
        step_G: first step of each.
    """

    load_GE: Int64
    tokens_G: Int64
    step_G: Int64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """One run, or the saved results of one.

    Attributes:
        name: where it is from.
        source: ``run`` or ``document``.
        model, mixer, condition: what ran; None where it is not stated.
        run_id: of the run; None where a document states none.
        started_unix_s, ended_unix_s: when it ran; None where it is not stated.
        training_step: of the checkpoint that ran; None where neither options nor name state one.
        experts_L: experts of each MoE layer, in model order; empty where that is not known.
        facts: what may explain a difference, by code of the difference; equal where nothing differs.
        tokens: what names the tokens that were fed: equal only where they were the same in the same order;
            None where that is not known.
        series: values by place.
        loads: loads of layers by phase and place of the layer.
        bias_ranges: steps (N,), and from each on the largest less the smallest correction bias of the router
            (N,), by place of the layer; empty where routers have none.
        missing: why quantities are missing, by name of the metric.
        short_of_cores: ranks or threads had no core of their own.
        simulated_device: power and clocks are those of a replayed recording, not of this run's device.
        problems: what the run lacks, in words.
    """

    name: str
    source: str
    model: str | None = None
    mixer: str | None = None
    condition: str | None = None
    run_id: str | None = None
    started_unix_s: float | None = None
    ended_unix_s: float | None = None
    training_step: int | None = None
    experts_L: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[Any, ...] | None = None
    series: Mapping[Key, Series] = field(default_factory=dict)
    loads: Mapping[tuple[str, int], GroupedLoads] = field(default_factory=dict)
    bias_ranges: Mapping[int, tuple[Int64, NDArray[np.float64]]] = field(default_factory=dict)
    missing: Mapping[str, Reason] = field(default_factory=dict)
    short_of_cores: bool = False
    simulated_device: bool = False
    problems: tuple[str, ...] = ()
