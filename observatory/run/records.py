"""What all records of runs and documents are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=4096)]
#: Below what arrays of 64-bit integers hold, so that a number of a file can be put into one.
Count = Annotated[int, Field(ge=0, le=1 << 62)]
#: Seconds since 1970, to the year 9999.
Moment = Annotated[float, Field(ge=0, le=253_402_300_799)]


class Record(BaseModel):
    """Base of manifest records: frozen, unknown keys of a newer minor schema are carried along."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
