"""One pass of a model for the sake of its verdicts: are its routing counts what its experts compute?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from observatory.errors import CaptureError
from observatory.probes.options import RoutingOptions, Verify
from observatory.probes.routing.probe import RoutingProbe
from observatory.probes.routing.sites import RoutingSite
from observatory.run.manifest import Verified


def verify_sites(
    model: nn.Module, sites: Sequence[RoutingSite], call: Callable[[], object], *, verify: Verify
) -> tuple[tuple[Verified, ...], str | None]:
    """Run a model once under the routing probe; nothing that is counted is kept.

    Args:
        model: the model.
        sites: its MoE layers, from ``find_sites``.
        call: runs the model; without gradients.
        verify: which witness looks at the calls.

    Returns:
        What confirmed each site, and why nothing of the model may be counted, None when nothing speaks
        against it.

    Raises:
        CaptureError: a call could not be read.
    """
    probe = RoutingProbe(model, sites, RoutingOptions(verify=verify))
    probe.attach()
    try:
        with torch.no_grad():
            call()
        probe.take(step=0, stated_phase=None, ends_step=True)
    finally:
        probe.detach()
        probe.release()
    refusal, problem = probe.refusal(), probe.problem()
    if refusal is None and problem is not None:
        raise CaptureError(problem)
    return probe.verified(), refusal
