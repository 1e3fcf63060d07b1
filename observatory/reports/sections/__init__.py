"""Sections of a report: frames in, titles, tables and figures out."""

from observatory.reports.sections.advice import advice_section
from observatory.reports.sections.benchmark_records import file_records
from observatory.reports.sections.committee import committee_section
from observatory.reports.sections.energy import energy_section
from observatory.reports.sections.exchanges import exchange_sections
from observatory.reports.sections.findings import findings
from observatory.reports.sections.frequency import clocks_section
from observatory.reports.sections.grid import grid_section
from observatory.reports.sections.heatmaps import heatmap_section
from observatory.reports.sections.layers import layer_section
from observatory.reports.sections.lorenz import lorenz_section
from observatory.reports.sections.mock import mock_section
from observatory.reports.sections.overview import overview, problems, setting
from observatory.reports.sections.plan import plan_section
from observatory.reports.sections.power import power_section
from observatory.reports.sections.provenance import FORMULAS, RunRecord, formula_anchor, provenance, run_table
from observatory.reports.sections.route_fetch import route_fetch_section
from observatory.reports.sections.scan import scan_section
from observatory.reports.sections.step_times import step_times_section
from observatory.reports.sections.steps import step_section
from observatory.reports.sections.verdict import Number, Verdict, answer, key_figure, three_numbers, verdicts

__all__ = [
    "FORMULAS",
    "Number",
    "RunRecord",
    "Verdict",
    "advice_section",
    "answer",
    "clocks_section",
    "committee_section",
    "energy_section",
    "exchange_sections",
    "file_records",
    "findings",
    "formula_anchor",
    "grid_section",
    "heatmap_section",
    "key_figure",
    "layer_section",
    "lorenz_section",
    "mock_section",
    "overview",
    "plan_section",
    "power_section",
    "problems",
    "provenance",
    "route_fetch_section",
    "run_table",
    "scan_section",
    "setting",
    "step_section",
    "step_times_section",
    "three_numbers",
    "verdicts",
]
