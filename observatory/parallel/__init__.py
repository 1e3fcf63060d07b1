"""Expert parallelism as arithmetic: topology, placement, traffic, and the scan over EP degrees."""

from observatory.parallel.placement import Placement, PlacementFile, linear, load_placement, round_robin
from observatory.parallel.scan import scan_run, traffic_matrix
from observatory.parallel.topology import ParallelTopology
from observatory.parallel.traffic import (
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
