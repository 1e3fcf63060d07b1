"""Expert parallelism as arithmetic: topology, placement and traffic; only the module `scan` needs pandas."""

from observatory.analysis.parallel.placement import (
    Placement,
    PlacementFile,
    linear,
    load_placement,
    round_robin,
)
from observatory.analysis.parallel.topology import ParallelTopology
from observatory.analysis.parallel.traffic import (
    cross_node_fraction,
    cross_rank_fraction,
    fold_sources,
    load_by_rank,
    source_shares,
    traffic_matrices,
)

__all__ = [
    "ParallelTopology",
    "Placement",
    "PlacementFile",
    "cross_node_fraction",
    "cross_rank_fraction",
    "fold_sources",
    "linear",
    "load_by_rank",
    "load_placement",
    "round_robin",
    "source_shares",
    "traffic_matrices",
]
