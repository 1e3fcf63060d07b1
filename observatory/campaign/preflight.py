"""What can be known to fail before anything is loaded: checks of files and names that take milliseconds.

Neither torch nor transformers is imported, and no rank is started. Of a checkpoint the configuration, the
list of weights and their headers are read; of a hub id nothing is known before it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from observatory.analysis.parallel.placement import linear, load_placement
from observatory.campaign.job import ProfileJob
from observatory.errors import ModelError, ObservatoryError, PlacementError, alike
from observatory.run.bounded import parse_json, read_at_most
from observatory.zoo.data import check_data
from observatory.zoo.models import BUNDLED_NAMES, check_dtype, find_checkpoint, has_tokenizer, read_config

#: What a model needs.
_LIBRARIES = ("torch", "transformers", "safetensors")
#: Bytes read of torch's `version.py`, of an index of weights, and of a header of weights.
_MOST_VERSION_BYTES, _MOST_INDEX_BYTES, _MOST_HEADER_BYTES = 1 << 16, 64 << 20, 100 << 20
#: Names under which the families of transformers keep the number of experts of a layer.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")


def check_job(job: ProfileJob) -> None:
    """Refuse a profile that cannot be, on every rank with the same words.

    Raises:
        ModelError, DataError: as of :func:`check_model`.
        PlacementError: the experts do not fit the ranks.
    """
    try:
        config = check_model(
            job.model,
            device=job.device,
            dtype=job.dtype,
            data=job.data,
            positions=job.positions,
            lower="--sequence-length or --steps",
            moe=True,
        )
        if config is not None:
            _check_experts(config, job)
    except ObservatoryError as error:
        raise alike(error) from None


def check_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    data: str = "mock",
    positions: int = 0,
    lower: str = "",
    moe: bool = False,
) -> dict[str, Any] | None:
    """Refuse a model that cannot be run.

    Args:
        name: bundled name, checkpoint directory or hub id.
        device: torch device.
        dtype: torch dtype name of the weights; None for the loader's choice.
        data: what it is fed, as of :func:`observatory.zoo.data.load_token_ids`.
        positions: tokens of its longest sequence.
        lower: options that lower them, for the message.
        moe: it must have experts.

    Returns:
        The configuration; None of a hub id.

    Raises:
        ModelError: a library, the model, its weights, positions or experts are missing, or the installed
            torch has no such device.
        DataError: the data are missing, or text is given for a model without a tokenizer.
    """
    check_libraries()
    check_dtype(dtype)
    directory = find_checkpoint(name)
    check_device(device)
    config = None if directory is None else read_config(directory, name)
    if moe and config is not None:
        _check_moe(config, name)
    can_read = directory is None or name in BUNDLED_NAMES or has_tokenizer(directory)
    check_data(data, has_tokenizer=can_read)
    if directory is None or config is None:
        return None
    text = config.get("text_config")
    of_text = text if isinstance(text, dict) else config
    check_length(of_text.get("max_position_embeddings"), positions, lower=lower)
    _check_weights(directory, name)
    return config


def check_libraries(names: Sequence[str] = _LIBRARIES) -> None:
    """Raise ModelError where a library is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise alike(
            ModelError(
                f"this needs {' and '.join(missing)}, which is not installed; run `pip install "
                "'moe-observatory[capture]'`"
            )
        )


def check_length(limit: object, positions: int, *, lower: str) -> None:
    """Refuse sequences longer than the model's position table.

    Args:
        limit: positions that the model has; no number when its configuration does not say.
        positions: tokens of a sequence.
        lower: options that lower them.

    Raises:
        ModelError: they are longer.
    """
    if type(limit) is int and positions > limit:
        raise ModelError(
            f"{positions} positions per sequence were requested, the model has {limit} "
            f"(max_position_embeddings); lower {lower}"
        )


def _check_moe(config: dict[str, Any], name: str) -> None:
    """Raise ModelError where a configuration shows no experts."""
    if not any(value for key, value in _entries(config) if "expert" in key or "moe" in key):
        raise ModelError(
            f"{name!r} looks dense: no experts in config.json (model type {config['model_type'][:80]}); "
            "expected a mixture-of-experts model"
        )


def check_device(device: str) -> None:
    """Refuse a GPU where the installed torch is built for none."""
    spec = find_spec("torch")
    if not device.startswith("cuda") or spec is None or spec.origin is None:
        return
    text = (read_at_most(Path(spec.origin).with_name("version.py"), _MOST_VERSION_BYTES) or b"").decode()
    built_for = dict(re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(\S+)", text, re.MULTILINE))
    if built_for and set(built_for.values()) == {"None"}:
        raise ModelError(
            f"torch device {ascii(device)[:40]} was requested, but the installed torch is built for CPUs "
            "only; install torch for CUDA or ROCm, or choose cpu"
        )


def _check_experts(config: dict[str, Any], job: ProfileJob) -> None:
    """Refuse ranks that the experts do not fit."""
    counts = {
        value for name, value in _entries(config) if name in _COUNTS and type(value) is int and value > 1
    }
    if job.ep == 1 or len(counts) != 1:
        return
    (experts,) = counts
    if job.placement in ("linear", "round-robin"):
        if job.ep > experts:
            raise PlacementError(
                f"EP {job.ep} is more ranks than the {experts} experts of a layer; give at most "
                f"--ep {experts}"
            )
        linear(experts, job.ep)  # refuses what does not divide
    else:
        file = load_placement(job.placement)
        file.holders(min(map(int, file.layers or {"0": []})), experts=experts, ep=job.ep)


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration, of nested ones as well."""
    waiting: list[dict[str, Any]] = [config]
    while waiting:
        for name, value in waiting.pop().items():
            yield name, value
            if isinstance(value, dict):
                waiting.append(value)


def _check_weights(directory: Path, name: str) -> None:
    """Refuse weights that are listed and not there, or cut off."""
    index = directory / "model.safetensors.index.json"
    files: Sequence[Path] = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        try:
            named = set(parse_json(read_at_most(index, _MOST_INDEX_BYTES) or b"")["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the list of weights of {name!r}, {index.name}, cannot be read; get it again"
            ) from error
        absent = sorted(str(part) for part in named if not (directory / Path(str(part)).name).is_file())
        if absent:
            raise ModelError(
                f"{name!r} lacks {len(absent)} of {len(named)} files of weights, first {absent[0][:120]!r}; "
                "get the whole checkpoint"
            )
    for file in files:
        if not _is_whole(file):
            raise ModelError(
                f"weights {file.name!r} of {name!r} are cut off or no safetensors file; get the file again"
            )


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, the header, the data."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            return False
        try:
            header = parse_json(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            return 8 + length + max(ends, default=0) == size
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
