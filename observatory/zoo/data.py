"""Token ids of bundled texts, user files and datasets, cut into batches. numpy only: no torch here.

Six conditions come with the package. Four are real texts (`prose`, `code`, `foreign`, `structured`, see
texts/SOURCES.md). `shuffled` has the token histogram of the four, but no order. `mock` is what benchmarks
often feed a model: ids drawn uniformly from the vocabulary.
"""

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from observatory.errors import DataError
from observatory.zoo.hub_datasets import check_dataset_name, read_dataset_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REAL_CONDITIONS: tuple[str, ...] = ("prose", "code", "foreign", "structured")
CONDITIONS: tuple[str, ...] = (*REAL_CONDITIONS, "shuffled", "mock")
SPLITS: tuple[str, ...] = ("train", "held_out")
LARGEST_TEXT_BYTES = 64 * 2**20
MOST_TOKENS = 2**30
_LONGEST_NAME = 4096
_BYTES_PER_TOKEN = 16  # more than tokenizers reach on real text
_TEXTS = Path(__file__).parent / "texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Token ids to run a model on.

    Attributes:
        condition: the name of the data condition, `file` or `datasets`.
        ids: token ids, shape (tokens,), int64, each below the vocabulary size that was asked for.
        source: where they come from, in words.
        real: whether the ids are a text in its own order; False for `shuffled` and `mock`.
        wrapped: how many times the text had to be started again to get that many tokens; 0 normally.
    """

    condition: str
    ids: NDArray[np.int64]
    source: str
    real: bool
    wrapped: int


def load_token_ids(
    data: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    vocabulary_size: int,
    tokens: int,
    seed: int = 0,
    split: str = "held_out",
) -> TokenStream:
    """Token ids of a data condition, of a text file or of a dataset.

    Args:
        data: one of `CONDITIONS`, or the path of a UTF-8 text file, or
            `datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]` for the Hugging Face `datasets` package.
        tokenizer: of the model; not needed for `mock`.
        vocabulary_size: entries of the model's embedding; every id is below it.
        tokens: how many ids are wanted.
        seed: of `shuffled` and `mock`.
        split: `train` or `held_out`, of the bundled texts.

    Raises:
        DataError: unknown or missing data, not UTF-8, empty, or tokens that the model has no embedding for.
    """
    if tokens < 1 or vocabulary_size < 1:
        raise DataError(f"tokens={tokens} and vocabulary_size={vocabulary_size}: both must be at least 1")
    if tokens > MOST_TOKENS:
        raise DataError(
            f"{tokens} tokens were asked for, at most {MOST_TOKENS} are held; ask for fewer or shorter steps"
        )
    if seed < 0:
        raise DataError(f"seed is {seed}; it must be 0 or more")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if data == "mock":
        ids = np.random.default_rng(seed).integers(0, vocabulary_size, size=tokens, dtype=np.int64)
        return TokenStream(
            condition="mock",
            ids=ids,
            source=f"uniform ids below {vocabulary_size}, seed {seed}",
            real=False,
            wrapped=0,
        )
    check_data(data, has_tokenizer=tokenizer is not None)
    if tokenizer is None:
        raise AssertionError("check_data lets only `mock` pass without a tokenizer")
    if data == "shuffled":
        mixed = [
            _bundled(name, tokenizer, vocabulary_size, _share(tokens, i), split) for i, name in _NUMBERED
        ]
        ids = np.concatenate([stream.ids for stream in mixed])
        np.random.default_rng(seed).shuffle(ids)
        return TokenStream(
            condition="shuffled",
            ids=ids,
            source=f"tokens of {', '.join(REAL_CONDITIONS)} ({split}), shuffled with seed {seed}",
            real=False,
            wrapped=max(stream.wrapped for stream in mixed),
        )
    if data in REAL_CONDITIONS:
        return _bundled(data, tokenizer, vocabulary_size, tokens, split)
    if data.startswith("datasets:"):
        text = read_dataset_text(data, limit_characters=min(tokens * _BYTES_PER_TOKEN, LARGEST_TEXT_BYTES))
        return _stream("datasets", text, data, tokenizer, vocabulary_size, tokens)
    return _from_file(data, tokenizer, vocabulary_size, tokens)


def check_data(data: str, *, has_tokenizer: bool) -> None:
    """Refuse data that no text can come from, before any of it is read.

    Args:
        data: as of `load_token_ids`.
        has_tokenizer: whether the model has one.

    Raises:
        DataError: an unknown name, a file that is missing or empty, a missing package, or text for a model
            without a tokenizer.
    """
    if data == "mock":
        return
    is_file = data not in CONDITIONS and not data.startswith("datasets:")
    if is_file and (len(data) > _LONGEST_NAME or not data.isprintable()):
        raise DataError(f"data name {_shown(data)} is not a path; expected a printable one")
    if is_file and not Path(data).is_file():
        raise DataError(
            f"no data {_shown(data)}; expected one of {', '.join(CONDITIONS)}, a text file, or datasets:NAME"
        )
    if is_file and not Path(data).stat().st_size:
        raise DataError(f"file {_shown(data)} is empty; expected some text")
    if data.startswith("datasets:"):
        check_dataset_name(data)
    if not has_tokenizer:
        raise DataError(f"{_shown(data)} is text and this model has no tokenizer; use the condition `mock`")


def batches(
    ids: NDArray[np.int64], *, batch_size: int, sequence_length: int, steps: int
) -> Iterator[NDArray[np.int64]]:
    """Consecutive batches of consecutive sequences, starting again at the beginning when the ids run out.

    Args:
        ids: shape (tokens,).
        batch_size: sequences in a batch.
        sequence_length: tokens in a sequence.
        steps: how many batches to give.

    Yields:
        ids of shape (batch_size, sequence_length), int64. Sequence s of the whole run is the
        (s mod number of whole sequences in ids)-th one.

    Raises:
        DataError: not even one sequence can be filled, or a size is below 1.
    """
    if min(batch_size, sequence_length) < 1 or steps < 0:
        raise DataError(
            f"batch size {batch_size}, sequence length {sequence_length}, steps {steps}: too small"
        )
    available = len(ids) // sequence_length
    if not available:
        raise DataError(
            f"{len(ids)} tokens do not fill a sequence of {sequence_length}; give more text or shorter ones"
        )
    sequences = np.asarray(ids[: available * sequence_length], dtype=np.int64).reshape(
        available, sequence_length
    )
    return (
        sequences[np.arange(step * batch_size, (step + 1) * batch_size) % available] for step in range(steps)
    )


def read_bundled_text(condition: str, *, split: str) -> str:
    """The whole bundled text of a real condition.

    Raises:
        DataError: no such condition or split.
    """
    if condition not in REAL_CONDITIONS or split not in SPLITS:
        raise DataError(f"no bundled text {condition}.{split}; expected one of {', '.join(REAL_CONDITIONS)}")
    return lzma.decompress((_TEXTS / f"{condition}.{split}.txt.xz").read_bytes()).decode("utf-8")


_NUMBERED = tuple(enumerate(REAL_CONDITIONS))


def _share(tokens: int, index: int) -> int:
    return tokens // len(REAL_CONDITIONS) + (index < tokens % len(REAL_CONDITIONS))


def _bundled(name: str, tokenizer: Any, vocabulary_size: int, tokens: int, split: str) -> TokenStream:
    text = read_bundled_text(name, split=split)
    return _stream(name, text, f"bundled {name} ({split})", tokenizer, vocabulary_size, tokens)


def _from_file(data: str, tokenizer: Any, vocabulary_size: int, tokens: int) -> TokenStream:
    path = Path(data)
    try:
        with path.open("rb") as file:
            raw = file.read(min(tokens * _BYTES_PER_TOKEN, LARGEST_TEXT_BYTES) + 4)
            more = bool(file.read(1))
        text = raw.decode("utf-8") if not more else _whole_characters(raw)
    except OSError as error:
        raise DataError(f"{_shown(data)} cannot be read: {error.strerror}; check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{_shown(data)} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    if "\x00" in text:
        raise DataError(
            f"{_shown(data)} holds NUL characters, so it is a binary file; expected plain UTF-8 text"
        )
    return _stream("file", text, f"file {path.name}", tokenizer, vocabulary_size, tokens)


def _whole_characters(raw: bytes) -> str:
    """Decode a prefix of a file, dropping at most one character that the cut has split."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(raw) - 4:
            raise
        return raw[: error.start].decode("utf-8")


