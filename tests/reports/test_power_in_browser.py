"""The figures about power, energy and clocks in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium import webdriver

from observatory.reports import write_report
from observatory.run.manifest import DataSpec, DeviceSpec
from tests.reports.browsing import (
    check_drawn,
    check_first_screen,
    check_fits_phone,
    check_harmless,
    check_no_table_is_cut_off,
    show,
)
from tests.reports.sample_power import a_load, a_power_run, a_sweep, samples_of
from tests.reports.test_clocks import saved
from tests.reports.test_report import HOSTILE

pytestmark = pytest.mark.slow

FIGURES = ["power-timeline", "energy-tokens", "energy-devices", "clock-plane", "clock-curves"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain report and one whose every name of a device or series is hostile."""
    folder = tmp_path_factory.mktemp("pages")
    sweep = saved(folder / "sweep.json", a_sweep("memory-bound", "knee"))
    plain = write_report([a_power_run(folder / "plain")], folder / "plain.html", clocks=[sweep])
    uuid = HOSTILE[:100]
    nasty = a_sweep()
    series = tuple(item.model_copy(update={"name": HOSTILE}) for item in nasty.series)
    device = nasty.device.model_copy(update={"name": HOSTILE, "uuid": uuid})
    nasty = nasty.model_copy(update={"series": series, "device": device})
    run = a_power_run(
        folder / "nasty",
        power=samples_of(a_load(), counter_gain=1.3).assign(device_uuid=uuid),
        devices=(DeviceSpec(kind=HOSTILE, name=HOSTILE, uuid=uuid),),
        data=DataSpec(condition=HOSTILE),
    )
    hostile = write_report([run], folder / "hostile.html", clocks=[saved(folder / "nasty-sweep.json", nasty)])
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


def test_lanes_and_shading_take_dark_colours(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["plain"], scheme="dark", figures=FIGURES)
    fills = browser.execute_script(
        "return [...document.querySelectorAll('#power-timeline .wide rect[opacity]')]"
        ".map(band => getComputedStyle(band).fill)"
    )
    assert "rgb(108, 178, 240)" in fills
    assert "rgb(11, 98, 165)" not in fills
