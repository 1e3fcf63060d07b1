"""Samples of devices as counter tracks of a trace, and event reasons as slices.

A counter keeps its value until the next event, so that a value is written where it changes and at the last
sample. What a counter cannot show (that a device stopped reporting) is marked by instant events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from observatory.devices.event_reasons import HOLDING_BITS, reason_bits, reason_name
from observatory.interchange.exporters.chrome_trace.lanes import metadata

#: Column -> name of the counter, of its value, and what one unit of the column is in that unit.
COUNTERS: dict[str, tuple[str, str, float]] = {
    "power_mw": ("power", "W", 1e-3),
    "average_power_mw": ("power, mean of the last second", "W", 1e-3),
    "energy_mj": ("energy counter", "J", 1e-3),
    "sm_clock_mhz": ("SM clock", "MHz", 1.0),
    "memory_clock_mhz": ("memory clock", "MHz", 1.0),
    "temperature_c": ("temperature", "degrees C", 1.0),
    "enforced_limit_mw": ("power limit", "W", 1e-3),
}
_GAP_PERIODS = 3.0
_MARKS = 1


@dataclass(slots=True)
class DeviceTrack:
    """What is remembered of one device while its samples pass, in time order.

    Attributes:
        pid: process that stands for it.
        columns: columns that become counters.
        period_ns: usual time between samples.
    """

    pid: int
    columns: tuple[str, ...]
    period_ns: int
    _value: dict[str, int] = field(default_factory=dict)
    _written_ns: dict[str, int] = field(default_factory=dict)
    _since_ns: dict[int, int] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)
    _last_ns: int | None = None

    def sample(self, time_ns: int, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of one sample; times are those of the trace, ascending."""
        if self._last_ns is not None and time_ns - self._last_ns > _GAP_PERIODS * self.period_ns:
            yield from self._close_reasons(self._last_ns + self.period_ns, keep=0)
            yield self._mark(self._last_ns, "no samples from here", time_ns)
        for column in self.columns:
            value = row.get(column)
            if value is None:
                if column in self._value:
                    yield from self._counter(column, self._last_ns or time_ns, again=True)
                    yield self._mark(time_ns, f"{COUNTERS[column][0]} not reported from here")
                    del self._value[column], self._written_ns[column]
            elif self._value.get(column) != value:
                self._value[column] = value
                yield from self._counter(column, time_ns, again=False)
        reasons = row.get("event_reasons") or 0
        yield from self._close_reasons(time_ns, keep=reasons)
        for bit in reason_bits(reasons):
            self._since_ns.setdefault(bit, time_ns)
        self._last_ns = time_ns

    def end(self) -> Iterator[dict[str, Any]]:
        """Events after the last sample."""
        if self._last_ns is None:
            return
        for column in list(self._value):
            yield from self._counter(column, self._last_ns, again=True)
        yield from self._close_reasons(self._last_ns + self.period_ns, keep=0)
        yield self._mark(self._last_ns, "last sample")

    def _counter(self, column: str, time_ns: int, *, again: bool) -> Iterator[dict[str, Any]]:
        """A value where it begins, or ``again`` where it was last seen."""
        if again and self._written_ns[column] == time_ns:
            return
        self._written_ns[column] = time_ns
        name, unit, factor = COUNTERS[column]
        value = self._value[column]
        shown = value if factor == 1.0 else round(value * factor, 3)
        yield {"ph": "C", "name": name, "pid": self.pid, "tid": 0, "ts": time_ns / 1e3, "args": {unit: shown}}

    def _close_reasons(self, time_ns: int, *, keep: int) -> Iterator[dict[str, Any]]:
        """Slices of the reasons that are over."""
        for bit in [bit for bit in self._since_ns if not keep & bit]:
            since_ns = self._since_ns.pop(bit)
            tid = 2 + bit.bit_length()
            if bit not in self._named:
                self._named.add(bit)
                kind = "clock held by" if bit & HOLDING_BITS else "clock reason"
                yield metadata("thread_name", self.pid, tid, name=f"{kind}: {reason_name(bit)}")
            yield {
                "ph": "X", "cat": "event_reason", "name": reason_name(bit), "pid": self.pid, "tid": tid,
                "ts": since_ns / 1e3, "dur": max(time_ns - since_ns, 0) / 1e3, "args": {"bit": f"0x{bit:x}"},
            }  # fmt: skip

    def _mark(self, time_ns: int, text: str, until_ns: int | None = None) -> dict[str, Any]:
        args = {} if until_ns is None else {"seconds": round((until_ns - time_ns) * 1e-9, 3)}
        return {
            "ph": "i", "s": "p", "cat": "power", "name": text, "pid": self.pid, "tid": _MARKS,
            "ts": time_ns / 1e3, "args": args,
        }  # fmt: skip
