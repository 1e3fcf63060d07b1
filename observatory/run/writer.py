"""Writer of a run directory, one per rank: its rows, its status and, from rank 0, the manifest."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa
import pydantic

from observatory.errors import ObservatoryError, RunError, RunFormatError
from observatory.run.appender import TableAppender
from observatory.run.files import (
    MANIFEST_NAME,
    RANKS_FOLDER,
    one_line,
    os_reason,
    rank_folder,
    sync_folder,
)
from observatory.run.manifest import (
    CapturedSteps,
    CaptureGap,
    ClockSpec,
    Manifest,
    ModelSpec,
    RankLayer,
    RankPower,
    RankStatus,
    SelfMeasured,
    StepMark,
    Topology,
)
from observatory.run.manifest_files import (
    read_manifest,
    read_rank_statuses,
    write_manifest,
    write_rank_status,
)
from observatory.run.masking import masked_text
from observatory.run.provenance import RankProvenance
from observatory.run.replacing import check_free, empty_run
from observatory.run.time_base import clock_identity, clock_name
from observatory.run.usable_cores import find_cores

#: Between two looks for the run that rank 0 makes: a thousand ranks may look.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0


class RunWriter:
    """Appends rows of one rank to a run directory; made by :meth:`create` (rank 0) or :meth:`join`.

    Every method may be called from any thread. As a context manager it closes the run, as failed when an
    exception passes through.

    Attributes:
        path: the run directory.
        rank: rank of this writer.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        rank: int,
        host: str | None,
        provenance: RankProvenance | None,
        measured_here: bool = True,
    ) -> None:
        self.path = path
        self.rank = rank
        self._appender = TableAppender(path, rank=rank, ranks=manifest.topology.ranks)
        self._manifest = manifest
        self._measured_here = measured_here
        self._host = None if not measured_here else one_line(host or socket.gethostname(), 255)
        self._lock = threading.RLock()
        self._closed = False
        self._ending: tuple[str, int] | None = None
        self._clock = ClockSpec(
            method="none", identity=clock_name(clock_identity()) if measured_here else None
        )
        self._cores = find_cores() if measured_here else None
        self._provenance = provenance
        self._power: RankPower | None = None
        self._moe_layers: tuple[RankLayer, ...] | None = None
        self._gaps: tuple[CaptureGap, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._captured: tuple[CapturedSteps, ...] | None = None
        self._self_measured: SelfMeasured | None = None
        self._marks: tuple[StepMark, ...] = ()
        self._written: RankStatus | None = None
        self._holds_status = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        manifest: Manifest,
        *,
        overwrite: bool = False,
        provenance: RankProvenance | None = None,
        measured_here: bool = True,
    ) -> Self:
        """Make the run directory as rank 0.

        Args:
            path: where; parents are made. An existing empty directory is used.
            manifest: the run's manifest; its state is set to ``running``.
            overwrite: empty an existing run directory first. Only files of the run format are removed.
            provenance: where the rank runs; None where that is not known.
            measured_here: False where the rows come from elsewhere: host, cores and clock of this process are
                then not stated.

        Raises:
            RunError: something else is in the way, or the directory cannot be made.
        """
        folder = Path(path)
        running = manifest.model_copy(update={"state": "running", "ended_unix_s": None, "ranks": ()})
        was_there = folder.exists()
        made = False
        try:
            check_free(folder, overwrite=overwrite)
            if folder.exists():
                empty_run(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RANKS_FOLDER).mkdir()  # one process alone can make it
            made = True
            sync_folder(folder)
            sync_folder(folder.absolute().parent)
            writer = cls(
                folder, running, rank=0, host=None, provenance=provenance, measured_here=measured_here
            )
            writer._write_status("running")
            write_manifest(folder, running)
        except FileExistsError as error:
            raise RunError(
                f"run {folder} is made by another process at this moment", remedy="choose another place"
            ) from error
        except OSError as error:
            if made:
                with contextlib.suppress(OSError):
                    empty_run(folder)
                    if not was_there:
                        folder.rmdir()
            raise RunError(
                f"run {folder} cannot be made: {os_reason(error)}",
                remedy="choose a writable place with free space",
            ) from error
        return writer

    @classmethod
    def join(
        cls,
        path: str | os.PathLike[str],
        *,
        rank: int,
        host: str | None = None,
        run_id: str | None = None,
        ranks: int | None = None,
        timeout_s: float = 60.0,
        provenance: RankProvenance | None = None,
        measured_here: bool = True,
        wait: Callable[[float], object] = time.sleep,
    ) -> Self:
        """Write as another rank into the run that rank 0 makes.

        Args:
            path: the run directory.
            rank: this rank, 1 to topology.ranks - 1.
            host: host name to record; this machine's by default.
            run_id: wait for the run of this id, where an older run may still lie at ``path``.
            ranks: number of ranks, where rank 0 is known to have made the run ``run_id``. Nothing of its
                files is then waited for or read, and the folder is made where it is missing: the ranks of
                each node may write to storage of their own, to be copied into one directory later.
            timeout_s: how long to wait for rank 0.
            provenance: where the rank runs; None where that is not known.
            measured_here: as for `create`.
            wait: returns after so many seconds, or as soon as rank 0 is known to have made the run.

        Raises:
            RunError: no such run within the time, or the rank does not fit it.
        """
        folder = Path(path)
        if ranks is None or run_id is None:
            manifest = _await_run(folder, run_id, timeout_s, wait)
        else:
            manifest = Manifest(
                run_id=run_id,
                created_unix_s=time.time(),
                model=ModelSpec(name="of rank 0"),
                topology=Topology(ranks=ranks),
            )
        if not 0 < rank < manifest.topology.ranks:
            raise RunError(
                f"rank {rank} does not fit run {folder} of {manifest.topology.ranks} ranks",
                remedy="create the run with the real number of ranks (rank 0 creates, the others join)",
            )
        if (folder / RANKS_FOLDER / f"{rank_folder(rank)}.json").exists():
            raise RunError(
                f"rank {rank} has already written to run {folder}", remedy="write a new run instead"
            )
        writer = cls(
            folder, manifest, rank=rank, host=host, provenance=provenance, measured_here=measured_here
        )
        try:
            (folder / RANKS_FOLDER).mkdir(parents=True, exist_ok=True)
            writer._write_status("running")
        except OSError as error:
            raise RunError(f"run {folder} cannot be joined by rank {rank}: {os_reason(error)}") from error
        return writer

    @property
    def dropped_rows(self) -> int:
        """Rows that could not be written, 0 normally."""
        return self._appender.dropped_rows

    @property
    def bytes_written(self) -> int:
        """Bytes of table files, each time that they were written."""
        return self._appender.bytes_written

    @property
    def manifest(self) -> Manifest:
        """The manifest as this writer knows it."""
        return self._manifest

    def append(self, table: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Buffer rows; a part is written when enough have gathered.

        Args:
            table: one of ``TABLES``.
            rows: rows of that table's schema; nullable columns may be left out, further columns are kept.

        Raises:
            RunFormatError: rows of another schema, rank or phase. Nothing is kept of them.
            LoadError: impossible loads or expert ids. Nothing is kept of them.
            RunError: a part could not be written; its rows are dropped and counted.
        """
        self._appender.append(table, rows)

    def flush(self) -> None:
        """Write everything that is buffered.

        Raises:
            RunError: a part could not be written; its rows are dropped and counted, the others written.
        """
        self._appender.flush()

    @contextlib.contextmanager
    def status_once(self) -> Iterator[None]:
        """What is stated of this rank inside the block is written once, at its end."""
        with self._lock:
            self._holds_status = True
        try:
            yield
        finally:
            with self._lock:
                self._holds_status = False
                self._note_status()

    def set_clock(self, clock: ClockSpec) -> None:
        """State how this rank's clock relates to the others'; written at once, and when the writer closes.

        Without it the rank's status says only which clock it reads, which is enough for ranks of one host.
        """
        with self._lock:
            self._clock = clock
            self._note_status()

    def set_power(self, power: RankPower) -> None:
        """State what is sampled of this rank's devices; written at once, and when the writer closes."""
        with self._lock:
            self._power = power
            self._note_status()

    def set_moe_layers(self, layers: tuple[RankLayer, ...]) -> None:
        """State the MoE layers that this rank holds; written at once, and when the writer closes.

        The reader leaves out rows of a rank whose layers are not those of the ranks before it.
        """
        with self._lock:
            self._moe_layers = layers
            self._note_status()

    def set_gaps(self, gaps: tuple[CaptureGap, ...]) -> None:
        """State what this rank did not capture; written at once where it changes, and at the end."""
        with self._lock:
            if gaps != self._gaps:
                self._gaps = gaps
                self._note_status()

    def set_captured(self, captured: tuple[CapturedSteps, ...] | None) -> None:
        """State which steps are captured; None: all. Written at once where it changes, and at the end."""
        with self._lock:
            if captured != self._captured:
                self._captured = captured
                self._note_status()

    def set_self_measured(self, measured: SelfMeasured) -> None:
        """State what watching has cost so far; written at once, and at the end."""
        with self._lock:
            self._self_measured = measured
            self._note_status()

    def add_mark(self, mark: StepMark) -> None:
        """State a moment that was named; written at once, and at the end."""
        with self._lock:
            self._marks = (*self._marks, mark)
            self._note_status()

    def set_notes(self, notes: tuple[str, ...]) -> None:
        """State limits of what this rank captured; written when the writer closes."""
        with self._lock:
            self._notes = tuple(one_line(note, 4096) for note in notes)

    def update_manifest(self, **changes: Any) -> None:
        """Change fields of the manifest and write it; rank 0 only.

        Raises:
            RunError: on another rank, with values that do not fit, or when it cannot be written.
        """
        with self._lock:
            if self.rank != 0:
                raise RunError(f"rank {self.rank} cannot change the manifest; only rank 0 writes it")
            try:
                changed = Manifest.model_validate({**self._manifest.model_dump(), **changes})
            except pydantic.ValidationError as error:
                raise RunError(f"manifest change is not valid: {one_line(error)}") from error
            self._manifest = changed
            self._guarded("run.json", lambda: write_manifest(self.path, changed))

    def mark_ending(self, reason: str, *, steps: int = 0) -> None:
        """State that the rank is about to end, and flush; the writer stays open and says more when it closes.

        For a rank that may be killed at any moment: what cannot be written is left out.

        Args:
            reason: one line; stands in the status as the error of a failed rank.
            steps: steps the rank has completed.
        """
        with self._lock:
            self._ending = (one_line(reason, 1000), steps)
            self._holds_status = False
            self._note_status()
            if not self._closed:
                with contextlib.suppress(RunError):
                    self._appender.flush()

    def close(
        self, *, state: Literal["complete", "failed"] = "complete", error: str | None = None, steps: int = 0
    ) -> None:
        """Flush and state how the rank ended; closing twice does nothing.

        Args:
            state: ``complete`` or ``failed``.
            error: one line when failed.
            steps: steps the rank completed.

        Raises:
            RunError: rows or the status could not be written. What was written before stays readable.
        """
        with self._lock:
            if self._closed:
                return
            failure: RunError | None = None
            try:
                self._appender.close()
            except RunError as flush_error:
                failure = flush_error
                state, error = "failed", error or str(flush_error)
            self._closed = True
            reason = None if error is None else one_line(masked_text(error), 1000)
            try:
                self._guarded("its status", lambda: self._write_status(state, error=reason, steps=steps))
                if self.rank == 0:
                    self._close_manifest(state)
            except RunError as status_error:
                failure = failure or status_error
            if failure is not None:
                raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(state="failed", error=f"{type(error).__name__}: {error}")
        except ObservatoryError as close_error:
            error.add_note(f"and the run could not be closed: {close_error}")

    def _close_manifest(self, state: Literal["complete", "failed"]) -> None:
        statuses, _ = read_rank_statuses(self.path)
        ended = self._manifest.model_copy(
            update={
                "state": state,
                "ended_unix_s": time.time(),
                "ranks": tuple(_in_short(statuses[rank]) for rank in sorted(statuses)),
            }
        )
        self._manifest = ended
        self._guarded(MANIFEST_NAME, lambda: write_manifest(self.path, ended))

    def _note_status(self) -> None:
        """Write what is known so far, for a reader of a run that is killed; closing says what fails."""
        if not (self._closed or self._holds_status):
            with contextlib.suppress(OSError):
                if self._ending is None:
                    self._write_status("running")
                else:
                    self._write_status("failed", error=self._ending[0], steps=self._ending[1])

    def _write_status(
        self, state: Literal["running", "complete", "failed"], *, error: str | None = None, steps: int = 0
    ) -> None:
        status = RankStatus(
            rank=self.rank,
            state=state,
            host=self._host,
            error=error,
            steps=steps,
            dropped_rows=self.dropped_rows,
            clock=self._clock,
            power=self._power,
            gaps=self._gaps,
            notes=self._notes,
            moe_layers=self._moe_layers,
            cores=self._cores,
            provenance=self._provenance,
            captured=self._captured,
            self_measured=self._self_measured,
            marks=self._marks,
        )
        if status == self._written:
            return
        if self._measured_here:
            now = {"unix_minus_monotonic_ns": time.time_ns() - time.monotonic_ns()}
            dated = status.model_copy(update={"clock": self._clock.model_copy(update=now)})
        else:
            dated = status
        write_rank_status(self.path, dated)
        self._written = status

    def _guarded(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise RunError(
                f"rank {self.rank} cannot write {what} of run {self.path}: {os_reason(error)}; "
                "parts written before are intact"
            ) from error


def _in_short(status: RankStatus) -> RankStatus:
    """A status without its lists: those of thousands of ranks would make the file too large to read."""
    where = None if status.provenance is None else status.provenance.in_short()
    return status.model_copy(
        update={"moe_layers": None, "gaps": (), "notes": (), "marks": (), "provenance": where}
    )


def _await_run(
    folder: Path, run_id: str | None, timeout_s: float, wait: Callable[[float], object]
) -> Manifest:
    deadline = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            manifest = read_manifest(folder)
        except RunFormatError:
            raise
        except RunError:
            manifest = None
        if manifest is not None and (
            manifest.state == "running" if run_id is None else manifest.run_id == run_id
        ):
            return manifest
        if time.monotonic() >= deadline:
            wanted = "a running run" if run_id is None else f"run id {one_line(run_id, 60)}"
            raise RunError(
                f"{folder} holds not {wanted} after {timeout_s:g} s; rank 0 must create the run on a file "
                "system that all ranks share"
            )
        wait(min(pause_s, max(0.0, deadline - time.monotonic())))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
