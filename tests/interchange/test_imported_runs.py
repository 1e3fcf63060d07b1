"""An imported run works in commands that its table allows; every other one names the table that it lacks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import observatory
from observatory.cli import main
from observatory.interchange.importers.formats import FORMATS
from tests.interchange.test_kineto import event, stated, trace

#: Of a model with as many layers and experts as the imported loads.
CONFIG = Path(observatory.__file__).parent / "zoo/checkpoints/tiny-gqa/config.json"
LOADS, EXCHANGES, POWER = "loads", "exchanges", "power"
_RULES = '[[rule]]\nmetric = "gini"\nabove = 0.9\n'
_TARGETS = "--target-tokens-per-s 20000 --context 4096 --output 512 --hardware h200-sxm --model config.json"
#: Each command with the runs that it works on, and the table that it names on others.
COMMANDS: tuple[tuple[str, set[str], str], ...] = (
    ("routing RUN", {LOADS}, "routing"),
    ("scan RUN --ep 2,4", {LOADS}, "routing"),
    ("place RUN --ranks 2", {LOADS}, "routing"),
    ("advise RUN --ranks 2 --gpus-per-node 2 --experts experts.json", {LOADS}, "routing"),
    (f"plan RUN {_TARGETS}", {LOADS}, "routing"),
    ("route-fetch RUN --constants published:h100-ndr200 --ranks 2", set(), "routing"),
    ("replay RUN --ep 2 --row-bytes 64 --steps 2 --repeats 1 --warmup 0 --out out.json", {LOADS}, "routing"),
    ("export RUN nccl-tests --ep 2 --row-bytes 64 --out out", {LOADS}, "routing"),
    ("export RUN ucc --ep 2 --row-bytes 64 --out out", {LOADS}, "routing"),
    ("export RUN sglang --ep 2 --out out.json", {LOADS}, "routing"),
    ("export RUN tensorrt-llm --ep 2 --out out.yaml", {LOADS}, "routing"),
    ("export RUN vllm-ascend --ep 2 --out out.json", {LOADS}, "routing"),
    ("export RUN aiconfigurator --out out.json", {LOADS}, "routing"),
    ("exchanges RUN", {EXCHANGES}, "exchange"),
    ("export RUN chrome-trace --out out.json", {EXCHANGES, POWER}, "spans, exchange or power"),
    ("export RUN tensorboard --out logs", {LOADS, EXCHANGES}, ""),
    ("export RUN csv --out tables", {LOADS, EXCHANGES, POWER}, ""),
    ("energy RUN", {POWER}, "power"),
    ("clocks recommend RUN", {POWER}, "power"),
    ("compare RUN RUN", {LOADS, EXCHANGES}, "routing, exchange or spans"),
    ("history RUN", {LOADS, EXCHANGES}, "routing, exchange or spans"),
    ("fit RUN --out out.json", set(), "results"),
    ("report RUN --out out.html", {LOADS, EXCHANGES, POWER}, ""),
    ("check RUN --rules rules.toml", {LOADS}, ""),
    ("reduce RUN", {LOADS, EXCHANGES, POWER}, ""),
    ("top RUN --once", {LOADS, EXCHANGES, POWER}, ""),
    ("metrics RUN --textfile out.prom", {LOADS, EXCHANGES, POWER}, ""),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each table, imported."""
    folder = tmp_path_factory.mktemp("runs")
    load_SLE = np.random.default_rng(3).integers(1, 40, (24, 4, 32))
    np.save(folder / "c.npy", load_SLE)
    moments = [f"{1714557600000 + 1000 * number}" for number in range(12)]
    device = '{gpu="0",UUID="GPU-1"}'
    scraped = "".join(
        f"DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{device} {1000000 + 90000 * number} {moment}\n"
        f"DCGM_FI_DEV_SM_CLOCK{device} 1410 {moment}\n"
        for number, moment in enumerate(moments)
    )
    (folder / "d.prom").write_text(scraped)
    trace(folder, *(event("kernel", "k", 10 + 50 * number, 20, **stated()) for number in range(4)))
    for name, file in ((LOADS, "c.npy"), (EXCHANGES, "0.json"), (POWER, "d.prom")):
        arguments = ["--top-k", "4", "--phase", "decode"] if name == LOADS else []
        assert main(["import", "auto", str(folder / file), *arguments, "--out", str(folder / name)]) == 0
    timed = (
        "bench experts tiny-gqa --ep 2 --assignments 16,32,64,128 --activated 1,2,4 --repeats 2 --warmup 0"
    )
    assert main([*timed.split(), "--out", str(folder / "experts.json")]) in (0, 3)
    return folder


@pytest.mark.parametrize("name", [LOADS, EXCHANGES, POWER])
@pytest.mark.parametrize(
    ("command", "works", "table"), COMMANDS, ids=[row[0].split(" --")[0] for row in COMMANDS]
)
def test_a_command_works_or_names_the_table_that_is_missing(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    works: set[str],
    table: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.toml").write_text(_RULES)
    shutil.copy(CONFIG, tmp_path / "config.json")
    shutil.copy(runs / "experts.json", tmp_path)
    words = [str(runs / name) if word == "RUN" else word for word in command.split()]
    code = main(words)
    shown, error = capfd.readouterr()
    if name in works:
        assert code == 0, error
        return
    assert code
    assert "profile" not in shown + error
    assert "observatory.watch" not in shown + error
    assert (shown + error).count("\n") == 1 or not table
    if not table or (words[0] == "route-fetch" and name == LOADS):  # lacks sizes of its model, not a table
        return
    assert f"has no table {table}, which `observatory {words[0]}" in error
    assert shown == ""
    for form, known in FORMATS.items():
        assert (known.brings in table) == (form in error.partition("import ")[2])
