"""Expert parallelism as arithmetic: topology, placement, traffic, and the scan over EP degrees."""

from observatory.analysis.parallel.placement import (
    Placement,
    PlacementFile,
    linear,
    load_placement,
    round_robin,
)
from observatory.analysis.parallel.scan import scan_run, traffic_matrix
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
    "scan_run",
    "source_shares",
    "traffic_matrices",
    "traffic_matrix",
]
