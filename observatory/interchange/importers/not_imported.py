"""Files of other tools that hold nothing a run could have, and what they lack."""

from __future__ import annotations

import re

#: How a file begins, its tool, and what is missing in it.
_LACKING: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (
        re.compile(rb"timestamp,project_name,run_id,"),
        "codecarbon",
        "the energy of whole runs, and no power or energy over time",
    ),
    (
        re.compile(rb'\s*\{\s*"card\d+"\s*:\s*\{'),
        "rocm-smi",
        "readings without the time they were read at",
    ),
    (
        re.compile(
            rb'\s*\[?\s*\{\s*(?:"gpu_data"\s*:\s*\[\s*\{\s*)?"gpu"\s*:\s*\d+\s*,\s*"(?:usage|power|asic)"'
        ),
        "amd-smi",
        "readings without the time they were read at",
    ),
    (
        re.compile(rb"\x80[\x02-\x05].{0,64}(?:version|entries|pg_config)", re.DOTALL),
        "PyTorch's flight recorder",
        "a pickle, which may run any program and is not read",
    ),
)


def what_is_missing(head: bytes) -> str | None:
    """Of a known file without an importer, its tool and what it lacks; None for all others."""
    for begins, tool, holds in _LACKING:
        if begins.match(head.removeprefix(b"\xef\xbb\xbf")):
            return f"is of {tool} and holds {holds}"
    return None
