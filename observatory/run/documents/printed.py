"""What ``--json`` documents have in common; their keys are described in docs/json.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Of all printed documents: minor when keys are added, major when one goes or changes its meaning.
PRINTED_VERSION = "1.0"


def printed_document(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A document that says what it is.

    Args:
        kind: name of the document, such as ``routing``.
        content: its keys; a record that is kept in files brings its own ``schema_version``.
    """
    return {"kind": kind, "schema_version": PRINTED_VERSION, **content}
