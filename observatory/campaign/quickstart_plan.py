"""The quickstart's capacity plan: machines like this one that serve its spread model at a made-up target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from observatory.run.documents.writing import write_json

#: Generated tokens per second, tokens of a prompt and generated for it, and most milliseconds per token.
_TOKENS_PER_S, _CONTEXT, _OUTPUT, _MOST_MS = 50_000, 128, 64, 100.0


def quickstart_plan(runs: Sequence[Path], network: Path, out: Path, *, report: Callable[[str], None]) -> Path:
    """Plan from the runs' own steps and experts, and the fitted network.

    Args:
        runs: of one model, on one and on several ranks.
        network: fitted network of this machine.
        out: directory of the plan.
        report: called with what is made.

    Raises:
        PlanError: the runs do not state what a plan needs.
    """
    from observatory.advice.capacity.make import Request, make_plan
    from observatory.advice.capacity.plan import MODES
    from observatory.advice.capacity.site import Site
    from observatory.advice.capacity.targets import Targets
    from observatory.analysis.capacity.model_shape import model_shape
    from observatory.run import open_run

    report("capacity plan: making")
    opened = [open_run(run) for run in runs]
    document = make_plan(
        Request(
            model=model_shape(dict(opened[0].manifest.model.config or {})),
            runs=opened,
            targets=Targets(
                tokens_per_s=_TOKENS_PER_S, context=_CONTEXT, output=_OUTPUT, max_ms_per_token=_MOST_MS
            ),
            hardware=(),
            modes=MODES,
            site=Site(),
            network=network,
        )
    )
    path = out / "plan.json"
    write_json(path, document)
    return path