def _stream(
    condition: str, text: str, source: str, tokenizer: Any, vocabulary_size: int, tokens: int
) -> TokenStream:
    if not text.strip():
        raise DataError(f"{source} is empty; expected some text")
    ids = _encode(tokenizer, text, wanted=tokens)
    if not ids.size:
        raise DataError(f"{source} gives no tokens with this tokenizer; expected some text")
    if ids.max() >= vocabulary_size:
        raise DataError(
            f"{source}: token id {ids.max()} does not exist in a model of {vocabulary_size} entries; "
            "the tokenizer belongs to another model"
        )
    wrapped = (tokens - 1) // ids.size
    return TokenStream(
        condition=condition,
        ids=np.resize(ids, tokens),
        source=source,
        real=True,
        wrapped=int(wrapped),
    )


def _encode(tokenizer: Any, text: str, *, wanted: int) -> NDArray[np.int64]:
    """Encode no more text than needed: growing prefixes, until there are enough tokens or no more text."""
    characters = wanted * _BYTES_PER_TOKEN
    while True:
        encoded = tokenizer(
            text[:characters],
            add_special_tokens=False,
            truncation=False,
            verbose=False,
            return_attention_mask=False,
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.int64).reshape(-1)
        if ids.size >= wanted or characters >= len(text):
            return ids
        characters *= 4


def _shown(name: str) -> str:
    """A name as it may be printed: escaped, and not longer than a line."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(name)} characters)"
