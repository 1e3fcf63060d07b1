"""Secrets out of what is kept: command lines, options and messages with values of secret names masked.

What is secret is decided by the name before a value, split into words at ``-``, ``_``, ``.`` and capitals. A
name is secret where it holds a word that stands for nothing else (``password``, ``secret``, ``apikey``), or
ends in one that often does (``token``, ``key``, ``auth``, ``pass``) unless the word before says otherwise
(``eos-token``, ``sort-key``). ``tokens`` and ``keys`` are counts, unless of an API. docs/run-format.md has
the rule and its limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pydantic import JsonValue

MASK = "***"

_ALWAYS = re.compile(
    r"passw|passphrase|passcode|secret|credential|apikey|accesskey|secretkey|privatekey|authkey|bearer"
    r"|authoriz|^(creds?|pwd|userpwd|jwt|t?otp|dsn|cookies?|psk|sas|webhook|mnemonic|hmac)$|pwd$|token$"
)
_LAST = {"key", "auth", "pass", "pat"}
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
        "decode", "prefill", "prompt", "drop", "null", "n", "num", "unexpected",
    },
    "key": {
        "public", "sort", "primary", "foreign", "partition", "group", "join", "cache", "dict", "metric",
        "index",
        "column", "json", "data", "text", "label", "input", "output", "query", "config", "by", "state", "hot",
        "attention", "attn", "qk", "kv", "per", "n", "num", "missing", "unexpected",
    },
    "pass": {"forward", "backward", "first", "second", "single", "one", "two", "multi", "by", "per",
             "all", "n", "num"},
    "auth": {"no"},
}  # fmt: skip
#: A name that ends so is about a secret, and its value is none.
_ABOUT = {
    "file", "path", "dir", "len", "length", "size", "limit", "count", "type", "name", "ids", "index",
    "budget",
    "rate", "timeout", "expiry", "ttl", "url", "prompt", "heads", "jar", "stdin", "bits",
}  # fmt: skip
#: A name that ends so holds the thing itself.
_CONTENT = {"value", "data", "string", "text", "pem", "hex", "b64", "base", "content"}
_SCHEME_WORDS = {"bearer", "basic", "digest", "negotiate", "token"}
_BARE_NAME = re.compile(r"[A-Za-z]+[_-][A-Za-z_-]+")
_NEGATED = {"no", "use", "with", "without", "skip", "require", "ask", "has", "is", "enable", "disable"}
_WORKING_DIRECTORY = {"PWD", "OLDPWD"}

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_OPTION = re.compile(r"(-{1,2}|\+{1,2}|/)?[A-Za-z_][\w.:\-\[\]/]*")
_LOOKS_LIKE_OPTION = re.compile(r"-[A-Za-z]|-[a-z-]+(=.*)?|--([a-z][a-z0-9_-]*(=.*)?)?", re.DOTALL)
_SWITCH = re.compile(r"(?i:true|false|yes|no|on|off|none|null)|(?=.{0,7}$)\d+(\.\d+)?")
#: Programs whose -p is a password, with it in one word.
_PASSWORD_PROGRAMS = re.compile(r"(?:.*/)?(?:sshpass|mysql\w*|mariadb[\w-]*)")
_USER_OPTION = re.compile(r"--?(?:u|U|(?:[a-z-]+-)?user)")
_USER_AND_PASSWORD = re.compile(r"(?P<user>(?!\d+:\d+(?:\s|$))[^\s:/'\"]*):[^\s'\"]+")
_USER_IN_TEXT = re.compile(
    r"(?<!\S)(?P<option>-[uU]\s{0,4}|--(?:[a-z-]{1,20}-)?user[= ]\s{0,4})(?P<quote>[\"']?)"
    + _USER_AND_PASSWORD.pattern
)
_URL_USER = re.compile(
    r"(?<![A-Za-z0-9+.\-])(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<user>[^\s/?#'\"<>]*|[^\s/?#'\"<>:@]+:(?!\d+/)[^\s'\"<>@]{0,200})@"
)
_USER_WITHOUT_SCHEME = re.compile(
    r"(?P<before>^|[\s='\"]|(?<!:)//)(?P<user>[A-Za-z_][\w.-]{0,80}):[^\s/@:'\"]{1,200}@(?!sha256:)(?=[\w.\[-])"
)
_SIGNED = re.compile(r"(?P<name>[?&](?:[\w-]{0,40}signature|sig|code))=[^&\s'\"#]+", re.I)
_PEM = re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)(?:(?!-----END).)*", re.DOTALL)
#: A word behind a scheme is a secret where it has a digit or a capital inside.
_SCHEMES = re.compile(
    r"\b(?P<scheme>(?i:bearer|basic|digest|negotiate|token))(?P<space>[ \t]+)"
    r"(?=[^\s'\",;]{6})(?=[^\s'\",;]{0,200}(?:\d|[a-z][A-Z]|[A-Z]{2}))[^\s'\",;]+"
)
_HEADER = re.compile(
    r"\b(?P<name>(?:proxy-)?authorization|(?:set-)?cookie)(?P<gap>[\"']?\s*[:=]\s*[\"']?)[^\n\"']+", re.I
)
_PAIR = re.compile(
    r"(?<![\w.\-])(?P<name>-{0,2}[A-Za-z_][\w.\-]*)(?P<gap>[\"'\\]{0,4}\]?\s{0,8}"
    r"(?::\s{0,4}[A-Za-z][\w.]{0,30}\s{0,4}=(?!=)|=>|:=|[:=])[\s(]{0,8})"
)
#: In a shell and in a call: ``setenv NAME value``, ``setdefault("NAME", "value")``.
_SETENV = re.compile(r"\b(?:setenv|set)\s{1,4}(?P<name>[A-Za-z_][\w.\-]*)(?P<gap>\s{1,8})")
_CALL = re.compile(
    r"\(\s{0,4}[\"'](?P<name>[A-Za-z_][\w.\-]*)(?P<gap>[\"']\s{0,4},\s{0,4})(?=[rbfuRBFU]{0,2}[\"'])"
)
_OPTION_IN_TEXT = re.compile(r"(?<![\w-])(?P<name>--?[A-Za-z][\w-]*)(?P<gap>\s{1,8})(?!-)")
_PIECE = (
    r"\"{3}(?:(?!\"{3}).){0,4096}\"{3}|'{3}(?:(?!'{3}).){0,4096}'{3}"
    r"|\"(?:\\.|[^\"\\]){0,4096}\"|'(?:\\.|[^'\\]){0,4096}'|[^\s,;&|'\"{}\[\]()\\]+|\\[^\"']"
)
#: Quoted texts and words that stand together are one value, as in a shell.
_VALUE = re.compile(
    r"(?P<quote>\\[\"'])(?:(?!(?P=quote)).){0,4096}(?P=quote)|\[[^\]]{0,4096}\]"
    rf"|(?:(?:{_PIECE}){{1,64}}(?:\s{{0,4}}\+?\s{{0,4}}(?=[\"'])(?:{_PIECE})){{0,16}})|[\"'].{{0,4096}}\Z",
    re.DOTALL,
)
#: Tokens that are known by their look, whatever stands before them.
_KNOWN = re.compile(
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}"
    r"|xox[abeprs]-[\w-]{10,}|xapp-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{30,}|do[opr]_v1_[a-f0-9]{40,}|nvapi-[\w-]{30,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|[rs]k_(?:live|test)_\w{16,}|r8_\w{30,}|dapi[a-f0-9]{30,}|gsk_\w{30,}|ya29\.[\w-]{20,}|hv[sb]\.[\w-]{20,}"
    r"|tgp_v1_[\w-]{20,}|dckr_pat_[\w-]{20,}|ATATT3x[\w=-]{20,}|lin_api_\w{20,}|AGE-SECRET-KEY-1[A-Z0-9]{30,}"
    r"|hooks\.slack\.com/services/[\w/]+|discord(?:app)?\.com/api/webhooks/[\w/-]+|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_LONGEST_TEXT = 1 << 16


def is_secret_name(name: str) -> bool:
    """Whether the value of an option, variable or key of this name is a secret."""
    if name in _WORKING_DIRECTORY:
        return False
    words = [word.lower() for word in _WORDS.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    if words and words[-1] in _CONTENT:
        words = words[:-1]
        if not words or (words[-1] in _LAST and not _KINDS.intersection(words)):
            return False
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "id" and "access" in words and "key" in words:
        return True
    if last in _ABOUT or last.endswith(("file", "path")) or before in _HARMLESS.get(last, ()):
        return False
    if last in ("keys", "tokens"):
        return before in _KINDS
    return last in _LAST or any(_ALWAYS.search(word) for word in words if word != "token" or word is last)


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with its secrets masked: ``--name=value``, ``--name value``, and within texts."""
    masked: list[str] = []
    announced = before = program = ""
    for argument in arguments:
        follows, announced = announced, ""
        option, before = before, argument
        program = argument if _PASSWORD_PROGRAMS.fullmatch(argument) else program
        name, equals, value = argument.partition("=")
        if follows and not _LOOKS_LIKE_OPTION.fullmatch(argument):
            masked.append(argument if _is_no_secret(follows, argument) else MASK)
            announced = argument if argument.lower() in _SCHEME_WORDS else ""
        elif _USER_OPTION.fullmatch(option) and (pair := _USER_AND_PASSWORD.fullmatch(argument)):
            masked.append(f"{pair['user']}:{MASK}")
        elif program and re.fullmatch(r"-p.+", argument, re.DOTALL):
            masked.append(f"-p{MASK}")
        elif equals and _OPTION.fullmatch(name) and is_secret_name(name):
            masked.append(argument if _is_no_secret(name, value) else f"{name}={MASK}")
        else:
            announced = argument if _announces(argument, program) else ""
            masked.append(_masked_document(argument))
    return masked


