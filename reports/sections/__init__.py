"""Sections of a report: frames in, titles, tables and figures out."""

from reports.sections.benchmark_records import file_records
from reports.sections.clocks import clocks_section
from reports.sections.committee import committee_section
from reports.sections.energy import energy_section
from reports.sections.exchanges import exchange_sections
from reports.sections.findings import findings
from reports.sections.grid import grid_section
from reports.sections.heatmaps import heatmap_section
from reports.sections.layers import layer_section
from reports.sections.lorenz import lorenz_section
from reports.sections.mock import mock_section
from reports.sections.overview import overview, problems
from reports.sections.power import power_section
from reports.sections.provenance import FORMULAS, RunRecord, provenance, run_table
from reports.sections.scan import scan_section
from reports.sections.steps import step_section

__all__ = [
    "FORMULAS",
    "RunRecord",
    "clocks_section",
    "committee_section",
    "energy_section",
    "exchange_sections",
    "file_records",
    "findings",
    "grid_section",
    "heatmap_section",
    "layer_section",
    "lorenz_section",
    "mock_section",
    "overview",
    "power_section",
    "problems",
    "provenance",
    "run_table",
    "scan_section",
    "step_section",
]
