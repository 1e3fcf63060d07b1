"""A placement problem as arrays, and its file: an .npz archive of plain numbers.

Shapes: S steps, L layers, E experts, P ranks, T sampled tokens, K experts of a token.

Keys of the file: ``loads`` (S, L, E) and ``ranks`` are required. Defaults of the others: ``replicas`` 0,
``nodes`` 1, ``groups`` 1 (none), ``speed`` ones, ``objective`` step, ``current`` none, ``move_cost`` 0.0,
``max_moves`` -1, ``tokens`` and ``token_step`` none, ``top_k`` 0 (not known). The file is untrusted: nothing
in it is unpickled, and sizes are checked before anything is read. An empty array is none.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from observatory.analysis.parallel.balancing.layouts import Float64, Int64, slots_per_rank
from observatory.errors import PlacementError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, open_plain, parse_json, read_at_most

#: Arrays of a file, their bytes in all, and the load of one expert in one step.
_MOST_MEMBERS, _MOST_BYTES, _MOST_LOAD = 64, 1 << 30, 1 << 40
#: Numbers of loads and of tokens, which are computed with as 64-bit numbers.
_MOST_LOADS = 1 << 25
#: Numbers of one array, copies of a layer, ranks, and tokens.
_MOST_NUMBERS, _MOST_COPIES, _MOST_RANKS, _MOST_TOKENS = 1 << 27, 1 << 17, 65536, 1 << 22
#: Layers times ranks times experts: bytes of who holds what.
_MOST_HOLDERS = 1 << 30


class Objective(StrEnum):
    """What a layout is to have little of.

    ``step``: the busiest rank of each step; ``mean``: of the mean of the steps; ``moves``: likewise, within
    ``max_moves`` of today's; ``active``: activated experts of the rank with most of them, in each step;
    ``nodes``: nodes that a token is sent to, at ranks that are about as even.
    """

    MEAN = "mean"
    STEP = "step"
    ACTIVE = "active"
    NODES = "nodes"
    MOVES = "moves"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What a layout is to be made for.

    Attributes:
        load_SLE: assignments of each step, oldest first.
        ranks: P.
        replicas: copies beyond one of each expert, in each layer.
        nodes: nodes, contiguous blocks of equally many ranks.
        groups: contiguous groups of equally many experts, each of which stays on one node; 1: there are none.
        objective: what to make small.
        speed_P: speeds of the ranks in any unit; None: all alike.
        current_LPE: copies that ranks hold today; None: none.
        move_cost: charged for each layer that is changed, in units of the ratio of busiest to mean rank.
        max_moves: copies that ranks may receive, per layer; -1: any number.
        token_TK: experts of sampled tokens of the first layer; None: no sample.
        token_step_T: step of each, ascending in time.
        top_k: experts of a token; None: not known.
        is_ordered: whether the steps are one stretch of time; if not, no drift is forecast.
    """

    load_SLE: Float64
    ranks: int
    replicas: int = 0
    nodes: int = 1
    groups: int = 1
    objective: Objective = Objective.STEP
    speed_P: Float64 | None = None
    current_LPE: NDArray[np.int8] | None = None
    move_cost: float = 0.0
    max_moves: int = -1
    token_TK: Int64 | None = None
    token_step_T: Int64 | None = None
    top_k: int | None = None
    is_ordered: bool = True

    def __post_init__(self) -> None:
        experts = self.load_SLE.shape[2]
        slots = slots_per_rank(experts, self.ranks, self.replicas)
        if self.ranks % self.nodes:
            raise PlacementError(f"{self.ranks} ranks on {self.nodes} nodes; expected equally many on each")
        if self.groups > 1:
            self._check_groups(experts)
        if (self.groups > 1 or self.objective is Objective.NODES) and slots > experts // self.nodes:
            raise PlacementError(
                f"{slots} slots of a rank for the {experts // self.nodes} experts of its node; expected at "
                "most one copy of each: fewer replicas, or no groups"
            )
        if self.objective is Objective.NODES and self.token_TK is None:
            raise PlacementError(
                "objective nodes without tokens; expected the experts of sampled tokens, as tokens (T, K)"
            )
        if self.objective is Objective.NODES and (experts % self.nodes or self.replicas % self.nodes):
            copies = f"{experts} experts and {self.replicas} replicas"
            raise PlacementError(f"{copies} on {self.nodes} nodes; expected equally many on each")
        if self.objective is Objective.MOVES and self.current_LPE is None:
            raise PlacementError("objective moves without a layout of today; expected current")

    @property
    def is_of_mean(self) -> bool:
        """Whether the mean of the given steps is what counts."""
        return self.objective in (Objective.MEAN, Objective.MOVES)

    @property
    def is_all_active(self) -> bool:
        """Whether every step activates all experts, so that no layout activates fewer."""
        return bool((self.load_SLE > 0).all())

    @property
    def speeds(self) -> Float64:
        """Speeds of the ranks, (P,)."""
        return np.ones(self.ranks) if self.speed_P is None else self.speed_P

    @property
    def node_P(self) -> Int64:
        """Node of each rank that holds copies of experts of its own; one node where groups are free."""
        blocks = self.nodes if self.groups > 1 else 1
        return np.arange(self.ranks) // (self.ranks // blocks)

    def _check_groups(self, experts: int) -> None:
        if experts % self.groups or self.groups % self.nodes:
            raise PlacementError(
                f"{experts} experts in {self.groups} groups on {self.nodes} nodes; expected groups of "
                "equally many experts, and equally many groups on each node"
            )
        if self.current_LPE is not None:
            shape = len(self.current_LPE), self.nodes, -1, self.groups, experts // self.groups
            if self.current_LPE.reshape(shape).any(axis=(2, 4)).sum(axis=1).max() > 1:
                raise PlacementError(
                    "current has a group of experts on several nodes; expected one node, or no groups"
                )


