"""The files that a report takes in addition to its runs: results of ``bench``, ``replay`` and ``fit``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from observatory.analysis.network import NetworkModel, load_network
from observatory.errors import BenchmarkError
from observatory.run.documents.bench import BenchResult, load_bench

Document = TypeVar("Document", BenchResult, NetworkModel)
PathText = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given(Generic[Document]):
    """One file and what it holds.

    Attributes:
        name: the file's name; its path where another file given has the same name.
        path: where it was read from.
        document: its content.
    """

    name: str
    path: Path
    document: Document


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFiles:
    """All files of one report, each kind in the order given."""

    bench: tuple[Given[BenchResult], ...] = ()
    replays: tuple[Given[BenchResult], ...] = ()
    networks: tuple[Given[NetworkModel], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.bench or self.replays or self.networks)

    def options(self) -> list[str]:
        """The options of ``observatory report`` that give these files."""
        named = (("--bench", self.bench), ("--replay", self.replays), ("--network", self.networks))
        return [word for option, files in named for file in files for word in (option, str(file.path))]


def read_benchmark_files(
    *, bench: Sequence[PathText] = (), replays: Sequence[PathText] = (), networks: Sequence[PathText] = ()
) -> BenchmarkFiles:
    """Read and check every file; a file given twice is read once.

    Raises:
        BenchmarkError: one cannot be read, is damaged, of a newer schema, or of the other kind.
    """
    paths = [_distinct(each) for each in (bench, replays, networks)]
    names = [path.name for each in paths for path in each]

    def name(path: Path) -> str:
        return path.name if names.count(path.name) == 1 else str(path)

    def read(chosen: Iterable[Path], load: Callable[[Path], Document]) -> tuple[Given[Document], ...]:
        return tuple(Given(name=name(path), path=path, document=load(path)) for path in chosen)

    return BenchmarkFiles(
        bench=read(paths[0], lambda path: _of_kind(path, "alltoall")),
        replays=read(paths[1], lambda path: _of_kind(path, "replay")),
        networks=read(paths[2], load_network),
    )


def _distinct(paths: Sequence[PathText]) -> list[Path]:
    return list(dict.fromkeys(Path(path) for path in paths))


def _of_kind(path: Path, kind: str) -> BenchResult:
    result = load_bench(path)
    if result.kind != kind:
        what = {"alltoall": ("a benchmark", "--bench"), "replay": ("a replay", "--replay")}
        raise BenchmarkError(
            f"{path} is {what[result.kind][0]}, where {what[kind][0]} was expected; "
            f"give it with {what[result.kind][1]}"
        )
    return result
