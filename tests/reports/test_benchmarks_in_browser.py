"""The figures about benchmark files in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium import webdriver

from observatory.reports import write_report
from tests.reports.browsing import (
    check_drawn,
    check_first_screen,
    check_fits_phone,
    check_harmless,
    check_no_table_is_cut_off,
    show,
)
from tests.reports.sample_benchmarks import a_bench, a_model, a_replay, a_run, hostile_files, saved

pytestmark = pytest.mark.slow

FIGURES = [
    "traffic-map",
    "rank-waiting",
    "layer-waiting",
    "realism-layers",
    "prediction-scatter",
    "bandwidth-curves",
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain report and one whose every text is hostile."""
    folder = tmp_path_factory.mktemp("pages")
    plain = write_report(
        [a_run(folder / "plain")],
        folder / "plain.html",
        ep_degrees=(2,),
        bench=[saved(folder / "bench.json", a_bench())],
        replays=[saved(folder / "replay.json", a_replay(phases=("prefill", "decode")))],
        networks=[saved(folder / "fit.json", a_model())],
    )
    (folder / "nasty").mkdir()
    run, files = hostile_files(folder / "nasty")
    hostile = write_report([run], folder / "hostile.html", ep_degrees=(2,), **files)
    return {"plain": plain, "hostile": hostile}


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_every_figure_is_drawn_and_hostile_text_runs_nothing(
    browser: webdriver.Chrome, pages: dict[str, Path], which: str
) -> None:
    show(browser, pages[which], figures=FIGURES)
    check_drawn(browser, FIGURES)
    check_harmless(browser)


def test_the_first_screen_holds_the_verdict_and_a_figure(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    check_first_screen(browser, pages["plain"])


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_a_phone_needs_no_sideways_scrolling(
    browser: webdriver.Chrome, pages: dict[str, Path], which: str
) -> None:
    show(browser, pages[which], width=390, scheme="dark", figures=FIGURES)
    check_fits_phone(browser)


def test_no_table_is_cut_off_at_desktop_width(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    check_no_table_is_cut_off(browser, pages["plain"], FIGURES)


def test_every_choice_can_be_drawn(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    drawn = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        (async () => {
          const empty = [];
          for (const select of document.querySelectorAll("figure select")) {
            const figure = select.closest("figure");
            for (let index = 0; index < select.options.length; index++) {
              select.selectedIndex = index;
              select.dispatchEvent(new Event("change"));
              await new Promise((resume) => setTimeout(resume, 100));
              if (figure.querySelectorAll(".wide path").length < 4) empty.push(select.options[index].text);
            }
          }
          done(empty);
        })();
        """
    )
    assert drawn == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
