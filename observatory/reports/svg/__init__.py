"""Figures as SVG in the page's own colours: they need no script, follow the colour scheme, and print.

Drawn are the records that figures are made of: of plotly, only its Python classes are used.
"""

from observatory.reports.svg.drawing import draw

__all__ = ["draw"]
