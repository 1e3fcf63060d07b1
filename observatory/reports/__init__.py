"""HTML reports, figures and trace exports made from run directories."""

from observatory.reports.html import write_report

__all__ = ["write_report"]
