"""What axe-core says of reports, at both widths, in both schemes; and how soon a large one can be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from selenium import webdriver

from observatory.cli import main
from observatory.reports import write_report
from tests.analysis.compare.made import made_run
from tests.reports.browsing import show
from tests.reports.sample_power import a_power_run, a_sweep
from tests.reports.sample_runs import MODELS, write_grid
from tests.reports.test_clocks import saved

pytestmark = pytest.mark.slow

AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routing, power and clocks in one report."""
    folder = tmp_path_factory.mktemp("pages")
    runs = write_grid(
        folder / "runs",
        models={name: MODELS[name] for name in ("gqa-tiny", "mla-tiny")},
        conditions={"prose": (True, 1.0), "mock": (False, 0.4)},
        layers=3,
        experts=16,
        top_k=2,
    )
    sweep = saved(folder / "sweep.json", a_sweep("memory-bound", "knee"))
    return write_report([*runs, a_power_run(folder / "power")], folder / "page.html", clocks=[sweep])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs next to each other."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = [str(made_run(folder / name, seed=seed, skew=seed)) for seed, name in enumerate(("a", "b"))]
    out = folder / "page.html"
    assert main(["compare", *runs, "--fail-if", "decode.ms > +99 %", "--html", str(out)]) == 0
    return out


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light")])
@pytest.mark.parametrize(
    ("name", "figures"),
    [("page", ["key-figure", "power-timeline"]), ("comparison", ["differences-1", "layers-1-figure"])],
)
def test_axe_has_nothing_to_say(
    browser: webdriver.Chrome,
    request: pytest.FixtureRequest,
    name: str,
    figures: list[str],
    width: int,
    scheme: str,
) -> None:
    if not AXE.is_file():
        pytest.skip(f"axe-core is not installed: {AXE} is missing (make axe)")
    show(browser, request.getfixturevalue(name), width=width, scheme=scheme, figures=figures)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    # The page's own policy runs no other scripts, so it is put in by the debugger.
    source = AXE.read_text(encoding="utf-8")
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
    browser.set_script_timeout(120)
    violations = browser.execute_async_script(
        "const done = arguments[0];"
        "axe.run(document, { resultTypes: ['violations'] }).then(({ violations }) => done(violations.map("
        "({ id, nodes }) => [id, ...nodes.slice(0, 3).map(node => node.html.slice(0, 200))])))"
    )
    assert violations == []


def test_every_control_can_be_reached_and_shows_it_in_the_order_of_the_page(
    browser: webdriver.Chrome, page: Path
) -> None:
    show(browser, page, figures=["key-figure"])
    order = browser.execute_script(
        "const all = [...document.querySelectorAll('a[href], button, select, summary, [tabindex]')];"
        "return [all.filter(each => each.tabIndex > 0).length, all.filter(each => each.tabIndex < 0).length]"
    )
    assert order == [0, 0], "the order of the page is that of the keyboard"
    outlined = browser.execute_script(
        "const link = document.querySelector('nav a'); link.focus({ focusVisible: true });"
        "return getComputedStyle(link).outlineStyle"
    )
    assert outlined == "solid"


@pytest.mark.timing
def test_thirty_cells_can_be_used_within_one_and_a_half_seconds(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    large = write_report(write_grid(tmp_path / "runs"), tmp_path / "report.html")
    assert large.stat().st_size <= 8_000_000
    times_ms = []
    for _ in range(3):
        show(browser, large, figures=["key-figure"])
        times_ms.append(
            browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        )
    assert min(times_ms) < 1500
