"""Hostile campaign and site files: refused in one sentence, or plain text to every shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from observatory.campaign.batch.campaign_file import campaign_points, load_campaign
from observatory.errors import BatchError
from observatory.hpc.scripts import JobScript, command_script, job_script
from observatory.hpc.site import Site, load_site
from tests.campaign.batch.conftest import Login

#: Each makes a file of the name ``MARK`` if any shell reads it.
_PAYLOADS = (
    "$(touch MARK)",
    "`touch MARK`",
    "'; touch MARK; '",
    '"; touch MARK; "',
    "x; touch MARK #",
    "x && touch MARK",
    "x | touch MARK",
    "x\ntouch MARK",
    "x\rtouch MARK",
    "${x:-$(touch MARK)}",
    "${x",
    "$((`touch MARK`))",
    "<(touch MARK)",
    "\\",
    "{out}'$(touch MARK)",
    "x\u2028touch MARK",
    "--wrap=touch MARK",
    "--comment=touch MARK",
)
#: Strings of a site that reach a script, but for ``environment.setup``, which is shell.
_SITE_KEYS: dict[str, Callable[[str], dict[str, Any]]] = {
    **{
        f"batch.{key}": lambda text, key=key: {"batch": {key: text}}  # type: ignore[misc]
        for key in ("partition", "account", "qos", "reservation", "constraint", "time")
    },
    "batch.extra": lambda text: {"batch": {"extra": [text]}},
    "node.gres": lambda text: {"node": {"gres": text}},
    "node.memory": lambda text: {"node": {"memory": text}},
    "environment.modules": lambda text: {"environment": {"modules": [text]}},
    "environment.variables": lambda text: {"environment": {"variables": {"HOSTILE": text}}},
    "name of a variable": lambda text: {"environment": {"variables": {text: "1"}}},
    "environment.observatory": lambda text: {"environment": {"observatory": ["echo", text]}},
    "environment.scratch": lambda text: {"environment": {"scratch": text}},
    "container.image": lambda text: {"container": {"image": text}},
    "container.binds": lambda text: {"container": {"image": "/x.sif", "binds": [text]}},
    "name": lambda text: {"name": text},
}


def toml(value: Any) -> str:
    """A value in TOML; its strings are those of JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("".join(f"{toml(key)} = {toml(value)}\n" for key, value in values.items()))
    return path


@pytest.mark.parametrize("key", _SITE_KEYS)
def test_no_string_of_a_site_is_run(key: str, login: Login) -> None:
    mark = login.folder / "MARK"
    for program in ("apptainer", "module", "observatory"):
        login.slurm.program(program, "#!/bin/bash\nexit 0\n")
    accepted = []
    for payload in (text.replace("MARK", str(mark)) for text in _PAYLOADS):
        try:
            site = load_site(written(login.folder / "site.toml", _SITE_KEYS[key](payload)))
        except BatchError as error:
            assert str(error).isprintable()  # noqa: PT017 - which of the payloads are refused differs
            assert len(str(error)) < 500  # noqa: PT017
            continue
        accepted.append(payload)
        run_scripts(site, ("observatory", "doctor"), login)
        assert not mark.exists(), payload
    assert bool(accepted) == (
        key in ("environment.variables", "environment.observatory", "name", "batch.extra")
    )


def run_scripts(site: Site, argv: tuple[str, ...], login: Login) -> subprocess.CompletedProcess[str]:
    """Run the job of one point and of one command, as Slurm would; what they wrote."""
    folder = login.folder / "made"
    point = folder / "points" / "p"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    point.mkdir(parents=True)
    (point / "command").write_text(command_script(site, argv, folder, about=" ".join(argv)))
    environment = {
        "PATH": f"{login.slurm.programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "TMPDIR": str(login.folder),
    }
    for work in ({"points": ("p",)}, {"command": argv}):
        script = folder / "script.sh"
        script.write_text(job_script(site, JobScript(name="x", folder=folder, time="01:00:00", **work)))
        subprocess.run(["bash", "-n", str(script)], check=True)
        done = subprocess.run(
            ["bash", str(script)],
            cwd=folder,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=400,
        )
    return done


def test_variables_of_a_site_reach_commands_as_they_are(login: Login) -> None:
    values = {
        f"V{number}": text for number, text in enumerate(_PAYLOADS) if "\n" not in text and "\r" not in text
    }
    site = load_site(written(login.folder / "site.toml", {"environment": {"variables": values}}))
    done = run_scripts(site, ("env", "-0"), login)
    found = dict(entry.partition("=")[::2] for entry in done.stdout.split("\0"))
    assert {name: found[name] for name in values} == values


