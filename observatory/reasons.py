"""Why a value is missing or refused, as a code and values that other code can read.

Rooms hand each other reasons, never sentences. The codes of a room are one ``StrEnum``; its ``words.py``
makes a sentence of a reason, where a person reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import JsonValue


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason.

    Attributes:
        code: what is the case.
        values: the numbers and names that belong to the code; keys carry units.
    """

    code: StrEnum
    values: Mapping[str, JsonValue] = field(default_factory=dict)

    def document(self) -> dict[str, JsonValue]:
        """The reason for a JSON document."""
        return {"code": self.code.value, **self.values}
