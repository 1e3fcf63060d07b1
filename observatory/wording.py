"""Words for several things."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["listing"]


def listing(items: Sequence[str], *, most: int = 4) -> str:
    """``a, b and c``; past ``most`` items, ``a, b, c and 5 more``."""
    if len(items) > most:
        return f"{', '.join(items[: most - 1])} and {len(items) - most + 1} more"
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"