_WORDS = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
    | st.sampled_from([text for text in _PAYLOADS if text.isprintable()]),
    min_size=1,
    max_size=20,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=_WORDS)
def test_words_of_a_command_reach_it_as_they_are(words: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "c.toml", {"command": [{"name": "x", "command": ["printf", "%s\\0", *words]}]})
    (point,) = campaign_points(load_campaign(path))
    script = tmp_path / "command"
    script.write_text(command_script(Site(), point.argv, tmp_path, about=point.about))
    done = subprocess.run(["bash", str(script), "/o u"], check=True, capture_output=True)
    assert done.stdout.decode().split("\0")[:-1] == [word.replace("{out}", "/o u") for word in words]


@pytest.mark.parametrize("payload", _PAYLOADS)
def test_models_and_data_of_any_name_are_words_of_a_command(payload: str, login: Login) -> None:
    mark = login.folder / "MARK"
    text = payload.replace("MARK", str(mark))
    path = written(login.folder / "c.toml", {"models": [text], "data": [text]})
    if set(text) & set("\r\n"):
        with pytest.raises(BatchError, match=r"models\.0"):
            load_campaign(path)
        return
    (point,) = campaign_points(load_campaign(path))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", point.name)
    site = Site.model_validate({"environment": {"observatory": ["printf", "%s\\n"]}})
    done = run_scripts(site, point.argv, login)
    assert not mark.exists()
    assert text.replace("{out}", "") in done.stdout, done.stderr


_VALID = {
    "campaign": 'models = ["tiny-gqa"]\n',
    "site": 'name = "x"\n',
}
_HOSTILE = {
    "no TOML": "models = [",
    "no UTF-8": b"\xff\xfe",
    "NUL": "\x00",
    "NUL in a string": 'name = "a\\u0000b"',
    "nested deeply": f"x = {'[' * 5000}{']' * 5000}",
    "tables nested deeply": f"[{'.'.join('a' * 3000)}]\n",
    "a number of many digits": f"repeats = {'9' * 5000}\n[batch]\nmax_array = {'9' * 5000}",
    "a number that is too large": "repeats = 99999999999999999999\nbatch.max_array = 99999999999999999999",
    "no number": "ep = [nan]\nbatch.signal_s = nan",
    "infinity": "repeats = inf\nnode.tasks = inf",
    "a date": "repeats = 1979-05-27\nnode.tasks = 1979-05-27",
    "a wrong type": "models = 3\nname = 3",
    "a table for a list": "[models]\na = 1\n[batch.extra]\na = 1",
    "a key twice": "name = 'a'\nname = 'b'",
    "an unknown key": "colour = 'red'",
    "an unknown key of two lines": '"a\\nb" = 1',
    "too large": "# " + "x" * (2 << 20),
    "too many": "models = [MANY]\n[environment]\nmodules = [MANY]".replace("MANY", "'a'," * 2000),
}


@pytest.mark.parametrize("what", _HOSTILE)
@pytest.mark.parametrize("kind", ["campaign", "site"])
def test_a_hostile_file_is_refused_in_one_sentence(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    content = _HOSTILE[what]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BatchError) as caught:
        (load_campaign if kind == "campaign" else load_site)(path)
    said = str(caught.value)
    assert said.startswith(f"{kind} file {path} is not valid")
    assert said.isprintable()
    assert len(said) < 700 + len(str(path))


@pytest.mark.parametrize("kind", ["campaign", "site"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(BatchError, match="cannot be read"):
            (load_campaign if kind == "campaign" else load_site)(path)


_KEYS = [
    "models",
    "data",
    "ep",
    "phases",
    "clocks_mhz",
    "repeats",
    "time",
    "profile",
    "fabric",
    "command",
    "name",
]
_KEYS += [
    "batch",
    "node",
    "environment",
    "container",
    "scheduler",
    "job_monitor",
    "hardware",
    "partition",
    "tasks",
]
_VALUES = st.recursive(
    st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4))
def test_any_values_are_understood_or_refused(values: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "file.toml", values)
    for load in (lambda: campaign_points(load_campaign(path)), lambda: load_site(path)):
        try:
            load()
        except BatchError as error:
            assert str(error).isprintable()  # noqa: PT017 - most are refused, some are not
