"""Where runs ran, as facts that may explain a difference between them."""

from __future__ import annotations

from typing import Any

from observatory.analysis.compare.words import CompareCode
from observatory.analysis.provenance.nodes import common_settings, common_versions
from observatory.analysis.provenance.words import fabric_words, gibibytes, others_words
from observatory.run.manifest import Manifest

#: Settings that are other ones in every job.
_OF_A_JOB = {"MASTER_ADDR", "MASTER_PORT"}


def provenance_facts(manifest: Manifest) -> dict[str, Any]:
    """Where the ranks ran; empty where they do not state it, as in runs before schema 1.5."""
    stated = [rank.provenance for rank in manifest.ranks if rank.provenance is not None]
    if not stated:
        return {}
    job = manifest.scheduler
    versions = common_versions(manifest.ranks)
    return {
        CompareCode.OTHER_PARTITION: job and [job.cluster, job.partition],
        CompareCode.OTHER_NETWORK: sorted({fabric_words(each.fabric) or "none seen" for each in stated}),
        CompareCode.OTHER_NUMA: sorted({each.numa_nodes for each in stated if each.numa_nodes}),
        CompareCode.OTHER_MEMORY_LIMIT: sorted(
            {gibibytes(each.memory_limit_bytes) for each in stated if each.memory_limit_bytes}
        ),
        CompareCode.OTHER_NEIGHBOURS: others_words(
            max((each.other_jobs for each in stated if each.other_jobs is not None), default=None),
            max((each.other_users for each in stated if each.other_users is not None), default=None),
        ),
        CompareCode.OTHER_SYSTEM: {
            name: version for name, version in versions.items() if name not in manifest.software
        },
        CompareCode.OTHER_SETTINGS: {
            name: value for name, value in common_settings(manifest.ranks).items() if name not in _OF_A_JOB
        },
    }
