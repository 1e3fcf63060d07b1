"""Secrets of command lines are not kept, and options that only sound like secrets are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.host.provenance import new_manifest
from observatory.run import RunWriter
from observatory.run.manifest import ModelSpec
from observatory.run.masking import masked_arguments, masked_entry, masked_text

SECRET = "s3cr3t-VALUE-99"


@pytest.mark.parametrize(
    "arguments",
    [
        ["prog", f"--api-key={SECRET}"], ["prog", "--api-key", SECRET], ["prog", "--api_key", SECRET],
        ["prog", f"--apikey={SECRET}"], ["prog", "--token", SECRET], ["prog", f"--hf-token={SECRET}"],
        ["prog", "--auth-token", SECRET], ["prog", "--password", SECRET], ["prog", f"-password={SECRET}"],
        ["prog", "--db-passwd", SECRET], ["prog", "--pwd", SECRET], ["prog", f"--client-secret={SECRET}"],
        ["prog", "--credentials", SECRET], ["prog", "--credential", SECRET], ["prog", "--bearer", SECRET],
        ["prog", "--auth", f"user:{SECRET}"], ["prog", "--key", SECRET], ["prog", "--private-key", SECRET],
        ["env", f"HF_TOKEN={SECRET}", "prog"], [f"AWS_SECRET_ACCESS_KEY={SECRET}", "prog"],
        ["env", f"AWS_ACCESS_KEY_ID={SECRET}"], ["prog", f"model.apiKey={SECRET}"],
        ["prog", f"+a.token={SECRET}"],
        ["prog", f"https://user:{SECRET}@host/x"], ["git", "clone", f"https://{SECRET}@host/x.git"],
        ["prog", f"postgresql://me:{SECRET}@db:5432/x"], ["prog", f"--url=redis://:{SECRET}@h"],
        ["curl", "-H", f"Authorization: Bearer {SECRET}"], ["curl", "-H", f"authorization: token {SECRET}"],
        ["curl", "-H", f"X-Api-Key: {SECRET}"], ["curl", "-H", f"Cookie: a={SECRET}; b={SECRET}"],
        ["curl", f"https://host/x?token={SECRET}&y=1"], ["curl", f"https://h/x?a=1&access_token={SECRET}"],
        ["prog", f'{{"api_key": "{SECRET}"}}'], ["prog", f"{{'password': '{SECRET}', 'n': 1}}"],
        ["prog", f'{{"auth": {{"password": "{SECRET}"}}}}'],
        ["prog", f'{{"api_keys": ["{SECRET}", "{SECRET}"]}}'],
        ["prog", f'{{\\"api_key\\": \\"{SECRET}\\"}}'], ["prog", f"{{api_key: {SECRET}}}"],
        ["bash", "-c", f"export API_KEY={SECRET}; prog"], ["bash", "-c", f"prog --password {SECRET} --n 3"],
        ["bash", "-c", f"prog --api-key='{SECRET}' x"], ["bash", "-c", f'TOKEN="{SECRET} {SECRET}" prog'],
        ["prog", f"--env=API_KEY={SECRET}"], ["prog", "-e", f"WANDB_API_KEY={SECRET}"],
        ["prog", "--api-keys", SECRET],
        ["prog", "ghp_0123456789abcdefghijABCDEFGHIJ" + SECRET], ["prog", "--accessToken", SECRET],
        ["prog", f"--DB_PASSWORD={SECRET}"], ["prog", f"--passphrase={SECRET}"],
        ["prog", f"--mytoken={SECRET}"],
        ["curl", "-u", f"me:{SECRET}"], ["curl", f"-ume:{SECRET}"], ["curl", f"--proxy-user=me:{SECRET}"],
        ["bash", "-c", f"curl -u me:{SECRET} http://h"], ["mysql", f"-p{SECRET}"],
        ["sshpass", "-p", SECRET, "ssh"], ["prog", "--token", f"-{SECRET}"],
        ["prog", f"--use-token={SECRET}"],
        ["prog", "config", "set", "api_key", SECRET], ["prog", "--authorization", "Bearer", SECRET],
        ["prog", f"https://h/?sig={SECRET}"], ["prog", f"https://h/?X-Amz-Signature={SECRET}&y=1"],
        ["prog", f"https://user:pa/{SECRET}@h/"], ["prog", f"user:{SECRET}@h/x"], ["prog", f"//u:{SECRET}@h"],
        ["env", f"OPENAI_API_KEY2={SECRET}"], ["prog", f"--token2={SECRET}"], ["env", f"API_KEY_1={SECRET}"],
        ["prog", "--private-key-pem", SECRET], ["prog", "--token-value", SECRET],
        ["prog", f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----"],
        ["bash", "-c", f"setenv API_KEY {SECRET}"], ["bash", "-c", f"x; TOKEN='a'{SECRET} prog"],
        ["python", "-c", f"os.environ['HF_TOKEN'] = '{SECRET}'"],
        ["python", "-c", f"os.environ.setdefault('HF_TOKEN', '{SECRET}')"],
        ["python", "-c", f"login(token=r'{SECRET}')"], ["python", "-c", f"token: str = '{SECRET}'"],
        ["python", "-c", f'login(token=("a" "{SECRET}"))'], ["python", "-c", f"token = 'a' + '{SECRET}'"],
        ["python", "-c", f'login(token="""{SECRET}""")'],
        ["prog", f'{{"password": "a\\"b{SECRET}"}}'], ["prog", f'{{"api_key": {{"value": "{SECRET}"}}}}'],
        ["prog", f'{{"name": "HF_TOKEN", "value": "{SECRET}"}}'],
        ["prog", "npm_" + "a1" * 18 + SECRET], ["prog", "https://hooks.slack.com/services/T0/B0/" + "x" * 9],
    ],
)  # fmt: skip
def test_a_secret_is_masked(arguments: list[str]) -> None:
    masked = masked_arguments(arguments)
    assert SECRET not in " ".join(masked)
    assert "***" in " ".join(masked)
    assert len(masked) == len(arguments)
    assert masked[0].partition("=")[0] == arguments[0].partition("=")[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens", "4096"], ["--max-tokens", "128"], ["--max-tokens=128"], ["--tokenizer", "/m/tok"],
        ["--target-tokens-per-s", "30"], ["--key-value-heads", "8"], ["--num-key-value-heads=8"],
        ["--monkey", "x"], ["--keyboard", "us"], ["--sample-tokens", "64"], ["--eos-token", "</s>"],
        ["--pad-token-id", "0"], ["--us-per-token", "3.5"], ["--bytes-per-token=4"], ["--author", "me"],
        ["--sort-key", "time"], ["--public-key", "k.pub"], ["--compass", "n"], ["--bypass", "cache"],
        ["--passes", "3"], ["--forward-pass", "x"], ["--no-auth", "prog.py"], ["--use-auth-token", "prog.py"],
        ["PWD=/home/me"], ["--token-file", "/run/t"], ["--tokens-per-expert", "4"],
        ["https://host/a/b?x=1"], ["ssh://git@host/x"], ["git@host:a/b.git"], ["--placement", "linear"],
        ["--data", "datasets:wikitext:test"], ["a:b=c"], ["--authors=me"], ["--keys", "a,b"], ["--top-k=8"],
        ["--key-dim=64"], ["--device", "rapl:package-0"], ['{"max_tokens": 12, "top_k": 2}'],
        ["--token-budget", "9"], ["--token", "4096"], ["--num-token=3"], ["--pass", "2"], ["--attn-key", "x"],
        ["--pat-h", "x"], ["--cookie-jar", "f"], ["--secretfile", "f"], ["--use-auth-token=true"],
        ["the token sequence is long"], ["Basic training started"], ["a digest mismatches"],
        ["missing key: layers.0.mlp"], ["token: 5 at layer 3"], ["docker", "-u", "1000:1000"],
        ["image:tag@sha256:0a"], ["http://host:80/a@b"], ["--password-stdin"], ["train_key.py", "x"],
    ],
)  # fmt: skip
def test_what_only_sounds_like_a_secret_stays(arguments: list[str]) -> None:
    assert masked_arguments(["prog", *arguments]) == ["prog", *arguments]


def test_an_option_after_a_secret_flag_stays() -> None:
    assert masked_arguments(["prog", "--password", "--steps", "3"]) == ["prog", "--password", "--steps", "3"]


def test_json_values_and_messages_are_masked() -> None:
    found = masked_entry(
        "config",
        {
            "api_key": SECRET,
            "n": 3,
            "auth": {"user": SECRET},
            "deep": [{"token": SECRET}],
            "tokens": 5,
            "url": f"x://u:{SECRET}@h",
        },
    )
    assert found == {
        "api_key": "***",
        "n": 3,
        "auth": {"user": "***"},
        "deep": [{"token": "***"}],
        "tokens": 5,
        "url": "x://u:***@h",
    }
    assert masked_text(f"RuntimeError: GET https://h/?key={SECRET} failed") == (
        "RuntimeError: GET https://h/?key=*** failed"
    )


def test_masking_takes_linear_time_in_hostile_texts() -> None:
    for text in (
        "a" * 60_000,
        "--a " * 15_000,
        "key=" * 15_000,
        '"' * 60_000,
        "http://" * 8000,
        "a:" * 30_000,
        "http://a:" * 7000,
        "-----BEGIN PRIVATE KEY-----" * 2000,
        "key='" * 12_000,
        "-u a:" * 10_000,
        "token=a''" * 7000,
        "set a " * 10_000,
    ):
        assert len(masked_text(text)) <= 4 * len(text)


def test_no_secret_of_a_watched_program_is_in_its_run(tmp_path: Path) -> None:
    samples = pa.table({"time_ns": [0, 10**9], "device_uuid": ["GPU-1"] * 2, "power_mw": [1000, 1000]})
    pq.write_table(samples, tmp_path / "samples.parquet")
    done = subprocess.run(
        [
            sys.executable, "-c", "from observatory.cli import run; run()", "power", "--out",
            str(tmp_path / "run"),
            "--device", f"replay:{tmp_path / 'samples.parquet'}", "--calibrate-s", "0", "--",
            sys.executable, "-c", "pass", f"--api-key={SECRET}", "--token", SECRET, "--max-tokens", "128",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0
    kept = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))
    assert SECRET not in kept
    assert "--api-key=***" in kept
    assert '"--max-tokens",\n  "128"' in kept


def test_no_secret_of_a_message_is_in_the_status_of_a_rank(tmp_path: Path) -> None:
    manifest = new_manifest(model=ModelSpec(name="m"), config={"hub": {"token": SECRET}, "steps": 3})
    with pytest.raises(ValueError, match="cannot"), RunWriter.create(tmp_path / "run", manifest):
        raise ValueError(f"cannot start prog --password {SECRET}")
    kept = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))
    assert SECRET not in kept
    assert "cannot start prog --password ***" in kept
