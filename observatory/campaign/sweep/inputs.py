"""What a user asks of a clock sweep, in a form that can be run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import get_args

import numpy as np

from observatory.campaign.preflight import check_model
from observatory.campaign.workloads import (
    TEXT,
    CommandWorkload,
    Workload,
    WorkloadFacts,
    WorkloadOptions,
    model_workload,
)
from observatory.errors import ClockError
from observatory.run.manifest import Phase
from observatory.run.masking import masked_arguments

_MOST_CLOCKS = 200
#: Of a model, where the user does not say.
_MODEL_BATCH = "8"
_MODEL_CONTEXT = 1024


def parse_clocks(text: str) -> tuple[int, ...]:
    """MHz from ``780,1200`` or ``LOW:HIGH:COUNT``; ``none`` or empty text gives none.

    Raises:
        ClockError: anything else.
    """
    if text.strip() in ("", "none"):
        return ()
    if re.fullmatch(r"\d{1,5}(,\d{1,5})*", text):
        return tuple(int(part) for part in text.split(","))
    spread = re.fullmatch(r"(\d{1,5}):(\d{1,5}):(\d{1,3})", text)
    if spread is None or not 2 <= int(spread[3]) <= _MOST_CLOCKS or int(spread[1]) >= int(spread[2]):
        raise ClockError(
            f"--clocks {text[:60]!r} is no list of clocks",
            expected=f"MHz such as 780,1200 or LOW:HIGH:COUNT such as 600:1980:8, at most {_MOST_CLOCKS}",
        )
    return tuple(
        round(clock) for clock in np.linspace(int(spread[1]), int(spread[2]), int(spread[3])).tolist()
    )


def parse_limits(text: str) -> tuple[int, ...]:
    """Milliwatts from watts such as ``300,400``; ``none`` or empty text gives none.

    Raises:
        ClockError: anything else.
    """
    if text.strip() in ("", "none"):
        return ()
    if not re.fullmatch(r"\d{1,4}(\.\d{1,3})?(,\d{1,4}(\.\d{1,3})?)*", text):
        raise ClockError(f"--limits {text[:60]!r} is no list of watts", expected="one such as 300,400,500")
    return tuple(round(1000 * float(part)) for part in text.split(","))


def make_workloads(
    options: WorkloadOptions,
) -> tuple[int, contextlib.AbstractContextManager[list[Workload]]]:
    """How many workloads the sweep has, and the workloads themselves: made on entry, ended on exit.

    Raises:
        ClockError: neither or both of model and program, or options that do not fit.
        ModelError: as of :func:`observatory.campaign.preflight.check_model`.
    """
    model, phase = options.model, options.phase
    if (model is None) == (not options.program):
        raise ClockError("what is to be swept? give --model, or your own program after `--`, and not both")
    if phase not in get_args(Phase) or (model is not None and phase not in ("prefill", "decode")):
        raise ClockError(f"--phase {phase[:40]!r} is unknown", expected="prefill or decode")
    batch = _MODEL_BATCH if options.batch is None and model is not None else options.batch
    batches = [] if batch is None else batch.split(",")
    sizes = list(dict.fromkeys(int(part) for part in batches if re.fullmatch(r"[1-9]\d{0,6}", part)))
    if len(sizes) != len(batches) or (model is None and len(sizes) > 1):
        raise ClockError(
            f"--batch {','.join(batches)[:60]!r} is no list of sizes, each once",
            expected="one such as 1,8,32, or a single size for your own program",
        )
    if model is not None:
        check_model(
            model,
            device=options.torch_device,
            dtype=options.dtype,
            data=TEXT,
            positions=(options.context or _MODEL_CONTEXT) + (phase == "decode"),
            lower="--context",
        )

    @contextlib.contextmanager
    def start() -> Iterator[list[Workload]]:
        with contextlib.ExitStack() as stack:
            if model is None:
                facts = WorkloadFacts(
                    name=" ".join(masked_arguments(options.program))[:200],
                    phase=phase,  # type: ignore[arg-type]  # checked above
                    batch_size=sizes[0] if sizes else None,
                    context_tokens=options.context,
                    tokens_per_iteration=options.tokens_per_iteration,
                )
                workload = CommandWorkload(options.program, facts)
                stack.callback(workload.close)
                yield [workload]
                return
            yield [
                stack.enter_context(
                    model_workload(
                        model,
                        phase=phase,  # type: ignore[arg-type]  # one of the two, checked above
                        batch_size=size,
                        context_tokens=options.context or _MODEL_CONTEXT,
                        device=options.torch_device,
                        dtype=options.dtype,
                    )
                )
                for size in sizes
            ]

    return max(1, len(sizes)), start()
