"""What is known of a run before a part of it is opened, and its parts, rank by rank.

The head of a run is read once; the parts of a rank (its shard) can then be opened by whoever works on them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from observatory.run.gaps import Gap, of_capture, of_ranks
from observatory.run.layers import JoinedLayers, join_layers
from observatory.run.manifest import Manifest
from observatory.run.manifest_files import joined_notes, read_manifest, read_rank_statuses
from observatory.run.parts import Part, list_rank_folders, list_rank_parts
from observatory.run.tables import TABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHead:
    """A run without its tables.

    Attributes:
        path: the directory.
        manifest: with the status of every rank that left one, and the notes of all.
        layers: MoE layers of all ranks.
        ranks_of: ranks of the run that have a folder, ascending, by table.
        problems_of: what else lies in the folders of tables, a sentence each, by table.
        status_problems: the same of the ranks' status files.
    """

    path: Path
    manifest: Manifest
    layers: JoinedLayers
    ranks_of: Mapping[str, tuple[int, ...]]
    problems_of: Mapping[str, tuple[str, ...]]
    status_problems: tuple[str, ...]

    @property
    def shards(self) -> tuple[int, ...]:
        """Ranks that have a folder in some table, ascending."""
        return tuple(sorted({rank for ranks in self.ranks_of.values() for rank in ranks}))

    @property
    def joined_manifest(self) -> Manifest:
        """The manifest with the MoE layers of all ranks."""
        model = self.manifest.model.model_copy(update={"moe_layers": self.layers.moe_layers})
        return self.manifest.model_copy(update={"model": model})

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that was passed over."""
        return (*self.status_problems, *(text for texts in self.problems_of.values() for text in texts))

    def gaps(self, routed: Collection[int]) -> tuple[Gap, ...]:
        """What the ranks' statuses say about missing data; ``routed``: ranks with readable routing parts."""
        return (*of_ranks(self.manifest, routed), *of_capture(self.manifest))

    def to_json(self) -> str:
        """As text, for another process; `from_json` reads it."""
        document = {
            "path": str(self.path),
            "manifest": self.manifest.model_dump(mode="json"),
            "ranks_of": dict(self.ranks_of),
            "problems_of": dict(self.problems_of),
            "status_problems": self.status_problems,
        }
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> RunHead:
        """What `to_json` wrote."""
        document = json.loads(text)
        manifest = Manifest.model_validate(document["manifest"])
        return cls(
            path=Path(document["path"]),
            manifest=manifest,
            layers=join_layers(manifest),
            ranks_of={table: tuple(ranks) for table, ranks in document["ranks_of"].items()},
            problems_of={table: tuple(texts) for table, texts in document["problems_of"].items()},
            status_problems=tuple(document["status_problems"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundParts:
    """Parts of some ranks.

    Attributes:
        parts: readable ones by rank and number, by table.
        problems_of: what is missing, damaged or passed over, by table.
        unreadable: those of the problems that are about parts that cannot be read.
    """

    parts: Mapping[str, tuple[Part, ...]]
    problems_of: Mapping[str, tuple[str, ...]]
    unreadable: tuple[str, ...]


def read_head(path: Path) -> RunHead:
    """Read the manifest and the ranks' status files, and list the folders of the tables.

    Raises:
        RunError: the directory does not exist or is no run directory, or cannot be listed.
        RunFormatError: the manifest is damaged, or the schema is newer.
    """
    manifest = read_manifest(path)
    written, status_problems = read_rank_statuses(path)
    # A rank's own file is newer than what rank 0 knew when it closed.
    statuses = {status.rank: status for status in manifest.ranks} | written
    ranks = tuple(statuses[rank] for rank in sorted(statuses))
    manifest = manifest.model_copy(update={"ranks": ranks, "notes": joined_notes(manifest, ranks)})
    most = manifest.topology.ranks
    ranks_of: dict[str, tuple[int, ...]] = {}
    problems_of: dict[str, tuple[str, ...]] = {}
    for table in TABLES:
        found, problems = list_rank_folders(path, table)
        outside = [
            f"{table}: rank {rank} is outside the run's {most} ranks and was passed over"
            for rank in found
            if rank >= most
        ]
        ranks_of[table] = tuple(rank for rank in found if rank < most)
        problems_of[table] = (*outside, *problems)
    return RunHead(
        path=path,
        manifest=manifest,
        layers=join_layers(manifest),
        ranks_of=ranks_of,
        problems_of=problems_of,
        status_problems=tuple(status_problems),
    )


def shard_ranks(path: Path) -> list[int]:
    """Ranks that have a folder in some table of a run directory, ascending; no file is read.

    Raises:
        RunError: a folder cannot be listed.
    """
    return sorted({rank for table in TABLES for rank in list_rank_folders(path, table)[0]})


def list_parts(head: RunHead, ranks: Iterable[int], *, newest: int | None = None) -> FoundParts:
    """Parts of these ranks; their footers are read.

    Args:
        head: of the run.
        ranks: the ranks.
        newest: parts of each table and rank, counted from the newest; None: all.

    Raises:
        RunFormatError: a part has wrong columns.
        RunError: a folder cannot be listed.
    """
    chosen = set(ranks)
    parts: dict[str, tuple[Part, ...]] = {}
    problems_of: dict[str, tuple[str, ...]] = {}
    all_unreadable: list[str] = []
    for table in TABLES:
        of_table: list[Part] = []
        stated: list[str] = []
        damaged: list[str] = []
        for rank in sorted(chosen.intersection(head.ranks_of[table])):
            found, problems, unreadable = list_rank_parts(head.path, table, rank, newest=newest)
            of_table += found
            stated += problems
            damaged += unreadable
        parts[table] = tuple(of_table)
        problems_of[table] = (*stated, *damaged)
        all_unreadable += damaged
    return FoundParts(parts=parts, problems_of=problems_of, unreadable=tuple(all_unreadable))
