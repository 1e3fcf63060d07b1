"""The recipes of texts and tokenizer, and the size of what is bundled."""

import json
import zipfile
from pathlib import Path

import pytest

import observatory.zoo
from observatory.zoo.tokenizer import END_OF_TEXT, VOCABULARY_SIZE, load_tokenizer, train_tokenizer
from tools.zoo.prepare_texts import html_paragraphs, is_french, main, split_documents

ZOO = Path(observatory.zoo.__file__).parent
DOCUMENT = ZOO.parents[1] / "docs" / "zoo.md"


def test_the_tokenizer_gives_back_every_text() -> None:
    tokenizer = load_tokenizer()
    for text in (
        "Café – naïve\n\tdef f(x): return x**2  # ünïcode",
        "\x00\x01 emoji 🙂 日本語",
        "  two  spaces ",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == VOCABULARY_SIZE
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0


def test_the_tokenizer_recipe_makes_the_asked_vocabulary(tmp_path: Path) -> None:
    train_tokenizer(["to be or not to be, that is the question " * 50], tmp_path, vocabulary_size=270)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 270
    assert tokenizer.decode(tokenizer("to be")["input_ids"]) == "to be"


def test_html_becomes_paragraphs_without_navigation_and_listings() -> None:
    page = (
        "<html><head><title>t</title></head><body><ul class='docnav'><li>Next</li></ul>"
        "<div class='para'>One <em>two</em>\n three&amp;four.</div><pre>rm -rf</pre><p>Five.<br/></p>"
        "</body></html>"
    )
    assert html_paragraphs(page) == ["One two three&four.", "Five."]


def test_french_is_told_from_english() -> None:
    assert is_french("Les administrateurs de la machine sont dans le couloir.")
    assert not is_french("The administrators of the machine are in that corridor.")
    assert not is_french("RFC 1149")


def test_documents_go_whole_to_one_of_the_two_parts_and_only_once() -> None:
    documents = [f"document {index}" for index in range(50)]
    train, held_out = split_documents(documents * 2)
    parts = [part.strip().split("\n\n") for part in (train, held_out)]
    assert [len(part) for part in parts] == [40, 10]
    assert sorted(parts[0] + parts[1]) == sorted(documents)
    assert split_documents(documents[::-1]) == (train, held_out)


def test_missing_packages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "r-cran-janeaustenr" in capsys.readouterr().err


def test_everything_bundled_fits_the_budget(tmp_path: Path) -> None:
    data = [path for path in ZOO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert max(path.stat().st_size for path in data) < 3_000_000
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in data:
            archive.write(path, path.relative_to(ZOO))
    assert (tmp_path / "zoo.zip").stat().st_size < 14_000_000


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="the documentation is not installed with the package")
def test_the_documented_losses_are_the_recorded_ones() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1].strip(" `"): line for line in lines if line.startswith("|") and "**" in line}
    for path in (ZOO / "checkpoints").glob("*/training.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        assert f"**{facts['held_out_loss_overall_nats']:.3f}**" in rows[path.parent.name]
        assert f"**{facts['unigram_cross_entropy_overall_nats']:.3f}**" in rows["unigram"]
