"""Reading a run directory: what it holds, what is missing, and its tables as frames or streams.

Everything in a run directory is untrusted. Damaged parts are left out and stated in ``Run.problems``;
rows that cannot be true (negative loads, another rank's rows) are errors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from observatory.errors import LoadError, RunError, RunFormatError
from observatory.run.blocks import LoadBlock, stream_blocks
from observatory.run.checks import FIXED_SCHEMAS, check_rows
from observatory.run.coverage import Coverage
from observatory.run.files import one_line, rank_folder
from observatory.run.gaps import Gap, sentence
from observatory.run.head import FoundParts, RunHead, list_parts, read_head
from observatory.run.layers import JoinedLayers
from observatory.run.manifest import PHASES, Manifest
from observatory.run.parts import Part, Unreadable, plain_text, read_row_group, read_row_groups
from observatory.run.rows import MAX_LOAD, MAX_STEP
from observatory.run.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd

#: Frames larger than this are refused in favour of the streaming iterators.
_MAX_FRAME_ROWS = 20_000_000
_MAX_FRAME_BYTES = 4 * 1024 * 1024 * 1024

#: Row groups that are read together where all rows are gathered anyway.
BATCH_BYTES = 8 * 1024 * 1024

#: Layers of a run that have rows: analyses work through each of them.
_MAX_LAYERS = 1024
#: Different values that one rank may have in a column: work and pages grow with each.
_MOST_DIFFERENT = {"layer": _MAX_LAYERS, "group": 256, "device_uuid": 128}

#: Counts of all rows together; analyses add them up in 64 bits.
_MAX_SUM = 2.0**62


def open_run(path: str | os.PathLike[str]) -> Run:
    """See :meth:`Run.open`."""
    return Run.open(path)


class Run:
    """A run directory that was opened by :func:`open_run`.

    Attributes:
        path: the directory.
        manifest: its manifest, with the status of every rank that left one, and the MoE layers and notes of
            all ranks.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        parts: dict[str, tuple[Part, ...]],
        problems: list[str | Gap],
        problems_of: dict[str, tuple[str, ...]],
        layers: JoinedLayers,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._parts = parts
        self._layers = layers
        self._problems = list(dict.fromkeys(problems))
        self._problems_of = problems_of

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run directory.

        Only the manifest, the ranks' status files and the parts' footers are read.

        Raises:
            RunError: the directory does not exist or is no run directory.
            RunFormatError: the manifest is damaged, the schema is newer, a part has wrong columns, or the run
                has parts but not one of them can be read.
        """
        head = read_head(Path(path))
        found = list_parts(head, head.shards)
        if found.unreadable and not any(found.parts.values()):
            raise RunFormatError(
                f"none of the {len(found.unreadable)} parts of run {head.path} can be read "
                f"({found.unreadable[0]})",
                remedy="capture it again",
            )
        gaps = head.gaps({part.rank for part in found.parts["routing"]})
        return cls._of(head, found, [*head.layers.contradictions.values(), *gaps, *head.problems])

    @classmethod
    def open_tail(cls, path: str | os.PathLike[str], *, parts: int) -> Self:
        """Open the newest parts of each rank and table of a run, as of one that is being written.

        Its problems are those of these parts: what the rest of the run lacks is not looked for.

        Args:
            path: the directory.
            parts: of each table and rank.

        Raises:
            RunError, RunFormatError: as of `open`.
        """
        head = read_head(Path(path))
        return cls._of(head, list_parts(head, head.shards, newest=parts), [])

    @classmethod
    def open_shard(cls, head: RunHead, rank: int) -> Self:
        """Open what one rank left: footers of its own parts are read, nothing else.

        Its problems are those of these files alone.

        Raises:
            RunFormatError: a part has wrong columns.
            RunError: a folder cannot be listed.
        """
        return cls._of(head, list_parts(head, (rank,)), [])

    @classmethod
    def _of(cls, head: RunHead, found: FoundParts, problems: list[str | Gap]) -> Self:
        parts = dict(found.parts)
        for table in ("routing", "tokens", "router_bias"):
            parts[table] = tuple(part for part in parts[table] if part.rank not in head.layers.contradictions)
        return cls(
            head.path,
            head.joined_manifest,
            parts,
            [*problems, *(text for texts in found.problems_of.values() for text in texts)],
            {table: (*head.problems_of[table], *found.problems_of[table]) for table in TABLES},
            head.layers,
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """Stated gaps: missing or unclosed ranks, steps that are missing or partial, damaged parts.

        Reading may find more and add them: rows that are not there are known when all loads were streamed.
        """
        return tuple(sentence(item) if isinstance(item, Gap) else item for item in self._problems)

    def problems_of(self, table: str) -> tuple[str, ...]:
        """Those of the problems that are about files of one table."""
        return self._problems_of.get(table, ())

    @property
    def damage(self) -> tuple[str, ...]:
        """Those of the problems that are about files and bytes of files: no gaps."""
        return tuple(item for item in self._problems if not isinstance(item, Gap))

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Those of the problems that have a code and values."""
        return tuple(item for item in self._problems if isinstance(item, Gap))

    def holds_layer(self, rank: int, layer: int) -> bool:
        """Whether a rank may have rows of a layer; False where it states its layers without this one."""
        return self._layers.holds(rank, layer)

    def has_parts(self, table: str) -> bool:
        """Whether there are readable parts of a table."""
        return bool(self._parts_of(table))

    def written_unix_s(self, rank: int) -> float | None:
        """When the newest of a rank's parts was written, by the file system; None without one."""
        times = []
        for part in (part for parts in self._parts.values() for part in parts if part.rank == rank):
            with contextlib.suppress(OSError):  # the writer may have replaced it
                times.append(part.path.stat().st_mtime)
        return max(times, default=None)

    def row_count(self, table: str) -> int:
        """Rows of a table according to its footers."""
        return sum(part.metadata.num_rows for part in self._parts_of(table))

    def iter_loads(
        self,
        *,
        phase: str | None = None,
        layers: Collection[int] | None = None,
        max_block_bytes: int = 64 * 1024 * 1024,
    ) -> Iterator[LoadBlock]:
        """Stream the loads of all ranks as dense blocks, a bounded number of steps at a time.

        Blocks of one (phase, layer) come in step order; different ones interleave. Memory stays near
        one row group per rank, whatever the length of the run.

        Args:
            phase: only this phase.
            layers: only these layers.
            max_block_bytes: bound on ``load_SPE`` of one block; a single window is never split.

        Raises:
            LoadError: negative or impossible loads.
            RunFormatError: rows contradict the manifest, their folder or each other, or nothing at all
                can be read.
        """
        if phase is not None and phase not in PHASES:
            raise RunError(
                f"phase {one_line(phase, 40)!r} is unknown", expected=f"one of {', '.join(PHASES)}"
            )
        parts = self._parts["routing"]
        ranks = np.array(sorted({part.rank for part in parts}), dtype=np.int64)
        layer_experts = {spec.layer: spec.experts for spec in self.manifest.model.moe_layers}

        found: set[int] = set()

        def check_layer(layer: int, experts: int, where: str) -> None:
            found.add(layer)
            if len(found) > _MAX_LAYERS:
                raise RunFormatError(
                    f"{where}: column layer holds over {_MAX_LAYERS} different layers with those before",
                    remedy="capture it again",
                )
            if layer_experts.get(layer, experts) != experts:
                raise RunFormatError(
                    f"{where}: layer {layer} has {experts} experts, {layer_experts[layer]} in the manifest; "
                    "the part belongs to another run"
                )

        left_out = 0

        def report(problem: str) -> None:
            nonlocal left_out
            left_out += 1
            self._state(problem)

        coverage = Coverage(ranks)
        groups_of_all = 0
        summed = 0.0
        for experts in sorted({part.experts for part in parts}):
            groups = [group for part in parts if part.experts == experts for group in part.row_groups()]
            groups_of_all += len(groups)
            for block in stream_blocks(
                groups,
                ranks=ranks,
                phase=phase,
                layers=layers,
                max_block_bytes=max_block_bytes,
                report=report,
                check_layer=check_layer,
            ):
                summed += float(block.assignments_SP.sum(dtype=np.float64))
                if summed > _MAX_SUM:
                    raise LoadError(
                        f"routing of run {self.path}: column assignments sums to over 2**62",
                        remedy="capture it again",
                    )
                coverage.add(block)
                yield block
        if phase is None and layers is None:
            for gap in coverage.gaps(self.manifest, self.holds_layer):
                self._state(gap)
        if groups_of_all and left_out == groups_of_all:
            raise RunFormatError(
                f"no routing rows of run {self.path} can be read: {self.problems[-1]}",
                remedy="capture it again",
            )

    def expert_load(self, *, phase: str | None = None, layers: Collection[int] | None = None) -> pd.DataFrame:
        """Loads as a tidy frame: step, phase, layer, source_rank, expert, load.

        A column ``window_steps`` follows when rows span several steps.

        Raises:
            RunError: the frame would be too large; use :meth:`iter_loads` or choose layers.
        """
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("step", "phase", "layer", "source_rank", "expert", "load", "window_steps")
        }
        size = 0
        for block in self.iter_loads(phase=phase, layers=layers):
            s, p = np.nonzero(block.present_SP)
            size += s.size * block.experts
            if size > _MAX_FRAME_ROWS:
                raise RunError(
                    f"expert_load() of run {self.path} has over {_MAX_FRAME_ROWS} rows",
                    remedy="choose phase and layers, or stream with iter_loads()",
                )
            for name, values in (
                ("step", block.step_S[s]),
                ("source_rank", block.source_rank_P[p]),
                ("window_steps", block.window_steps_S[s]),
                ("phase", np.full(s.size, PHASES.index(block.phase))),
                ("layer", np.full(s.size, block.layer, np.int64)),
            ):
                columns[name].append(np.repeat(values, block.experts))
            columns["expert"].append(np.tile(np.arange(block.experts), s.size))
            columns["load"].append(block.load_SPE[s, p].reshape(-1))
        joined = {
            name: np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
            for name, arrays in columns.items()
        }
        import pandas as pd

        frame = pd.DataFrame(joined)
        frame["phase"] = pd.Series(PHASES, dtype="str").take(joined["phase"]).array
        if not (joined["window_steps"] > 1).any():
            frame = frame.drop(columns="window_steps")
        return frame

    def routed_tokens(self) -> pd.DataFrame:
        """Tokens of each step: step, window_steps, phase, source_rank, tokens.

        All MoE layers see the same tokens; where they do not (some were not captured in every step), the
        largest number counts. Loads are not read.

        Raises:
            RunFormatError: rows of another rank, or a negative number of tokens.
        """
        import pandas as pd

        keys = ["step", "window_steps", "phase", "source_rank"]
        frames: list[pd.DataFrame] = []
        for part in self._parts["routing"]:
            for group in part.row_groups():
                rows = read_row_group(group, [*keys, "tokens"])
                if isinstance(rows, Unreadable):
                    self._state(str(rows))
                    continue
                frame = rows.to_pandas().astype({"phase": "str"})
                if (
                    frame.isna().any(axis=None)
                    or not frame["tokens"].between(0, MAX_LOAD).all()
                    or not frame["step"].between(0, MAX_STEP).all()
                    or not frame["phase"].isin(PHASES).all()
                ):
                    raise RunFormatError(
                        f"{part.name}: holds impossible steps, phases or numbers of tokens",
                        remedy="capture it again",
                    )
                if (frame["source_rank"] != part.rank).any():
                    raise RunFormatError(f"{part.name}: holds rows of another rank than {part.rank}")
                frames.append(frame.groupby(keys, sort=False)["tokens"].max().reset_index())
        if not frames:
            return pd.DataFrame({name: [] for name in [*keys, "tokens"]})
        joined = pd.concat(frames, ignore_index=True)
        result: pd.DataFrame = joined.groupby(keys, sort=True)["tokens"].max().reset_index()
        return result

    def exchanges(self, *, arrow_lists: bool = False) -> pd.DataFrame:
        """Collectives, one row per collective on one rank.

        Args:
            arrow_lists: leave the lists of bytes as Arrow's: far less memory than an array for each row.
        """
        return self._frame("exchange", arrow_lists=arrow_lists)

    def spans(self) -> pd.DataFrame:
        """Phases of the program and sub-layer spans."""
        return self._frame("spans")

    def power(self) -> pd.DataFrame:
        """Telemetry samples, with the ``source_rank`` that took them."""
        return self._frame("power")

    def token_samples(self) -> pd.DataFrame:
        """Sampled routing decisions: ``expert_ids`` of one token of one layer per row."""
        return self._frame("tokens")

    def router_biases(self) -> pd.DataFrame:
        """Correction biases of routers: step, layer, source_rank, ``bias`` (one value per expert).

        A row holds from its step on until the layer's next row of the same rank, as far as it was read.
        Replicas of a layer on several ranks have a row each.
        """
        return self._frame("router_bias")

    def auxiliary_losses(self) -> pd.DataFrame:
        """Auxiliary losses of the model: step, phase, source_rank, ``value`` (mean over ``calls`` of it)."""
        return self._frame("auxiliary_loss")

    def iter_rows(
        self, table: str, *, columns: Collection[str] | None = None, batch_bytes: int = 0
    ) -> Iterator[pa.Table]:
        """Stream a table's checked rows, a row group at a time.

        Exchanges and spans of a rank whose layers contradict the other ranks' have no layer.

        Args:
            table: one of ``TABLES``.
            columns: columns to read; None for all, unknown ones included. ``source_rank`` is always there.
            batch_bytes: row groups of a part are read together up to so many decoded bytes: much faster where
                they are small.

        Raises:
            RunFormatError, LoadError: rows that cannot be true.
        """
        for part in self._parts_of(table):
            left_bytes = part.most_decoded_bytes
            wanted = None if columns is None else {*columns, "source_rank"}
            for read in read_row_groups(part, wanted, most_bytes=batch_bytes):
                if isinstance(read, Unreadable):
                    self._state(str(read))
                    continue
                rows = plain_text(read, most_bytes=left_bytes, where=part.name)
                left_bytes -= rows.nbytes
                check_rows(table, rows, rank=part.rank, where=part.name)
                if part.rank in self._layers.contradictions and "layer" in rows.column_names:
                    at = rows.column_names.index("layer")
                    kind = rows.schema.field(at).type
                    rows = rows.set_column(at, "layer", pa.nulls(len(rows), kind))
                if "source_rank" not in rows.column_names:
                    rows = rows.append_column(
                        "source_rank", pa.array(np.full(len(rows), part.rank, np.int32))
                    )
                yield rows

    def _frame(self, table: str, *, arrow_lists: bool = False) -> pd.DataFrame:
        size = sum(part.decoded_bytes for part in self._parts_of(table))
        if size > _MAX_FRAME_BYTES:
            raise RunError(
                f"table {table} of run {self.path} has {size >> 20} MiB; stream it with iter_rows({table!r})"
            )
        schema = FIXED_SCHEMAS[table]
        if "source_rank" not in schema.names:
            schema = schema.append(pa.field("source_rank", pa.int32()))
        tables = [schema.empty_table(), *self.iter_rows(table, batch_bytes=BATCH_BYTES)]
        joined = pa.concat_tables(tables, promote_options="permissive")
        del tables
        if arrow_lists:  # in one piece, so that who works on their numbers needs no copy
            for at, field in enumerate(schema):
                if pa.types.is_list(field.type):
                    whole = pa.chunked_array([joined.column(at).combine_chunks()])
                    joined = joined.set_column(at, field.name, whole)
        pa.default_memory_pool().release_unused()
        frame: pd.DataFrame = joined.to_pandas(types_mapper=_arrow_list if arrow_lists else None)
        del joined
        for column, most in _MOST_DIFFERENT.items():
            if column in frame and not frame.empty:
                for rank, different in frame.groupby("source_rank")[column].nunique().items():
                    if different > most:
                        raise RunFormatError(
                            f"{table}/{rank_folder(int(str(rank)))}: column {column} holds {different} "
                            "different values",
                            expected=f"at most {most}",
                        )
        return frame

    def _parts_of(self, table: str) -> tuple[Part, ...]:
        if table not in TABLES:
            raise RunError(
                f"table {one_line(table, 40)!r} is unknown", expected=f"one of {', '.join(TABLES)}"
            )
        return self._parts[table]

    def _state(self, problem: str | Gap) -> None:
        if problem not in self._problems:
            self._problems.append(problem)


def _arrow_list(kind: pa.DataType) -> pd.ArrowDtype | None:
    """Arrow's own type for lists; None, pandas' usual one, for others."""
    import pandas as pd

    return pd.ArrowDtype(kind) if pa.types.is_list(kind) else None
