"""docs/supported-models.md says what the code does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from tests.paths import ROOT
from tests.probes.routing.counting import read_loads
from tests.probes.routing.families import one_thread
from tests.probes.routing.supported import framework_table, table

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "supported-models.md"


def test_the_table_is_that_of_a_run_with_the_version_it_names() -> None:
    text = PAGE.read_text("utf-8")
    stated = re.search(r"transformers (\d+\.\d+\.\d+)", text)
    assert stated is not None
    if stated[1] != transformers.__version__:
        pytest.skip(f"the page is about transformers {stated[1]}, installed is {transformers.__version__}")
    page_rows = [line for line in text.splitlines() if line.startswith("|")]
    with one_thread():
        lines = table()
    assert page_rows[-len(lines) :] == lines


def test_the_rows_of_frameworks_are_those_of_a_run_with_the_versions_they_name(
    frameworks: dict[str, dict[str, Any]],
) -> None:
    page_rows = PAGE.read_text("utf-8").splitlines()
    for line in framework_table(frameworks):
        release = line.removeprefix("| ").partition(":")[0]
        if any(row.startswith(f"| {release}:") for row in page_rows):
            assert line in page_rows


def test_the_adapter_of_the_page_works() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, str(PAGE), "exec"), names)
    hidden = torch.randn(11, 16)
    with read_loads(names["sites"]) as read:
        chosen = names["model"][0](hidden)[1]
    assert [site.spec.experts for site in names["sites"]] == [32, 32]
    assert read[0] == (torch.bincount(chosen, minlength=32).tolist(), 11)
