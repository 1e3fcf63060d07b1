"""Data conditions, files and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observatory.errors import DataError
from observatory.zoo.data import (
    CONDITIONS,
    REAL_CONDITIONS,
    TokenStream,
    batches,
    load_token_ids,
    read_bundled_text,
)
from observatory.zoo.tokenizer import VOCABULARY_SIZE, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def load(data: str, tokenizer: Any, **options: Any) -> TokenStream:
    options = {"vocabulary_size": VOCABULARY_SIZE, "tokens": 2_000, **options}
    return load_token_ids(data, tokenizer, **options)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_gives_the_same_ids_again_under_the_same_seed(condition: str, tokenizer: Any) -> None:
    first, second = (load(condition, tokenizer, seed=7) for _ in range(2))
    assert first.ids.dtype == np.int64
    assert first.ids.shape == (2_000,)
    assert first.condition == condition
    assert first.real == (condition in REAL_CONDITIONS)
    assert first.wrapped == 0
    np.testing.assert_array_equal(first.ids, second.ids)


@pytest.mark.parametrize("condition", ["shuffled", "mock"])
def test_another_seed_gives_other_ids(condition: str, tokenizer: Any) -> None:
    assert not np.array_equal(load(condition, tokenizer).ids, load(condition, tokenizer, seed=1).ids)


def test_shuffled_has_the_histogram_of_the_real_tokens_in_another_order(tokenizer: Any) -> None:
    real = np.concatenate([load(name, tokenizer, tokens=500).ids for name in REAL_CONDITIONS])
    shuffled = load("shuffled", tokenizer).ids
    np.testing.assert_array_equal(np.bincount(shuffled, minlength=4096), np.bincount(real, minlength=4096))
    assert (shuffled != real).mean() > 0.9


def test_mock_is_uniform_below_the_vocabulary_size() -> None:
    ids = load("mock", None, vocabulary_size=50, tokens=100_000).ids
    counts = np.bincount(ids, minlength=50)
    assert ids.min() == 0
    assert ids.max() == 49
    assert abs(counts - 2_000).max() < 5 * np.sqrt(2_000)


def test_the_held_out_part_holds_none_of_the_documents_of_the_training_part() -> None:
    for name in REAL_CONDITIONS:
        train, held_out = (read_bundled_text(name, split=split) for split in ("train", "held_out"))
        middle = len(held_out) // 2
        assert held_out[middle : middle + 400] not in train


def test_each_real_condition_has_64_k_held_out_tokens(tokenizer: Any) -> None:
    for name in REAL_CONDITIONS:
        assert load(name, tokenizer, tokens=65_536).wrapped == 0


def test_texts_hold_no_mail_addresses() -> None:
    for name in REAL_CONDITIONS:
        text = read_bundled_text(name, split="train")
        assert "@debian.org" not in text
        assert "@python.org" not in text


def test_a_text_file_is_encoded_and_repeated_only_when_too_short(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 40, encoding="utf-8"
    )
    whole = np.asarray(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    stream = load(str(path), tokenizer, tokens=100)
    np.testing.assert_array_equal(stream.ids, whole[:100])
    assert (stream.real, stream.wrapped, stream.condition) == (True, 0, "file")
    longer = load(str(path), tokenizer, tokens=2 * whole.size + 1)
    assert longer.wrapped == 2
    np.testing.assert_array_equal(longer.ids[whole.size : 2 * whole.size], whole)


def test_a_cut_inside_a_character_is_no_error(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" + "ä" * 4_000, encoding="utf-8")
    assert load(str(path), tokenizer, tokens=10).ids.size == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"ab\xff\xfecd" * 90, "not UTF-8"),
        (b"ab\x00cd" * 90, "binary"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    content: bytes, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(str(path), tokenizer)


@pytest.mark.parametrize("name", ["no/such/file.txt", "prosa", "a\x00b", "x" * 5_000, "n\n" * 3])
def test_an_unknown_name_is_refused_in_one_printable_line(name: str, tokenizer: Any) -> None:
    with pytest.raises(DataError) as refusal:
        load(name, tokenizer)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="another model"):
        load("prose", tokenizer, vocabulary_size=100)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        load("prose", None)


def test_a_missing_datasets_package_names_what_to_install(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observatory.zoo.hub_datasets.find_spec", lambda _: None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("datasets:org/name", tokenizer)
    with pytest.raises(DataError, match="write it like that"):
        load("datasets:", tokenizer)


def test_batches_are_consecutive_and_start_again_at_the_beginning() -> None:
    ids = np.arange(11)
    first, second = batches(ids, batch_size=2, sequence_length=3, steps=2)
    np.testing.assert_array_equal(first, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(second, [[6, 7, 8], [0, 1, 2]])


def test_too_few_tokens_for_one_sequence_are_refused() -> None:
    with pytest.raises(DataError, match="do not fill"):
        batches(np.arange(5), batch_size=1, sequence_length=6, steps=1)
    with pytest.raises(DataError, match="too small"):
        batches(np.arange(5), batch_size=0, sequence_length=1, steps=1)