def read_problem(path: Path) -> Problem:
    """Read and check a problem.

    Raises:
        PlacementError: it cannot be read, is too large, lacks a key, or its values do not fit together.
    """
    arrays = {key: array for key, array in _read_arrays(path).items() if array.size or key == "loads"}
    for key in ("loads", "ranks"):
        if key not in arrays:
            raise PlacementError(f"problem {path} has no {key}; expected at least loads and ranks")
    load_SLE = _whole(arrays, "loads", 3, _MOST_LOAD)
    _, layers, experts = load_SLE.shape
    if not load_SLE.size:
        raise PlacementError(f"problem {path} has loads of shape {load_SLE.shape}; expected none empty")
    ranks = _number(arrays, "ranks", 0, 1, _MOST_RANKS)
    replicas = _number(arrays, "replicas", 0, 0, _MOST_COPIES)
    if experts + replicas > _MOST_COPIES:
        raise PlacementError(f"{experts + replicas} copies in a layer; expected at most {_MOST_COPIES}")
    if layers * ranks * experts > _MOST_HOLDERS:
        raise PlacementError(
            f"{layers} layers of {experts} experts on {ranks} ranks are too many at once; expected at most "
            f"{_MOST_HOLDERS} of layers x ranks x experts: solve some layers at a time"
        )
    tokens = _whole(arrays, "tokens", 2, experts - 1) if "tokens" in arrays else None
    if tokens is not None and not (1 <= len(tokens) <= _MOST_TOKENS and 1 <= tokens.shape[1] <= experts):
        raise PlacementError(f"tokens of shape {tokens.shape}; expected (T, K), T at most {_MOST_TOKENS}")
    return Problem(
        load_SLE=load_SLE.astype(np.float64),
        ranks=ranks,
        replicas=replicas,
        nodes=max(_number(arrays, "nodes", 1, 0, ranks), 1),
        groups=max(_number(arrays, "groups", 1, 0, experts), 1),
        objective=_objective(arrays),
        speed_P=_speed(arrays, ranks),
        current_LPE=_current(arrays, layers, experts, ranks),
        move_cost=_real(arrays, "move_cost", 0.0),
        max_moves=_number(arrays, "max_moves", -1, -1, _MOST_COPIES),
        token_TK=None if tokens is None else tokens.astype(np.int64),
        token_step_T=_token_steps(arrays, tokens),
        top_k=_number(arrays, "top_k", 0, 0, experts) or None,
    )


