"""Words for several things, and for shares of one."""

from __future__ import annotations

from collections.abc import Sequence


def listing(items: Sequence[str], *, most: int = 4, joined_by: str = "and") -> str:
    """``a, b and c``; past ``most`` items, ``a, b, c and 5 more``; the last is joined by ``joined_by``."""
    if len(items) > most:
        return f"{', '.join(items[: most - 1])} and {len(items) - most + 1} more"
    if len(items) > 1:
        return f"{', '.join(items[:-1])} {joined_by} {items[-1]}"
    return items[0] if items else "none"


def counted(count: int, one: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def percent_words(share: float) -> str:
    """A share in percent; what is neither nothing nor all is not rounded to it."""
    percent = 100.0 * share
    if 0.0 < percent < 1.0:
        return f"{percent:.2g} %"
    if 99.0 < percent < 100.0:
        return f"{min(percent, 99.9):.1f} %"
    return f"{percent:.0f} %"
