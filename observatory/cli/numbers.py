"""Numbers as cells of a table; None stays None and is shown as n/a."""

from __future__ import annotations


def scaled_cell(value: float | None, factor: float, digits: int) -> str | None:
    """A value in another unit."""
    return None if value is None else f"{value * factor:.{digits}f}"


def interval_cell(low: float | None, high: float | None, factor: float, digits: int) -> str | None:
    """Both ends of an interval."""
    if low is None or high is None:
        return None
    return f"{low * factor:.{digits}f} to {high * factor:.{digits}f}"


def percent_cell(share: float | None) -> str | None:
    """A share in percent."""
    return None if share is None else f"{100 * share:.1f} %"