def write_problem(problem: Problem, path: Path) -> None:
    """Write a problem as `read_problem` reads it.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {
        "loads": np.rint(problem.load_SLE).astype(np.int64),
        "speed": problem.speeds,
        "objective": np.array(problem.objective.value),
        "move_cost": np.array(problem.move_cost),
    }
    for key in ("ranks", "replicas", "nodes", "groups", "max_moves"):
        arrays[key] = np.array(getattr(problem, key))
    if problem.top_k is not None:
        arrays["top_k"] = np.array(problem.top_k)
    _, layers, experts = problem.load_SLE.shape
    arrays["current"] = np.zeros((layers, experts, problem.ranks), dtype=np.int8)
    if problem.current_LPE is not None:
        arrays["current"] = problem.current_LPE.transpose(0, 2, 1)
    if problem.token_TK is not None and problem.token_step_T is not None:
        arrays |= {"tokens": problem.token_TK, "token_step": problem.token_step_T}
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy takes keywords for its own options too


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with open_plain(path) as handle, zipfile.ZipFile(handle) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if len(members) > _MOST_MEMBERS or size > _MOST_BYTES:
                raise PlacementError(
                    f"problem {path} has {len(members)} arrays of {size} bytes; expected at most "
                    f"{_MOST_MEMBERS} of {_MOST_BYTES >> 20} MiB in all"
                )
            arrays: dict[str, NDArray[Any]] = {}
            for member in members:
                key = member.filename.removesuffix(".npy")
                if key in arrays:
                    raise ValueError(f"two arrays {key[:40]}")
                with archive.open(member) as content:
                    arrays[key] = _read_array(content, member.file_size)
            return arrays
    except OSError as error:
        raise PlacementError(f"problem {path} cannot be read ({error.strerror or error})") from error
    except (
        zipfile.BadZipFile,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        MemoryError,
        zlib.error,
    ) as error:
        raise PlacementError(
            f"problem {path} is not valid ({str(error)[:200]!r}); expected an archive as numpy.savez "
            "writes it"
        ) from error


def _read_array(content: IO[bytes], size: int) -> NDArray[Any]:
    """An array of numbers or text, of no more bytes than its member has."""
    version = npy.read_magic(content)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of an array")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read(content)
    if dtype.kind not in "biufUS" or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype}")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count > _MOST_NUMBERS:
        raise ValueError(f"an array of shape {shape}")
    if count * dtype.itemsize > size:
        raise ValueError(f"an array of shape {shape} in {size} bytes")
    flat = np.frombuffer(content.read(count * dtype.itemsize), dtype=dtype)
    array: NDArray[Any] = flat.reshape(shape, order="F" if is_fortran else "C")
    return array


def _whole(arrays: Mapping[str, NDArray[Any]], key: str, dimensions: int, most: int) -> NDArray[Any]:
    array = arrays[key]
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.all(array == np.rint(array)):
        array = array.clip(-1, 2.0**62).astype(np.int64)
    if array.dtype.kind == "b":
        array = array.astype(np.int8)
    if array.ndim != dimensions or array.dtype.kind not in "iu":
        raise PlacementError(
            f"{key} has shape {array.shape} of {array.dtype}; expected {dimensions} dimensions of whole "
            "numbers"
        )
    most_numbers = _MOST_NUMBERS if key == "current" else _MOST_LOADS
    if array.size > most_numbers:
        raise PlacementError(f"{key} has {array.size} numbers; expected at most {most_numbers}")
    if array.size and (array.min() < 0 or array.max() > most):
        raise PlacementError(f"{key} holds {array.min()} to {array.max()}; expected 0 to {most}")
    return array


def _scalar(arrays: Mapping[str, NDArray[Any]], key: str, kinds: str) -> Any:
    array = arrays[key]
    if array.size != 1 or array.dtype.kind not in kinds:
        raise PlacementError(f"{key} has shape {array.shape} of {array.dtype}; expected one value")
    return array.reshape(-1)[0].item()


def _number(arrays: Mapping[str, NDArray[Any]], key: str, default: int, low: int, high: int) -> int:
    if key not in arrays:
        return default
    value = _scalar(arrays, key, "iuf")
    if not math.isfinite(value) or int(value) != value:
        raise PlacementError(f"{key} is {value}; expected a whole number")
    value = int(value)
    if not low <= value <= high:
        raise PlacementError(f"{key} is {value}; expected {low} to {high}")
    return value


def _real(arrays: Mapping[str, NDArray[Any]], key: str, default: float) -> float:
    if key not in arrays:
        return default
    value = float(_scalar(arrays, key, "iuf"))
    if not (np.isfinite(value) and value >= 0):
        raise PlacementError(f"{key} is {value}; expected a number that is not negative")
    return value


def _objective(arrays: Mapping[str, NDArray[Any]]) -> Objective:
    if "objective" not in arrays:
        return Objective.STEP
    value = _scalar(arrays, "objective", "US")
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    try:
        return Objective(text)
    except ValueError:
        raise PlacementError(f"objective is {text[:40]!r}; expected one of {', '.join(Objective)}") from None


def _speed(arrays: Mapping[str, NDArray[Any]], ranks: int) -> Float64 | None:
    if "speed" not in arrays:
        return None
    return checked_speeds(arrays["speed"], ranks)


def checked_speeds(speed: NDArray[Any], ranks: int) -> Float64 | None:
    """Speeds of the ranks; None where all are alike.

    Raises:
        PlacementError: not one positive number for each rank, or the fastest is over 1000 times the slowest.
    """
    if speed.shape != (ranks,) or speed.dtype.kind not in "iuf":
        raise PlacementError(
            f"speeds have shape {speed.shape} of {speed.dtype}; expected one number for each of {ranks} ranks"
        )
    speed_P: Float64 = speed.astype(np.float64)
    if not np.isfinite(speed_P).all() or speed_P.min() <= 0 or speed_P.max() > 1000 * speed_P.min():
        raise PlacementError(
            f"speeds are {speed_P.min()} to {speed_P.max()}; expected positive numbers, none over 1000 times "
            "another"
        )
    return None if speed_P.min() == speed_P.max() else speed_P


def read_speeds(path: Path, ranks: int) -> Float64 | None:
    """Speeds of the ranks from a file: a JSON list, or numbers separated by commas, spaces or lines.

    Raises:
        PlacementError: it cannot be read, or is not one positive number for each rank.
    """
    try:
        content = read_at_most(path, MAX_DOCUMENT_BYTES)
        if content is None:
            raise ValueError(f"over {MAX_DOCUMENT_BYTES >> 20} MiB")
        text = content.decode("utf-8").strip()
        values = parse_json(content) if text.startswith("[") else text.replace(",", " ").split()
        speed_P = np.array([float(value) for value in values])
    except OSError as error:
        raise PlacementError(f"speeds {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError) as error:
        raise PlacementError(
            f"speeds {path} are not valid ({str(error)[:100]!r}); expected a list of one number for each rank"
        ) from error
    return checked_speeds(speed_P, ranks)


def _current(
    arrays: Mapping[str, NDArray[Any]], layers: int, experts: int, ranks: int
) -> NDArray[np.int8] | None:
    if "current" not in arrays:
        return None
    held_LEP = _whole(arrays, "current", 3, 127)
    if held_LEP.shape != (layers, experts, ranks):
        raise PlacementError(
            f"current has shape {held_LEP.shape}; expected {(layers, experts, ranks)}: layers, experts, ranks"
        )
    if not held_LEP.any():
        return None
    slots_LP = held_LEP.sum(axis=1, dtype=np.int64)
    if slots_LP.min() != slots_LP.max() or not held_LEP.any(axis=2).all():
        raise PlacementError(
            f"current gives ranks {slots_LP.min()} to {slots_LP.max()} copies; expected as many on every "
            "rank, and at least one of every expert"
        )
    held_LPE: NDArray[np.int8] = held_LEP.transpose(0, 2, 1).astype(np.int8)
    return held_LPE


def _token_steps(arrays: Mapping[str, NDArray[Any]], token_TK: NDArray[Any] | None) -> Int64 | None:
    if token_TK is None:
        return None
    if "token_step" not in arrays:
        return np.zeros(len(token_TK), dtype=np.int64)
    step_T: Int64 = _whole(arrays, "token_step", 1, 1 << 40).astype(np.int64)
    if len(step_T) != len(token_TK):
        raise PlacementError(f"{len(token_TK)} tokens with {len(step_T)} steps; expected one step for each")
    return step_T
