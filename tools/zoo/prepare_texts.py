"""Make the bundled texts from unpacked Debian packages: `python -m tools.zoo.prepare_texts PACKAGES`.

PACKAGES holds one folder per package, made with `apt-get download NAME` and `dpkg -x FILE PACKAGES/NAME`
(the names are the keys of `PACKAGE_NAMES`). Each condition becomes two files, `NAME.train.txt.xz` and
`NAME.held_out.txt.xz`: documents (a chapter, a page, a module, a run of table rows) are put in a seeded
order, every fifth one goes to the held-out part, and each part stops at its limit. A document is never split
between the two. Lines that hold an e-mail address are dropped.
"""

import argparse
import lzma
import random
import re
import sys
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

PACKAGE_NAMES = {
    "prose": ("r-cran-janeaustenr",),
    "code": ("libpython3.11-stdlib", "libpython3.11-minimal"),
    "foreign": (
        "debian-handbook",
        "debian-reference-fr",
        "developers-reference-fr",
        "installation-guide-amd64",
        "harden-doc",
        "aptitude-doc-fr",
    ),
    "structured": ("pci.ids", "usb.ids", "unicode-data"),
}
TRAIN_LIMIT_BYTES = 1_250_000
HELD_OUT_LIMIT_BYTES = 330_000
DOCUMENT_BYTES = 8_000  # of a table: this many bytes of rows make one document
LARGEST_MODULE_BYTES = 80_000
SEED = 20_250_101

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")
_CHAPTER = re.compile(r"^(?:chapter|volume)\s+[ivxlc\d]+\.?$", re.IGNORECASE | re.MULTILINE)
_SKIPPED_PAGES = re.compile(r"^index\.|acknowledg|contrib|changelog|gpl")
_FRENCH_WORDS = frozenset(
    [
        "le",
        "la",
        "les",
        "l",
        "de",
        "des",
        "du",
        "d",
        "un",
        "une",
        "et",
        "est",
        "en",
        "que",
        "qui",
        "pour",
        "dans",
        "ce",
        "pas",
        "avec",
        "sur",
        "au",
        "par",
    ]
)
_ENGLISH_WORDS = frozenset(
    [
        "the",
        "of",
        "to",
        "and",
        "is",
        "in",
        "that",
        "for",
        "with",
        "this",
        "you",
        "by",
        "or",
        "be",
        "it",
        "can",
        "not",
        "are",
    ]
)
_BLOCK_TAGS = frozenset({"div", "p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "td", "th", "title", "pre"})
_SKIPPED_TAGS = frozenset({"pre", "script", "style", "head"})
_SKIPPED_CLASSES = frozenset({"docnav", "toc", "producttitle"})


class _Paragraphs(HTMLParser):
    """Collects the text of block elements, without code listings and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._skipped: list[str] = []  # open tags since, and including, the one that is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._skipped.append(tag)
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in _BLOCK_TAGS:
            self.flush()
        if tag in _SKIPPED_TAGS or classes & _SKIPPED_CLASSES:
            self._skipped.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An empty element has no text and opens nothing."""
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag in self._skipped:
                while self._skipped.pop() != tag:
                    pass
            return
        if tag in _BLOCK_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._words.append(data)

    def flush(self) -> None:
        """Close the open paragraph."""
        text = " ".join("".join(self._words).split())
        self._words.clear()
        if text:
            self.paragraphs.append(text)


def html_paragraphs(html: str) -> list[str]:
    """Text paragraphs of a page, in order, without listings, navigation and markup."""
    parser = _Paragraphs()
    parser.feed(html)
    parser.close()
    parser.flush()
    return parser.paragraphs


def split_documents(documents: list[str], *, seed: int = SEED) -> tuple[str, str]:
    """Train and held-out text of one condition, disjoint by document.

    Args:
        documents: whole documents, in any order; duplicates are taken once.
        seed: of the order they are taken in.

    Returns:
        (train, held_out), each cut off at the end of the document that reached its limit.
    """
    unique = sorted({document for document in documents if document})
    random.Random(seed).shuffle(unique)
    parts: tuple[list[str], list[str]] = ([], [])
    sizes_bytes, limits_bytes = [0, 0], (TRAIN_LIMIT_BYTES, HELD_OUT_LIMIT_BYTES)
    for index, document in enumerate(unique):
        part = 1 if index % 5 == 4 else 0
        if sizes_bytes[part] < limits_bytes[part]:
            parts[part].append(document)
            sizes_bytes[part] += len(document.encode())
    return "\n\n".join(parts[0]) + "\n", "\n\n".join(parts[1]) + "\n"


def prepare(condition: str, packages: Path) -> tuple[str, str]:
    """Train and held-out text of a condition, from the unpacked packages."""
    documents = [_without_addresses(text) for text in _READERS[condition](packages)]
    return split_documents(documents)


def _without_addresses(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines() if not _EMAIL.search(line)).strip("\n")


def _prose(packages: Path) -> list[str]:
    """Chapters of the novels; each R object is a 4-byte length and a zlib stream of serialised strings."""
    data = next((packages / "r-cran-janeaustenr").rglob("data/Rdata.rdb")).read_bytes()
    chapters: list[str] = []
    while data:
        stream = zlib.decompressobj()
        novel = "\n".join(_r_strings(stream.decompress(data[4:])))
        data = stream.unused_data
        chapters.extend(_unwrapped(chapter) for chapter in _CHAPTER.split(novel))
    return [chapter for chapter in chapters if len(chapter) > 1_000]


def _r_strings(serialised: bytes) -> list[str]:
    """The elements of one serialised R character vector (format 3, big-endian XDR)."""
    position = 14 + 4 + int.from_bytes(serialised[14:18]) + 4  # header, native encoding, vector flags
    count = int.from_bytes(serialised[position : position + 4])
    position += 4
    strings = []
    for _ in range(count):
        length = int.from_bytes(serialised[position + 4 : position + 8], signed=True)
        position += 8
        strings.append(serialised[position : position + max(length, 0)].decode("utf-8"))
        position += max(length, 0)
    return strings


def _unwrapped(text: str) -> str:
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _code(packages: Path) -> list[str]:
    modules = []
    for name in PACKAGE_NAMES["code"]:
        for path in sorted((packages / name).rglob("*.py")):
            if {"encodings", "pydoc_data", "test", "tests"} & set(path.parts) or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 1_000 < len(text) < LARGEST_MODULE_BYTES:
                modules.append(text)
    return modules


def _foreign(packages: Path) -> list[str]:
    """Pages of French manuals, without the paragraphs that are not translated yet."""
    pages = []
    for name in PACKAGE_NAMES["foreign"]:
        for path in sorted((packages / name).rglob("*.html")):
            french = {"fr", "fr-FR"} & set(path.parts) or path.name.endswith(".fr.html")
            if not french or _SKIPPED_PAGES.search(path.name):
                continue
            found = html_paragraphs(path.read_text(encoding="utf-8", errors="ignore"))
            kept = [paragraph for paragraph in found if len(paragraph) > 60 and is_french(paragraph)]
            pages.append("\n\n".join(dict.fromkeys(kept)))
    return [page for page in pages if len(page) > 500]


def is_french(text: str) -> bool:
    """Whether a paragraph has more French than English function words."""
    words = re.findall(r"[a-zà-ÿ]+", text.lower())
    return sum(word in _FRENCH_WORDS for word in words) > 2 * sum(word in _ENGLISH_WORDS for word in words)


def _structured(packages: Path) -> list[str]:
    names = {
        "pci.ids": "usr/share/misc/pci.ids",
        "usb.ids": "var/lib/usbutils/usb.ids",
        "unicode-data": "usr/share/unicode/UnicodeData.txt",
    }
    documents: list[str] = []
    for package, relative in names.items():
        rows: list[str] = []
        size_bytes = 0
        first = len(documents)
        for line in (packages / package / relative).read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if size_bytes > DOCUMENT_BYTES and not line.startswith("\t"):
                documents.append("\n".join(rows))
                rows, size_bytes = [], 0
            rows.append(line)
            size_bytes += len(line)
        documents.append("\n".join(rows))
        if (
            package == "unicode-data"
        ):  # the largest table by far: every third piece, so that it is not most of it
            documents = documents[:first] + documents[first::3]
    return documents


_READERS: dict[str, Callable[[Path], list[str]]] = {
    "prose": _prose,
    "code": _code,
    "foreign": _foreign,
    "structured": _structured,
}


def main(argv: list[str] | None = None) -> int:
    """Write the eight files and say their sizes; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tools.zoo.prepare_texts", description=__doc__)
    parser.add_argument("packages", type=Path, help="folder with one unpacked package per sub-folder")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[2] / "observatory" / "zoo" / "texts"
    )
    arguments = parser.parse_args(argv)
    for condition, names in PACKAGE_NAMES.items():
        missing = [name for name in names if not (arguments.packages / name).is_dir()]
        if missing:
            print(f"{arguments.packages} lacks {', '.join(missing)}; unpack with dpkg -x", file=sys.stderr)
            return 1
        for part, text in zip(("train", "held_out"), prepare(condition, arguments.packages), strict=True):
            packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
            (arguments.out / f"{condition}.{part}.txt.xz").write_bytes(packed)
            print(f"{condition}.{part}: {len(text.encode())} bytes, {len(packed)} packed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
