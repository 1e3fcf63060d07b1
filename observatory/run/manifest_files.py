"""Reading and writing of ``run.json`` and of the ranks' own status files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pydantic

from observatory.errors import RunError, RunFormatError
from observatory.run.captured import captured_sentence
from observatory.run.files import (
    MANIFEST_NAME,
    RANKS_FOLDER,
    is_temporary,
    one_line,
    plain_entries,
    rank_folder,
    rank_number,
    read_json,
    write_json,
)
from observatory.run.manifest import SCHEMA_VERSION, Manifest, RankStatus
from observatory.text import listing


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``run.json`` atomically."""
    write_json(path / MANIFEST_NAME, manifest.model_dump_json(indent=1))


def write_rank_status(path: Path, status: RankStatus) -> None:
    """Write ``ranks/rank-NNNNN.json`` atomically."""
    write_json(path / RANKS_FOLDER / f"{rank_folder(status.rank)}.json", status.model_dump_json(indent=1))


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a run directory.

    Raises:
        RunError: no such directory, or it holds no ``run.json``.
        RunFormatError: ``run.json`` is damaged or of a newer major schema.
    """
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise RunError(f"run {path} {state}", expected="a run directory", remedy="check the path")
    file = path / MANIFEST_NAME
    if not file.exists() and not file.is_symlink():
        raise RunError(
            f"{path} is no run directory: it has no {MANIFEST_NAME}", remedy="give the folder a capture wrote"
        )
    document = read_json(file, f"{MANIFEST_NAME} of {path}")
    version = document.get("schema_version")
    match = re.fullmatch(r"(\d{1,6})\.\d{1,6}", version, re.ASCII) if isinstance(version, str) else None
    if match is None:
        raise RunFormatError(
            f"{file}: schema_version is {one_line(repr(version), 60)}", expected=f"like {SCHEMA_VERSION}"
        )
    if int(match[1]) > int(SCHEMA_VERSION.partition(".")[0]):
        raise RunFormatError(
            f"{path} has schema {version} but this program reads up to {SCHEMA_VERSION}",
            remedy="install a newer moe-observatory",
        )
    try:
        return Manifest.model_validate(document)
    except (pydantic.ValidationError, RecursionError) as error:
        raise RunFormatError(
            f"{file} is not a valid manifest: {_first_fault(error)}", remedy="restore the file"
        ) from error


def joined_notes(manifest: Manifest, statuses: Sequence[RankStatus]) -> tuple[str, ...]:
    """The notes of the run and of its ranks, each once; those that not all ranks have name the ranks.

    Which steps a rank captured, where not all, is one of them.
    """
    ranks_of: dict[str, list[int]] = {}
    for status in statuses:
        captured = () if status.captured is None else (captured_sentence(status.captured),)
        for note in dict.fromkeys((*status.notes, *captured)):
            ranks_of.setdefault(note, []).append(status.rank)
    notes = dict.fromkeys(manifest.notes)
    for note, ranks in ranks_of.items():
        is_all = len(ranks) >= min(manifest.topology.ranks, len(statuses))
        whose = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing([str(r) for r in ranks])}"
        notes[note if is_all else f"{whose}: {note}"] = None
    return tuple(notes)


def _first_fault(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return one_line(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}", 200)
    return "nested too deeply"


def read_rank_status(path: Path, rank: int) -> RankStatus | None:
    """One rank's status file; None where there is none that can be read."""
    name = f"{rank_folder(rank)}.json"
    try:
        return RankStatus.model_validate(read_json(path / RANKS_FOLDER / name, f"{RANKS_FOLDER}/{name}"))
    except (RunError, pydantic.ValidationError, RecursionError):
        return None


def read_rank_statuses(path: Path) -> tuple[dict[int, RankStatus], list[str]]:
    """Read every rank's status file.

    Returns:
        Status by rank, and stated problems: files that could not be read, leftovers, foreign names.
    """
    folder = path / RANKS_FOLDER
    statuses: dict[int, RankStatus] = {}
    problems: list[str] = []
    if folder.is_symlink() or not folder.is_dir():
        return statuses, [f"folder {RANKS_FOLDER}/ is missing: no rank says how it ended"]
    names, passed_over = plain_entries(folder, want_folders=False)
    problems += [f"{RANKS_FOLDER}/{text} was passed over" for text in passed_over]
    for name in names:
        rank = rank_number(name.removesuffix(".json")) if name.endswith(".json") else None
        if is_temporary(name):
            problems.append(f"{RANKS_FOLDER}/{one_line(name, 80)} was never finished")
        elif rank is None:
            problems.append(f"{RANKS_FOLDER}/{one_line(name, 80)} is no rank status; passed over")
        else:
            try:
                status = RankStatus.model_validate(read_json(folder / name, f"{RANKS_FOLDER}/{name}"))
            except (RunError, pydantic.ValidationError, RecursionError) as error:
                fault = one_line(error, 200) if isinstance(error, RunError) else _first_fault(error)
                problems.append(f"{RANKS_FOLDER}/{name} cannot be used: {fault}")
                continue
            if status.rank == rank:
                statuses[rank] = status
            else:
                problems.append(f"{RANKS_FOLDER}/{name} is of rank {status.rank}; passed over")
    return statuses, problems
