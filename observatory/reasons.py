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
        because: the reasons that it follows from; empty where it stands alone.
    """

    code: StrEnum
    values: Mapping[str, JsonValue] = field(default_factory=dict)
    because: tuple[Reason, ...] = ()

    def document(self) -> dict[str, JsonValue]:
        """The reason for a JSON document."""
        causes: dict[str, JsonValue] = {}
        if self.because:
            causes["because"] = [cause.document() for cause in self.because]
        return {"code": self.code.value, **self.values, **causes}
