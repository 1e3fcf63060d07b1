"""Data and scripts put into a page so that nothing in them can end a script or start another."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re

from markupsafe import Markup

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_ESCAPED = re.compile("[<>&\u2028\u2029]")


def script_json(value: object) -> Markup:
    """JSON for a ``<script type="application/json">`` element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(_ESCAPED.sub(lambda match: _ESCAPES[match.group()], text))


def packed_json(value: object) -> Markup:
    """JSON, gzip, base64: a fraction of the size, and base64 holds nothing that HTML could read."""
    content = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode("ascii"))


def script_text(source: str) -> Markup:
    """Source of a program of ours for a ``<script>`` element.

    Raises:
        ValueError: the source itself would end the element.
    """
    if re.search(r"</script|<!--", source, re.IGNORECASE):
        raise ValueError("a script that holds '</script' or '<!--' cannot be put into a page")
    return Markup(source)


def content_security_policy(*scripts: str) -> str:
    """Policy that runs only ``scripts`` and lets the page load nothing from anywhere.

    A page that carries it cannot be made to run text that came from a run, even if escaping failed.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
