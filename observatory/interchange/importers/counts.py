"""Plain counts [step, layer, expert], of tools that have no importer of their own.

``.npy``: one array. ``.npz``: the array ``load``, or the only one, and if they are there ``step`` and
``layer``, the numbers of its first two axes. ``.csv``: columns ``step``, ``layer``, ``expert``, ``count``,
and if they are there ``rank`` and ``phase``. A file of arrays is one rank, in the order given.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from observatory.errors import InterchangeError
from observatory.interchange.importers.imported import ImportedRun, ImportOptions
from observatory.interchange.importers.loads import MOST_COUNTS, Loads, checked_loads, loads_run, needed_top_k
from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem
from observatory.run.manifest import PHASES
from observatory.run.rows import MAX_EXPERTS, MAX_STEP
from observatory.text import listing

_MOST_ARRAY_BYTES = 256 << 20
_MOST_HEADER_BYTES = 10_000
_MOST_LAYERS = 16_384
_COLUMNS = ("step", "layer", "expert", "count")


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    if head.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return b".npy" in head[:256] or head.startswith(b"\x93NUMPY")
    return set(_COLUMNS) <= set(head.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split(","))


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Loads of one run.

    Raises:
        InterchangeError: a file holds no such counts, or how many experts a token has is not stated.
    """
    top_k = needed_top_k(sources[0].name, options.top_k)
    found: list[Loads] = []
    for number, source in enumerate(sources):
        start = source.head()
        if start.startswith((b"\x93NUMPY", b"PK\x03\x04")):
            found.append(_of_arrays(source, start, rank=number, phase=options.phase))
        else:
            found += _of_csv(source, phase=options.phase)
    experts = {loads.load_SLE.shape[2] for loads in found}
    if len(experts) > 1:
        raise sources[0].refused(
            f"and the others have {listing([str(item) for item in sorted(experts)])} experts",
            expected="files of one number of experts",
        )
    notes: list[str] = []
    return loads_run(found, name=options.model_name(sources), top_k=top_k, notes=notes)


def _of_arrays(source: Source, start: bytes, *, rank: int, phase: str) -> Loads:
    arrays = _arrays(source) if start.startswith(b"PK") else {"load": read_array(source, source.content())}
    if "load" not in arrays and len(arrays) != 1:
        raise source.refused(f"holds arrays {listing(sorted(arrays))}", expected="one named load")
    load_SLE = checked_loads(source.name, arrays.get("load", next(iter(arrays.values()))))
    steps, layers, _ = load_SLE.shape
    return Loads(
        load_SLE=load_SLE,
        step_S=_numbers(source, arrays, "step", steps, MAX_STEP),
        layer_L=_numbers(source, arrays, "layer", layers, _MOST_LAYERS),
        rank=rank,
        phase=phase,
    )


def _numbers(
    source: Source, arrays: dict[str, NDArray[Any]], name: str, length: int, most: int
) -> NDArray[np.int64]:
    if name not in arrays:
        return np.arange(length, dtype=np.int64)
    numbers = arrays[name]
    good = numbers.shape == (length,) and numbers.dtype.kind in "iu"
    if not good or len(np.unique(numbers)) < length or numbers.min() < 0 or numbers.max() > most:
        raise source.refused(f"has numbers of its {name}s that do not fit", expected=f"{length}, each once")
    return numbers.astype(np.int64)


def _arrays(source: Source) -> dict[str, NDArray[Any]]:
    content = source.content(_MOST_ARRAY_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [item for item in archive.infolist() if item.filename.endswith(".npy")]
            if sum(item.file_size for item in members) > _MOST_ARRAY_BYTES:
                raise source.refused(
                    f"holds over {_MOST_ARRAY_BYTES >> 20} MiB", remedy="import a part of it"
                )
            return {
                item.filename.removesuffix(".npy"): read_array(source, archive.read(item)) for item in members
            }
    except InterchangeError:
        raise
    except Exception as error:  # damaged archives end in many ways
        raise source.refused(f"is no archive of arrays ({first_problem(error)})") from error


def read_array(source: Source, content: bytes) -> NDArray[Any]:
    """An array of a ``.npy`` file, without pickles.

    Raises:
        InterchangeError: it is none.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of old headers
            array: NDArray[Any] = np.lib.format.read_array(
                io.BytesIO(content), allow_pickle=False, max_header_size=_MOST_HEADER_BYTES
            )
    except Exception as error:  # so do headers of arrays
        raise source.refused(f"holds an array that cannot be read ({first_problem(error)})") from error
    return array


def _of_csv(source: Source, *, phase: str) -> Iterator[Loads]:
    table = _csv_table(source)
    values = {name: table.column(name).to_numpy() for name in (*_COLUMNS, "rank")}
    phases = np.asarray(table.column("phase").to_pylist()) if "phase" in table.column_names else None
    limits = {"step": MAX_STEP, "layer": _MOST_LAYERS, "expert": MAX_EXPERTS - 1, "rank": 4095}
    for name, most in limits.items():
        if values[name].min() < 0 or values[name].max() > most:
            raise source.refused(f"has numbers of its {name}s outside 0 to {most}")
    experts = int(values["expert"].max()) + 1
    for rank in np.unique(values["rank"]).tolist():
        for name in [phase] if phases is None else sorted(set(phases.tolist())):
            if name not in PHASES:
                raise source.refused(f"has a phase {str(name)[:40]!r}", expected=listing(PHASES, most=8))
            of_it = values["rank"] == rank
            of_it &= True if phases is None else phases == name
            if of_it.any():
                yield _dense(source, {key: item[of_it] for key, item in values.items()}, experts, name)


def _dense(source: Source, values: dict[str, NDArray[np.int64]], experts: int, phase: str) -> Loads:
    step_S, row_N = np.unique(values["step"], return_inverse=True)
    layer_L, place_N = np.unique(values["layer"], return_inverse=True)
    if len(step_S) * len(layer_L) * experts > MOST_COUNTS:
        raise source.refused(f"stands for over {MOST_COUNTS:,} counts", remedy="import a part of it")
    load_SLE = np.zeros((len(step_S), len(layer_L), experts), dtype=np.int64)
    at_N = np.ravel_multi_index((row_N, place_N, values["expert"]), load_SLE.shape)
    if len(np.unique(at_N)) < len(at_N):
        raise source.refused("states a step, layer and expert twice", expected="one count for each")
    load_SLE.reshape(-1)[at_N] = values["count"]
    return Loads(
        load_SLE=checked_loads(source.name, load_SLE),
        step_S=step_S,
        layer_L=layer_L,
        rank=int(values["rank"][0]),
        phase=phase,
    )


def _csv_table(source: Source) -> pa.Table:
    types = dict.fromkeys((*_COLUMNS, "rank"), pa.int64()) | {"phase": pa.string()}
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(source.text().encode()),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        raise source.refused(f"is no table of counts ({first_problem(error)})") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing or not table.num_rows:
        what = f"has no column {missing[0]}" if missing else "has no rows"
        raise source.refused(what, expected=listing(_COLUMNS))
    if "rank" not in table.column_names:
        table = table.append_column("rank", pa.array(np.zeros(table.num_rows, dtype=np.int64)))
    return table
