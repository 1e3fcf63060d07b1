"""``observatory.open_run``: a run with its analyses as pandas frames; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from observatory.errors import RunError
from observatory.run import reader
from observatory.text import listing

if TYPE_CHECKING:
    import pandas as pd

#: Rows of routing whose phases are read for `repr`, which must stay quick.
_MOST_ROWS = 500_000


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory with its analyses; reads and raises as :meth:`observatory.run.Run.open`."""
    return Run.open(path)


class Run(reader.Run):
    """A run directory that was opened by :func:`open_run`, and what it shows.

    Attributes:
        path: the directory.
        manifest: its manifest, with the status of every rank that left one, and the MoE layers and notes of
            all ranks.
    """

    def imbalance(
        self, *, by: Literal["layer", "phase"] = "layer", bootstrap: int = 200, seed: int = 0
    ) -> pd.DataFrame:
        """Imbalance of the expert loads, with its sampling floor.

        Args:
            by: one row per layer and phase, or one per phase (means over layers).
            bootstrap: resamples over steps for the interval of Gini; 0 for none.
            seed: of the resamples.

        Returns:
            The columns of ``observatory routing --json`` (docs/metrics.md); unknown values are NaN, and
            ``notes`` says why.

        Raises:
            LoadError: loads are negative or inconsistent.
        """
        from observatory.analysis.routing import layer_metrics, phase_summary

        make = {"layer": layer_metrics, "phase": phase_summary}[_choice("by", by, ("layer", "phase"))]
        return make(self, bootstrap=bootstrap, seed=seed)

    def scan(
        self,
        *,
        ep: Sequence[int] | None = None,
        gpus_per_node: int = 4,
        placement: str | os.PathLike[str] = "auto",
    ) -> pd.DataFrame:
        """The captured loads on other EP degrees and placements.

        Args:
            ep: degrees to try; None: those of 4, 8, 16 and 32 that divide the experts of all layers, or the
                placement's own.
            gpus_per_node: ranks per node.
            placement: ``auto``, ``linear``, ``round-robin``, ``recorded``, or a placement file.

        Returns:
            One row per degree, layer and phase: the columns of ``observatory scan --json`` (docs/metrics.md).

        Raises:
            PlacementError: a degree or the file does not fit the model.
        """
        from observatory.analysis.parallel.placement import PLACEMENT_NAMES
        from observatory.analysis.parallel.scan import fitting_degrees, scan_run

        rule = str(placement) if placement in PLACEMENT_NAMES else Path(placement)
        return scan_run(
            self,
            ep_degrees=fitting_degrees(self.manifest, rule) if ep is None else ep,
            gpus_per_node=gpus_per_node,
            placement=rule,
        )

    def exchange_summary(self, *, by: Literal["layer", "rank"] = "layer") -> pd.DataFrame:
        """Time in the exchanges between ranks, waiting apart from transfer, in seconds.

        Args:
            by: one row per phase, layer and role (dispatch, combine), or one per rank.

        Returns:
            The columns of ``layers`` or ``ranks`` of ``observatory exchanges --json`` (docs/waiting.md).

        Raises:
            RunError: the run holds no exchanges.
        """
        from observatory.analysis.exchange import layer_waits, rank_waits, run_waits

        make = {"layer": layer_waits, "rank": rank_waits}[_choice("by", by, ("layer", "rank"))]
        waits = run_waits(self)
        if waits.empty:
            raise RunError(
                f"run {self.path} holds no exchanges", remedy="profile with several ranks, for example --ep 4"
            )
        return make(waits)

    def energy(
        self, *, by: Literal["phase", "device", "token", "total"] = "phase", seed: int = 0
    ) -> pd.DataFrame:
        """Energy of the run, in mJ, with 90 % intervals.

        Args:
            by: one row per device and phase; per device; per rank and phase, over tokens; or per phase over
                all ranks.
            seed: of the bootstraps.

        Returns:
            The columns of ``phases``, ``devices``, ``tokens`` or ``totals`` of ``observatory energy --json``
            (docs/energy.md); unknown values are NaN, and ``reason`` says why.

        Raises:
            EnergyError: the run holds no power samples, or none that can be read.
        """
        from observatory.analysis.energy import energy_summary

        frames = {"phase": "phases", "device": "devices", "token": "tokens", "total": "totals"}
        frame: pd.DataFrame = getattr(
            energy_summary(self, seed=seed), frames[_choice("by", by, tuple(frames))]
        )
        return frame

    def compare(self, other: reader.Run, *, layers: bool = False) -> pd.DataFrame:
        """What another run does differently, this run being the baseline.

        Args:
            other: the run to compare.
            layers: a row per MoE layer instead of one per quantity of the whole run.

        Returns:
            The columns of ``rows`` or ``layers`` of ``observatory compare --json`` (docs/json.md).

        Raises:
            LoadError: loads of a run are negative or inconsistent.
        """
        import pandas as pd

        from observatory.analysis.compare.collect import measure_run, own_degrees
        from observatory.analysis.compare.comparing import compare_subjects
        from observatory.analysis.compare.document import row_document

        degrees = sorted({*own_degrees(self.manifest), *own_degrees(other.manifest)})
        base, changed = (measure_run(run, degrees=degrees) for run in (self, other))
        compared = compare_subjects(base, changed)
        rows = [row_document(row) for row in (compared.layers if layers else compared.rows)]
        return pd.DataFrame(rows)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        ep: Sequence[int] = (4, 8, 16, 32),
        gpus_per_node: int = 4,
        overwrite: bool = False,
    ) -> Path:
        """Write the report of this run: one HTML file that needs no network.

        Args:
            path: file to write; it appears whole or not at all.
            title: heading of the page; made from model and data when None.
            ep: EP degrees of the scan; those that do not divide the experts are left out and named.
            gpus_per_node: ranks per node of the scan.
            overwrite: replace an existing file.

        Returns:
            The file.

        Raises:
            RunError: the file exists or cannot be written.
        """
        from observatory.reports import write_report

        return write_report(
            [self], path, title=title, ep_degrees=ep, gpus_per_node=gpus_per_node, overwrite=overwrite
        )

    def __repr__(self) -> str:
        """Where it is, and its facts on one line."""
        return f"<Run {str(self.path)!r}: {', '.join(f'{name} {value}' for name, value in self._facts())}>"

    def _repr_html_(self) -> str:
        """The same facts as a table, for notebooks."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in [("run", str(self.path)), *self._facts()]
        )
        return f"<table>{rows}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        manifest = self.manifest
        layers = manifest.model.moe_layers
        experts = sorted({layer.experts for layer in layers})
        steps = max((status.steps for status in manifest.ranks), default=0)
        phases = "not read"
        if self.row_count("routing") <= _MOST_ROWS:
            tokens = self.routed_tokens()
            steps = max(steps, int(tokens["step"].nunique()))
            phases = listing(sorted(tokens["phase"].unique()))
        facts = {
            "model": manifest.model.name,
            "data": manifest.data.condition if manifest.data else "not stated",
            "MoE layers": f"{len(layers)} of {listing([str(count) for count in experts])} experts",
            "steps": str(steps),
            "phases": phases,
            "ranks": str(manifest.topology.ranks),
            "state": manifest.state,
        }
        return [(name, "".join(c if c.isprintable() else " " for c in text)) for name, text in facts.items()]


def _choice(name: str, given: str, choices: tuple[str, ...]) -> str:
    if given not in choices:
        raise RunError(f"{name} is {ascii(given)[:40]}", expected=f"one of {', '.join(choices)}")
    return given
