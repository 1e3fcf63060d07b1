"""A network model of a run's own exchanges: for the run's ranks and its flat exchanges, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observatory.analysis.network.fitting import fit_network
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.network.run_exchanges import run_exchanges
from observatory.run.documents.bench import BenchCase, BenchResult

if TYPE_CHECKING:
    from observatory.run import Run

#: Fewer exchanges do not fit a form and leave some out of it.
_FEWEST = 64
_STEPS = 32


def network_of_run(run: Run) -> NetworkModel | None:
    """A model fitted to exchanges of all ranks whose time without waiting is known; None for too few of them.

    Every exchange counts once, as a matrix that was measured once, so that how far repeats scatter is not
    known.
    """
    measured, _ = run_exchanges(run, steps=_STEPS)
    ranks = run.manifest.topology.ranks
    whole = [item for item in measured if not item.part and len(item.node_of_P) == ranks]
    if len(whole) < _FEWEST or len({item.backend for item in whole}) > 1:
        return None
    return fit_network(
        [
            BenchResult(
                kind="replay",
                created_unix_s=run.manifest.created_unix_s,
                backend=whole[0].backend or "not recorded",
                node_of_P=whole[0].node_of_P,
                warmup=0,
                repeats=1,
                iterations=1,
                cases=tuple(
                    BenchCase(
                        pattern="own",
                        algorithm="flat",
                        send_bytes_PP=tuple(map(tuple, item.bytes_PP.tolist())),
                        step=item.step,
                        phase=item.phase,
                        layer=item.layer,
                        role="dispatch" if item.role == "dispatch" else "combine",
                        rank_us_RP=((item.us,) * ranks,),
                        correct=True,
                    )
                    for item in whole
                ),
                run_id=run.manifest.run_id,
                hosts=run.manifest.hosts,
                cores_P=None,
            )
        ],
        sources=("the run's own exchanges",),
    )
