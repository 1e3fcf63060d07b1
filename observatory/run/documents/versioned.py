"""Versioned JSON documents other than run manifests, read from untrusted files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from observatory.errors import BenchmarkError, ObservatoryError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, first_problem, parse_json, read_at_most
from observatory.run.records import Record

Document = TypeVar("Document", bound=Record)


class _Version(Record):
    schema_version: str


def load_document(
    kind: type[Document],
    path: Path | str,
    *,
    version: str,
    what: str,
    remedy: str,
    failure: type[ObservatoryError] = BenchmarkError,
) -> Document:
    """Read and check a document of at most 16 MiB.

    Args:
        kind: the record it must be.
        path: the file.
        version: the schema version this program writes; a newer major is refused.
        what: name of such files in messages.
        remedy: how to get a good one, for messages.
        failure: the error to raise.

    Raises:
        ObservatoryError: of the kind ``failure``: not readable, too large, of a newer schema, or not what the
            schema says.
    """
    path = Path(path)
    try:
        content = read_at_most(path, MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise failure(f"{what} {path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:  # a name no file can have
        raise failure(f"{what} {str(path)!r} is no file name; {remedy}") from error
    if content is None:
        raise failure(f"{what} {path} is over {MAX_DOCUMENT_BYTES >> 20} MiB; {remedy}")
    try:
        document = parse_json(content)
    except ValueError as error:
        raise failure(f"{what} {path} is not valid ({first_problem(error)}); {remedy}") from error
    kinds = get_args(kind.model_fields["kind"].annotation) if "kind" in kind.model_fields else ()
    if not kinds or (isinstance(document, dict) and document.get("kind") in kinds):
        _refuse_newer(document, version, f"{what} {path}", failure)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise failure(f"{what} {path} is not valid ({first_problem(error)}); {remedy}") from error


def _refuse_newer(document: Any, version: str, name: str, failure: type[ObservatoryError]) -> None:
    """Distinguish a newer schema from damage, which the document's own check reports."""
    try:
        found = _Version.model_validate(document).schema_version
        newer = int(found.split(".", maxsplit=1)[0]) > int(version.split(".", maxsplit=1)[0])
    except (ValidationError, ValueError):
        return
    if newer:
        raise failure(
            f"{name} has schema {found[:20]}, this program reads up to {version}",
            remedy="update moe-observatory",
        )
