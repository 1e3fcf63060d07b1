"""Opening a report in headless Chromium, and what holds for every one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException


def show(
    browser: webdriver.Chrome,
    page: Path,
    *,
    width: int = 1440,
    scheme: str = "light",
    figures: Sequence[str],
) -> None:
    """Open a page that holds ``figures``."""
    revive(browser)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    emulate(browser, scheme)
    browser.get(page.as_uri())
    for figure in figures:
        assert browser.execute_script("return document.getElementById(arguments[0]) !== null", figure)


def revive(browser: webdriver.Chrome) -> None:
    """Go on in a new tab where the last one crashed, which Chromium's tabs do now and then."""
    try:
        browser.execute_script("return document.title")
    except WebDriverException:
        browser.switch_to.window(browser.window_handles[0])
        browser.switch_to.new_window("tab")


def emulate(browser: webdriver.Chrome, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def wait(browser: webdriver.Chrome, script: str, *arguments: object, seconds: float = 10) -> None:
    """Until the script returns true, at most so long."""
    end = time.monotonic() + seconds
    while not browser.execute_script(script, *arguments):
        assert time.monotonic() < end, f"still not so after {seconds} s: {script} {arguments}"
        time.sleep(0.05)


def requests(browser: webdriver.Chrome) -> list[str]:
    """Addresses that the page asked for."""
    events: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
    ]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def check_drawn(browser: webdriver.Chrome, figures: Sequence[str]) -> None:
    """Every figure has marks, and the console is empty."""
    marks = browser.execute_script(
        "return arguments[0].map(id => [...document.querySelectorAll(`#${id} .plot svg path`)]"
        ".filter(path => path.getClientRects().length).length)",
        figures,
    )
    assert all(count > 3 for count in marks), dict(zip(figures, marks, strict=True))
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def check_first_screen(browser: webdriver.Chrome, page: Path) -> None:
    """A screen of 1440 by 900 pixels holds the verdict and one figure without scrolling."""
    show(browser, page, figures=["key-figure"])
    browser.execute_script("window.scrollTo({top: 0, behavior: 'instant'})")
    boxes = browser.execute_script(
        "return ['h1', '#verdict h2', '#verdict .answer', '#key-figure .wide svg'].map("
        "name => { const box = document.querySelector(name).getBoundingClientRect();"
        "return [name, box.top, box.bottom, box.left, box.right] })"
    )
    outside = [box for box in boxes if box[1] < 0 or box[2] > 900 or box[3] < 0 or box[4] > 1440]
    assert outside == []
    assert all(bottom > top for _, top, bottom, _, _ in boxes)


def check_no_table_is_cut_off(browser: webdriver.Chrome, page: Path, figures: Sequence[str]) -> None:
    """At 1440 pixels no table needs scrolling, nor do the numbers behind the figures."""
    show(browser, page, figures=figures)
    cut = browser.execute_script(
        "document.querySelectorAll('figure details').forEach(d => d.open = true);"
        "return [...document.querySelectorAll('main section > .scroll, main section > figure .scroll')]"
        ".filter(box => box.scrollWidth > box.clientWidth).map(box => box.getAttribute('aria-label'))"
    )
    assert cut == []


def check_harmless(browser: webdriver.Chrome) -> None:
    """Text from outside has run nothing and made no elements."""
    assert browser.execute_script("return window.hit === undefined")
    assert browser.execute_script("return document.querySelectorAll('img, iframe, .plot a').length") == 0


def check_fits_phone(browser: webdriver.Chrome) -> None:
    """A page that is shown 390 pixels wide needs no sideways scrolling, with everything unfolded."""
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.plot div > svg')]"
        ".filter(s => s.getBoundingClientRect().right > 391).length"
    )
    assert wide == 0