def _announces(argument: str, program: str) -> bool:
    """Whether the next argument is a secret: behind an option, or a name such as ``api_key``."""
    if argument.startswith("-"):
        words = _WORDS.findall(argument.lower())
        if argument == "-p":
            return program.endswith("sshpass")
        return "=" not in argument and not _NEGATED.intersection(words[:1]) and is_secret_name(argument)
    return argument.lower() == "bearer" or bool(_BARE_NAME.fullmatch(argument) and is_secret_name(argument))


def _is_no_secret(name: str, value: str) -> bool:
    """Whether a value behind a name that may be of a count or a switch is one."""
    words = [word.lower() for word in _WORDS.findall(name)] or [""]
    return bool((words[-1] in ("token", "key", "pass") or words[0] in _NEGATED) and _SWITCH.fullmatch(value))


def _masked_document(argument: str) -> str:
    """An argument, where it is JSON with a secret key the document without the values below it."""
    if argument[:1] in ("{", "[") and len(argument) <= _LONGEST_TEXT:
        try:
            given = json.loads(argument)
            masked = masked_entry("", given)
        except (ValueError, RecursionError):
            return masked_text(argument)
        return argument if masked == given else json.dumps(masked)
    return masked_text(argument)


def masked_text(text: str) -> str:
    """A text with secrets masked: users in URLs, headers, pairs of name and value, known kinds of tokens."""
    text = text[:_LONGEST_TEXT]
    text = _PEM.sub(rf"\1{MASK}", text)
    text = _SIGNED.sub(lambda match: f"{match['name']}={MASK}", text)
    text = _URL_USER.sub(_masked_user, text)
    text = _USER_WITHOUT_SCHEME.sub(lambda match: f"{match['before']}{match['user']}:{MASK}@", text)
    text = _USER_IN_TEXT.sub(lambda match: f"{match['option']}{match['quote']}{match['user']}:{MASK}", text)
    text = _HEADER.sub(lambda match: f"{match['name']}{match['gap']}{MASK}", text)
    text = _SCHEMES.sub(_masked_scheme, text)
    for pattern in (_PAIR, _OPTION_IN_TEXT, _SETENV, _CALL):
        text = _masked_values(text, pattern)
    return _KNOWN.sub(MASK, text)


