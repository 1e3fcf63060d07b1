"""The zoo's byte-level BPE tokenizer, and the recipe that trains it: `python -m observatory.zoo.tokenizer`.

All five checkpoints share it. It is trained on the four bundled training texts, so the held-out parts are as
new to it as to the models. Every byte string can be encoded: there is no unknown token.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.zoo.data import REAL_CONDITIONS, read_bundled_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_DIRECTORY = Path(__file__).parent / "vocabulary"


def train_tokenizer(texts: list[str], directory: Path, *, vocabulary_size: int = VOCABULARY_SIZE) -> Path:
    """Train byte-level BPE and save it where `load_tokenizer` and transformers find it.

    Args:
        texts: what to learn merges from.
        directory: made if missing; receives `tokenizer.json` and `tokenizer_config.json`.
        vocabulary_size: entries, including 256 bytes and the end-of-text token (id 0).

    Returns:
        Path of `tokenizer.json`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path


def load_tokenizer(directory: Path = TOKENIZER_DIRECTORY) -> "PreTrainedTokenizerBase":
    """The tokenizer saved in a directory, the bundled one by default."""
    import transformers as library

    transformers: Any = library  # it is typed in parts only
    tokenizer: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    """Train on the bundled texts and save."""
    parser = argparse.ArgumentParser(prog="python -m observatory.zoo.tokenizer", description=__doc__)
    parser.add_argument("--out", type=Path, default=TOKENIZER_DIRECTORY)
    parser.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE)
    arguments = parser.parse_args(argv)
    texts = [read_bundled_text(condition, split="train") for condition in REAL_CONDITIONS]
    path = train_tokenizer(texts, arguments.out, vocabulary_size=arguments.vocabulary_size)
    print(f"{path}: {path.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
