"""Lists and sizes on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from observatory.errors import BenchmarkError, CaptureError
from observatory.run.documents.route_fetch import ELEMENT_BYTES, Shape

Meaning = TypeVar("Meaning")

_UNITS = {
    "B": 1,
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_MOST_BYTES = 1 << 40
_LARGEST_SIZE = 1 << 24
#: What the numbers of a shape mean, by its kind.
SHAPE_FORMS = {
    "mha": ("HEADS", "DIM"),
    "gqa": ("HEADS", "KV_HEADS", "DIM"),
    "mla": ("HEADS", "LATENT", "ROTARY"),
    "sparse": ("HEADS", "LATENT", "ROTARY", "SELECTED"),
    "expert": ("HIDDEN",),
}


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes from ``1KiB,64KiB,1MB``; KiB is 1024 bytes, KB 1000.

    Raises:
        BenchmarkError: not such a list.
    """
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,13})\s*([kKmMgG]?[iI]?[bB]?)", part.strip())
        if found is None or found.group(2).upper() not in _UNITS:
            raise BenchmarkError(f"size {part.strip()!r} is not a size; expected such as 1KiB,64KiB,1MiB")
        size = int(found.group(1)) * _UNITS[found.group(2).upper()]
        if not 0 < size <= _MOST_BYTES:
            raise BenchmarkError(f"size {part.strip()!r} is out of range; expected 16 B to 1024 GiB")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def parse_names(what: str, text: str, *, every: tuple[str, ...]) -> tuple[str, ...]:
    """Names from a list with commas; ``all`` stands for every one.

    Raises:
        BenchmarkError: an unknown one, or none.
    """
    if text.strip() == "all":
        return every
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = next((name for name in names if name not in every), None)
    if unknown is not None or not names:
        problem = f"no {what} was named" if unknown is None else f"{what} {unknown!r} is unknown"
        raise BenchmarkError(problem, expected=f"{', '.join(every)} or all")
    return names


def parse_files_of_ranks(texts: Sequence[str], *, ranks: int) -> dict[int, Path]:
    """Files by rank from ``RANK=FILE`` texts.

    Args:
        texts: as given.
        ranks: ranks of the run.

    Raises:
        BenchmarkError: not such texts, a rank that the run does not have, or one named twice.
    """
    files: dict[int, Path] = {}
    for text in texts:
        found = re.fullmatch(r"(\d{1,7})=(.+)", text)
        if found is None or not int(found.group(1)) < ranks:
            raise BenchmarkError(
                f"{text!r} does not name a rank's file; expected RANK=FILE with a rank from 0 to {ranks - 1}"
            )
        if int(found.group(1)) in files:
            raise BenchmarkError(f"rank {found.group(1)} is named twice; give one file for each rank")
        files[int(found.group(1))] = Path(found.group(2))
    return files


def parse_roles(text: str) -> tuple[str, ...]:
    """``dispatch``, ``combine`` or ``both``.

    Raises:
        BenchmarkError: anything else.
    """
    roles = {"dispatch": ("dispatch",), "combine": ("combine",), "both": ("dispatch", "combine")}
    if text not in roles:
        raise BenchmarkError(f"role {text!r} is unknown; expected dispatch, combine or both")
    return roles[text]


def parse_shape(text: str, *, dtype: str = "float32", decoder: Sequence[int] | None = None) -> Shape:
    """A shape from a text such as ``gqa:32,8,128``; see `SHAPE_FORMS`.

    Args:
        text: the shape.
        dtype: of its values.
        decoder: hidden size and inner width of the layers of its attention; None where they are not asked
            for.

    Raises:
        BenchmarkError: not such a text, sizes that do not fit each other, or an unknown dtype.
    """
    forms = ", ".join(f"{kind}:{','.join(names)}" for kind, names in SHAPE_FORMS.items())
    kind, _, rest = text.partition(":")
    parts = rest.split(",")
    if kind not in SHAPE_FORMS or len(parts) != len(SHAPE_FORMS[kind]):
        raise BenchmarkError(f"shape {text[:60]!r} is none", expected=f"one of {forms}")
    if dtype not in ELEMENT_BYTES:
        raise BenchmarkError(
            f"dtype {dtype[:40]!r} is unknown", expected=f"one of {', '.join(ELEMENT_BYTES)}"
        )
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and 0 < int(part) <= _LARGEST_SIZE for part in parts):
        raise BenchmarkError(f"shape {text[:60]!r} has sizes out of range", expected="1 to 16777216 for each")
    sizes = dict(zip(SHAPE_FORMS[kind], map(int, parts), strict=True))
    fields: dict[str, object] = {"kind": kind, "dtype": dtype, "heads": sizes.get("HEADS", 1)}
    if "LATENT" in sizes:
        latent, rotary = sizes["LATENT"], sizes["ROTARY"]
        fields |= {
            "key": latent + rotary,
            "rotary": rotary,
            "value": latent,
            "selected": sizes.get("SELECTED"),
        }
    elif kind == "expert":
        fields |= {"key": sizes["HIDDEN"], "value": sizes["HIDDEN"]}
    else:
        dim = sizes["DIM"]
        fields |= {"key": dim, "rotary": dim, "value": dim, "kv_heads": sizes.get("KV_HEADS", sizes["HEADS"])}
    if decoder is not None and len(decoder) != 2:
        raise BenchmarkError(f"--prefill gives {len(decoder)} numbers", expected="HIDDEN,INNER")
    if decoder is not None and kind != "expert":
        fields |= {"hidden": decoder[0], "inner": decoder[1]}
    try:
        return Shape.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise BenchmarkError(f"shape {text[:60]!r} does not fit itself: {problem}") from error


def parse_range(what: str, text: str, *, most: int) -> tuple[int, int]:
    """The ends of ``16,2048``.

    Raises:
        BenchmarkError: not two whole numbers in order, from 1 to ``most``.
    """
    parts = text.split(",")
    if len(parts) == 2 and all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        low, high = map(int, parts)
        if 0 < low <= high <= most:
            return low, high
    raise BenchmarkError(f"{what} {text[:40]!r} is no range", expected=f"LOW,HIGH from 1 to {most}")


def parse_counts(what: str, text: str, *, most: int) -> tuple[int, ...]:
    """Whole numbers from ``1,3``.

    Raises:
        BenchmarkError: not such a list, or numbers out of 1 to ``most``.
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and 0 < int(part) <= most for part in parts):
        raise BenchmarkError(
            f"{what} {text[:40]!r} is no list of numbers", expected=f"numbers from 1 to {most}"
        )
    return tuple(map(int, parts))


def parse_steps(text: str) -> tuple[int, int | None]:
    """First step and the one behind the last, of ``A:B``; an empty A is 0, an empty B means no end.

    Raises:
        CaptureError: not such a range, or an empty one.
    """
    if not text:
        return 0, None
    found = re.fullmatch(r"(\d{0,9}):(\d{0,9})", text, re.ASCII)
    first, end = (int(part) if part else None for part in found.groups()) if found else (None, 0)
    if end is not None and end <= (first or 0):
        raise CaptureError(f"--steps is {text!r}", expected="A:B with A below B, such as 10:60")
    return first or 0, end


def parse_word(option: str, text: str, meanings: Mapping[str, Meaning]) -> Meaning:
    """What one of several words stands for.

    Raises:
        CaptureError: none of them.
    """
    if text not in meanings:
        raise CaptureError(f"{option} is {text!r}", expected=f"one of {', '.join(meanings)}")
    return meanings[text]