def masked_entry(key: str, value: JsonValue) -> JsonValue:
    """A JSON value with all texts below a secret key masked, and secrets within other texts."""
    if isinstance(value, dict):
        # Environments of containers: {"name": "API_KEY", "value": "..."}.
        named = value.get("name", value.get("key"))
        if isinstance(named, str) and is_secret_name(named) and isinstance(value.get("value"), str):
            value = {**value, "value": MASK}
        return {
            name: masked_entry(name if is_secret_name(name) else key, item) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked_entry(key, item) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if is_secret_name(key) else masked_text(value)


def _masked_user(match: re.Match[str]) -> str:
    user, colon, password = match["user"].partition(":")
    if colon and password:
        return f"{match['scheme']}://{user}:{MASK}@"
    # Services take a token as the user; the user of ssh is a name.
    return f"{match['scheme']}://{MASK}@" if match["scheme"].startswith("http") and user else match[0]


def _masked_scheme(match: re.Match[str]) -> str:
    return f"{match['scheme']}{match['space']}{MASK}"


def _masked_values(text: str, names: re.Pattern[str]) -> str:
    """The text with the values behind secret names masked, in their quotes."""
    pieces: list[str] = []
    at = 0
    for match in names.finditer(text):
        if match.start() < at or not is_secret_name(match["name"]):
            continue
        value = _VALUE.match(text, match.end())
        # "missing key: layers.0" is a sentence.
        spoken = match["name"].lower() == "key" and match["gap"][:2] == ": "
        if value is None or spoken or _is_no_secret(match["name"], value[0].strip("\"'")):
            continue
        if MASK not in value[0]:
            quote = value["quote"] or (value[0][0] if value[0][0] in "\"'" else "")
            pieces += [text[at : match.end()], quote, MASK, quote]
            at = value.end()
    return "".join([*pieces, text[at:]])
