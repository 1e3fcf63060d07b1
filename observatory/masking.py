"""Secrets out of what is kept: command lines, options and messages with values of secret names masked.

What is secret is decided by the name before a value, split into words at ``-``, ``_``, ``.`` and capitals. A
name is secret where it holds a word that stands for nothing else (``password``, ``secret``, ``apikey``), or
ends in one that often does (``token``, ``key``, ``auth``, ``pass``) unless the word before says otherwise
(``eos-token``, ``sort-key``). ``tokens`` and ``keys`` are counts, unless of an API. docs/run-format.md has
the rule and its limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import JsonValue

__all__ = ["MASK", "is_secret_name", "masked_arguments", "masked_entry", "masked_text"]

MASK = "***"

_ALWAYS = re.compile(
    r"passw|passphrase|passcode|secret|credential|apikey|accesskey|secretkey|privatekey|authkey|bearer"
    r"|authoriz|^(creds?|pwd|userpwd|jwt|otp|dsn|cookies?|pat|psk|sas|webhook)$|pwd$|token$"
)
_LAST = {"key", "auth", "pass", "passes", "keys", "tokens"}
_KINDS = {
    "api", "access", "auth", "secret", "private", "ssh", "encryption", "signing", "account", "license",
    "hf", "hub", "wandb", "bearer", "refresh", "master", "service", "storage", "client",
}  # fmt: skip
#: Words before the last that make it no secret: tokens of a vocabulary, keys of a table, passes of a model.
_HARMLESS = {
    "token": {
        "per", "pad", "padding", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video",
        "special",
        "next", "first", "last", "stop", "start", "end", "begin", "each", "every", "by", "time", "us", "ms",
        "decode", "prefill", "prompt", "drop", "null",
    },
    "key": {
        "public", "sort", "primary", "foreign", "partition", "group", "join", "cache", "dict", "metric",
        "index",
        "column", "json", "data", "text", "label", "input", "output", "query", "config", "by", "state", "hot",
        "attention", "qk", "kv", "per",
    },
    "pass": {"forward", "backward", "first", "second", "single", "one", "two", "multi", "by", "per", "all"},
    "auth": {"no"},
}  # fmt: skip
#: A name that ends so is about a secret, and its value is none.
_ABOUT = {
    "file", "path", "dir", "len", "length", "size", "limit", "count", "type", "name", "ids", "index",
    "budget",
    "rate", "timeout", "expiry", "ttl", "url", "prompt", "heads",
}  # fmt: skip
_NEGATED = {"no", "use", "with", "without", "skip", "require", "ask", "has", "is", "enable", "disable"}
_WORKING_DIRECTORY = {"PWD", "OLDPWD"}

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_OPTION = re.compile(r"(-{1,2}|\+{1,2}|/)?[A-Za-z_][\w.:\-\[\]/]*")
_LOOKS_LIKE_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
_URL_USER = re.compile(
    r"(?<![A-Za-z0-9+.\-])(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<user>[^\s/?#'\"<>]*)@"
)
_SCHEMES = re.compile(
    r"\b(?P<scheme>bearer|basic|digest|negotiate|token)(?P<space>[ \t]+)[^\s'\",;]{6,}", re.I
)
_HEADER = re.compile(
    r"\b(?P<name>(?:proxy-)?authorization|(?:set-)?cookie)(?P<gap>[\"']?\s*[:=]\s*[\"']?)[^\n\"']+", re.I
)
_PAIR = re.compile(
    r"(?<![\w.\-])(?P<name>-{0,2}[A-Za-z_][\w.\-]*)(?P<gap>[\"'\\]{0,4}\s{0,8}(?:=>|:=|[:=])\s{0,8})"
)
_OPTION_IN_TEXT = re.compile(r"(?<![\w-])(?P<name>--?[A-Za-z][\w-]*)(?P<gap>\s{1,8})(?!-)")
_VALUE = re.compile(
    r"(?P<quote>\\?[\"'])(?:(?!(?P=quote)).){0,4096}(?P=quote)|\[[^\]]{0,4096}\]|[^\s,;&|'\"{}\[\]()\\]+",
    re.DOTALL,
)
#: Tokens that are known by their look, whatever stands before them.
_KNOWN = re.compile(
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_LONGEST_TEXT = 1 << 16


def is_secret_name(name: str) -> bool:
    """Whether the value of an option, variable or key of this name is a secret."""
    if name in _WORKING_DIRECTORY:
        return False
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or words[0] in _NEGATED:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "id" and "access" in words and "key" in words:
        return True
    if last in _ABOUT or before in _HARMLESS.get(last, ()):
        return False
    if last in ("keys", "tokens", "passes"):
        return last != "passes" and before in _KINDS
    return last in _LAST or any(_ALWAYS.search(word) for word in words if word != "token" or word is last)


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with its secrets masked: ``--name=value``, ``--name value``, and within texts."""
    masked: list[str] = []
    secret_follows = False
    for argument in arguments:
        follows, secret_follows = secret_follows, False
        name, equals, _ = argument.partition("=")
        if follows and not _LOOKS_LIKE_OPTION.fullmatch(argument):
            masked.append(MASK)
        elif equals and _OPTION.fullmatch(name) and is_secret_name(name):
            masked.append(f"{name}={MASK}")
        else:
            secret_follows = not equals and argument.startswith("-") and is_secret_name(argument)
            masked.append(masked_text(argument))
    return masked


def masked_text(text: str) -> str:
    """A text with secrets masked: users in URLs, headers, pairs of name and value, known kinds of tokens."""
    text = text[:_LONGEST_TEXT]
    text = _URL_USER.sub(_masked_user, text)
    text = _HEADER.sub(lambda found: f"{found['name']}{found['gap']}{MASK}", text)
    text = _SCHEMES.sub(_masked_scheme, text)
    for pattern in (_PAIR, _OPTION_IN_TEXT):
        text = _masked_values(text, pattern)
    return _KNOWN.sub(MASK, text)


def masked_entry(key: str, value: JsonValue) -> JsonValue:
    """A JSON value with all texts below a secret key masked, and secrets within other texts."""
    if isinstance(value, dict):
        return {
            name: masked_entry(name if is_secret_name(name) else key, item) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked_entry(key, item) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if is_secret_name(key) else masked_text(value)


def _masked_user(found: re.Match[str]) -> str:
    user, colon, password = found["user"].partition(":")
    if colon and password:
        return f"{found['scheme']}://{user}:{MASK}@"
    # Services take a token as the user; the user of ssh is a name.
    return f"{found['scheme']}://{MASK}@" if found["scheme"].startswith("http") and user else found[0]


def _masked_scheme(found: re.Match[str]) -> str:
    return f"{found['scheme']}{found['space']}{MASK}"


def _masked_values(text: str, names: re.Pattern[str]) -> str:
    """The text with the values behind secret names masked, in their quotes."""
    pieces: list[str] = []
    at = 0
    for found in names.finditer(text):
        if found.start() < at or not is_secret_name(found["name"]):
            continue
        value = _VALUE.match(text, found.end())
        if value is not None and not value[0].startswith(MASK):
            quote = value["quote"] or ""
            pieces += [text[at : found.end()], quote, MASK, quote]
            at = value.end()
    return "".join([*pieces, text[at:]])
