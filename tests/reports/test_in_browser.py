"""The page in headless Chromium."""

from __future__ import annotations

import base64
import csv
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from observatory.reports import write_report
from observatory.run.manifest import Manifest
from tests.reports.browsing import (
    check_drawn,
    check_first_screen,
    check_fits_phone,
    check_harmless,
    check_no_table_is_cut_off,
    emulate,
    requests,
    show,
    wait,
)
from tests.reports.conftest import CHROMIUM
from tests.reports.sample_runs import MODELS, manifest, write_grid, write_run
from tests.reports.test_report import HOSTILE, hostile

pytestmark = pytest.mark.slow

FIGURES = ["mock-dots", "expert-map", "lorenz-curves", "ep-models", "ep-run", "ep-crossing", "step-gini"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A plain report and one whose every text is hostile."""
    folder = tmp_path_factory.mktemp("pages")
    shape = {"layers": 3, "experts": 16, "top_k": 2}
    runs = write_grid(
        folder / "runs",
        models={name: MODELS[name] for name in ("gqa-tiny", "mla-tiny")},
        conditions={"prose": (True, 1.0), "mock": (False, 0.4)},
        **shape,
    )
    nasty = Manifest.model_validate(hostile(manifest(**shape).model_dump(mode="json")))
    other = Manifest.model_validate(
        nasty.model_dump() | {"model": nasty.model.model_dump() | {"name": "W" * 4000}}
    )
    assert nasty.data is not None
    mock = nasty.model_copy(update={"data": nasty.data.model_copy(update={"condition": "mock"})})
    described = {"nasty": nasty, "long": other, "mock": mock}
    nasty_runs = [write_run(folder / name, each, steps=6) for name, each in described.items()]
    return {
        "plain": write_report(runs, folder / "plain.html"),
        "hostile": write_report(nasty_runs, folder / "hostile.html", title=HOSTILE),
    }


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_every_figure_is_drawn_without_error_or_request(
    browser: webdriver.Chrome, pages: dict[str, Path], which: str
) -> None:
    show(browser, pages[which], figures=FIGURES)
    check_drawn(browser, FIGURES)
    asked = requests(browser)
    assert pages[which].as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_first_screen_holds_the_verdict_and_a_figure(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    check_first_screen(browser, pages["plain"])
    assert len(browser.find_elements("css selector", "#verdict .three dd")) == 3


def test_hostile_text_runs_nothing_and_makes_no_links(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["hostile"], figures=FIGURES)
    check_harmless(browser)
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    labels = browser.execute_script(
        "return [...document.querySelectorAll('#mock-dots .wide text')].map(t => t.textContent).join('')"
    )
    assert "</script>" in labels


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_a_phone_needs_no_sideways_scrolling(
    browser: webdriver.Chrome, pages: dict[str, Path], which: str
) -> None:
    show(browser, pages[which], width=390, figures=FIGURES)
    check_fits_phone(browser)


def test_figures_follow_the_colour_scheme_while_the_page_is_open(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    ink = "return getComputedStyle(document.querySelector('#ep-run .plot text:not([fill])')).fill"
    show(browser, pages["plain"], scheme="light", figures=FIGURES)
    assert browser.execute_script(ink) == "rgb(26, 30, 35)"
    emulate(browser, "dark")
    wait(browser, f"{ink} === 'rgb(231, 233, 236)'")
    assert browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor") == (
        "rgb(20, 23, 27)"
    )


def choose(browser: webdriver.Chrome, key: str, value: str) -> None:
    """Choose in the filter of the page, by keyboard."""
    browser.find_element("css selector", f".filter select[name={key}]").send_keys(value)


def test_one_filter_changes_every_figure_and_hides_rows(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    for key, value in (("model", "mla-tiny"), ("condition", "mock"), ("phase", "decode")):
        choose(browser, key, value)
    for figure in ("expert-map", "lorenz-curves", "ep-run", "step-gini"):
        wait(
            browser,
            "return document.querySelector(`#${arguments[0]} .shown`).textContent.startsWith(arguments[1])",
            figure,
            "mla-tiny on mock, decode",
        )
    caption = browser.execute_script("return document.querySelector('#expert-map caption').textContent")
    assert caption == "mla-tiny on mock, decode: experts by layer, loads over the mean load"
    assert "mla-tiny on mock, decode" in browser.execute_script(
        "return document.querySelector('#expert-map .plot').getAttribute('aria-label')"
    )
    rows = "return [...document.querySelectorAll('#layers tbody tr')].filter(row => !row.hidden).map(row => "
    shown = browser.execute_script(rows + "row.cells[0].textContent + row.cells[1].textContent)")
    assert shown
    assert set(shown) == {"mla-tinymockdecode"}
    browser.find_element("css selector", ".filter button").send_keys(Keys.ENTER)
    wait(browser, rows + f"row).length > {len(shown)}")


def test_an_address_restores_what_was_chosen_and_how_a_table_was_sorted(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    choose(browser, "phase", "decode")
    browser.execute_script("document.querySelectorAll('#layers thead button')[2].click()")
    browser.find_element("css selector", "nav a[href='#layers']").send_keys(Keys.ENTER)
    wait(browser, "return location.hash.startsWith('#layers?')")
    address = browser.current_url
    sorted_column = table_column(browser, "#layers", 2)
    browser.get("about:blank")
    browser.get(address)
    assert browser.execute_script("return document.querySelector('.filter [name=phase]').value") == "decode"
    assert table_column(browser, "#layers", 2) == sorted_column
    assert browser.execute_script("return document.querySelectorAll('#layers [aria-sort]').length") == 1
    wait(browser, "return document.querySelector('#layers').getBoundingClientRect().top < 300")


def test_a_number_of_a_verdict_leads_to_its_rows(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    links = browser.find_elements("css selector", ".verdicts p a")
    texts = [link.text for link in links]
    assert {"Rows", "Figure", "Formula"} <= set(texts)
    assert sum(bool(re.match(r"\d", text)) for text in texts) >= 3
    targets = {str(link.get_attribute("hash"))[1:] for link in links}
    assert browser.execute_script(
        "return arguments[0].every(id => document.getElementById(id))", list(targets)
    )
    links[0].send_keys(Keys.ENTER)
    wait(browser, "return document.querySelector('.filter [name=model]').value !== ''")


def test_the_contents_lead_to_every_section_and_mark_the_one_being_read(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    targets = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))"
    )
    sections = "return [...document.querySelectorAll('main section')].map(s => s.id)"
    assert targets == browser.execute_script(sections)
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    browser.find_element("css selector", "nav a[href='#lorenz']").send_keys(Keys.ENTER)
    wait(browser, "return location.hash === '#lorenz'")
    wait(
        browser,
        "return [...document.querySelectorAll('nav a[aria-current]')].map(a => a.hash).join() "
        "=== '#which-experts,#lorenz'",
    )
    place = "const box = document.querySelector('.contents').getBoundingClientRect(); return box.top"
    assert 0 <= browser.execute_script(place) < 40


def test_a_figure_is_saved_as_svg(browser: webdriver.Chrome, pages: dict[str, Path], tmp_path: Path) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.execute_script("document.querySelector('#expert-map .save').click()")
    saved = tmp_path / "expert-map.svg"
    end = time.monotonic() + 10
    while not saved.exists():
        assert time.monotonic() < end, "no file within 10 s"
        time.sleep(0.05)
    picture = saved.read_text(encoding="utf-8")
    assert picture.startswith("<svg ")
    assert "expert, in the model" in picture
    assert "var(" not in picture, "colours do not depend on the page"


def test_without_javascript_figures_and_tables_are_read(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(pages["plain"].as_uri())
        shown = browser.find_element("css selector", "#main").text
        assert "each figure shows its first view" in shown
        assert "Gini over experts, prefill" in shown
        assert "Gini on mock tokens ÷ mean Gini on real text" in shown
        for name in FIGURES:
            assert browser.find_element("css selector", f"#{name} .wide svg").size["height"] > 100
        for name in (".choice", "figure button"):
            assert not any(each.is_displayed() for each in browser.find_elements("css selector", name))
        numbers = browser.find_element("css selector", "#expert-map details:not(.how)")
        numbers.find_element("css selector", "summary").send_keys(Keys.ENTER)
        assert "gqa-tiny on prose, prefill: experts by layer" in numbers.text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_on_paper_figures_are_light_and_nothing_is_cut_off_or_to_be_clicked(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["plain"], scheme="dark", figures=FIGURES)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    try:
        ink = "return getComputedStyle(document.querySelector('#ep-run .plot text:not([fill])')).fill"
        wait(browser, f"{ink} === 'rgb(26, 30, 35)'")
        hidden = browser.execute_script(
            "return ['.skip', '.choice', '.save', '.tools'].filter("
            "name => getComputedStyle(document.querySelector(name)).display !== 'none')"
        )
        assert hidden == []
        overflow = "return getComputedStyle(document.querySelector('.scroll')).overflow"
        assert browser.execute_script(overflow) == "visible"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


@pytest.mark.parametrize("paper", ["8.27in 11.69in", "8.5in 11in"])
def test_a_page_printed_by_a_command_is_a_document(
    browser: webdriver.Chrome, pages: dict[str, Path], tmp_path: Path, paper: str
) -> None:
    printed, page = tmp_path / "printed.pdf", tmp_path / "page.html"
    text = pages["plain"].read_text(encoding="utf-8")
    page.write_text(text.replace("@page { ", f"@page {{ size: {paper}; "), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", profile, f"--print-to-pdf={printed}"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=400)
    show(browser, page, figures=FIGURES)
    browser.execute_script("document.querySelectorAll('details:not(.many)').forEach(d => d.open = true)")
    settings = {"preferCSSPageSize": True}
    opened = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", settings)["data"])
    assert painted_paths(printed.read_bytes()) > 0.98 * painted_paths(opened)
    assert painted_paths(printed.read_bytes()) > 300
    browser.execute_script("document.querySelectorAll('.plot').forEach(plot => plot.remove())")
    without = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", settings)["data"])
    assert painted_paths(printed.read_bytes()) > painted_paths(without) + 20 * len(FIGURES), (
        "figures are painted"
    )
    if shutil.which("pdftotext"):
        words = subprocess.run(["pdftotext", printed, "-"], check=True, capture_output=True, text=True).stdout
        assert words.count("Directory") >= words.count("Runs in this report"), "heads are repeated"
        assert words.index("Contents") < words.index("In one sentence")


def painted_paths(pdf: bytes) -> int:
    """Lines and areas that a PDF paints."""
    count = 0
    for match in re.finditer(rb"stream\r?\n", pdf):
        try:
            content = zlib.decompressobj().decompress(pdf[match.end() :])
        except zlib.error:
            continue
        if b" cm" in content:
            count += len(re.findall(rb"(?m)^(?:S|s|f|f\*|B)$", content))
    return count


def test_the_filter_hides_findings_about_something_else(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["plain"], figures=FIGURES)
    stated = (
        "return [...document.querySelectorAll('[data-keys]')].map(item => "
        "[JSON.parse(item.dataset.keys), !item.hidden, item.querySelector('.scope').textContent])"
    )
    line = "return document.querySelector('.hidden-count').textContent"
    assert all(shown and scope == "" for _, shown, scope in browser.execute_script(stated))
    wanted = {"phase": "decode", "model": "gqa-tiny"}
    for name, value in wanted.items():
        choose(browser, name, value)
    of_all = browser.execute_script(stated)
    for keys, shown, scope in of_all:
        assert shown == all(keys.get(name, value) == value for name, value in wanted.items())
        for name in wanted:
            assert (f"all {name}s" in scope) == (name not in keys)
    hidden = sum(not shown for _, shown, _ in of_all)
    assert 0 < hidden < len(of_all)
    assert f"Hidden: {hidden} of {len(of_all)} " in browser.execute_script(line)
    assert browser.find_element("css selector", ".over-all").is_displayed()
    links = browser.execute_script(
        "return [...document.querySelectorAll('a[data-where]')].map(link => JSON.parse(link.dataset.where))"
    )
    assert any(where.get("model") for where in links)
    browser.find_element("css selector", ".filter button").send_keys(Keys.ENTER)
    wait(browser, "return document.querySelector('.hidden-count').hidden")
    assert all(shown and scope == "" for _, shown, scope in browser.execute_script(stated))


def table_column(browser: webdriver.Chrome, section: str, column: int) -> list[str]:
    cells: list[str] = browser.execute_script(
        "return [...document.querySelector(`${arguments[0]} > .scroll > table`).tBodies[0].rows]"
        ".map(row => row.cells[arguments[1]].firstChild.textContent)",
        section,
        column,
    )
    return cells


def test_a_click_on_a_heading_sorts_by_numbers_then_back(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["plain"], figures=[])
    heads = browser.find_elements("css selector", "#layers > .scroll thead th")
    column = next(index for index, head in enumerate(heads) if head.text.startswith("Gini"))
    head, before = heads[column], table_column(browser, "#layers", column)
    orders = []
    for _ in range(3):
        head.find_element("css selector", "button").send_keys(Keys.ENTER)
        orders.append((head.get_attribute("aria-sort"), table_column(browser, "#layers", column)))
    numbers = sorted(before, key=float)
    assert orders == [("descending", numbers[::-1]), ("ascending", numbers), (None, before)]


def test_a_table_is_saved_as_csv_and_no_cell_is_a_formula(
    browser: webdriver.Chrome, pages: dict[str, Path], tmp_path: Path
) -> None:
    show(browser, pages["plain"], figures=[])
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.execute_script(
        "document.querySelector('#layers tbody th').textContent = '=HYPERLINK(\"x\")';"
        "document.querySelector('#layers thead button').click();"
        "document.querySelector('#layers > .tools a').click()"
    )
    end = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("*.csv"))):
        assert time.monotonic() < end, "no file within 10 s"
        time.sleep(0.05)
    with saved[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    assert "Entropy, bits" in rows[0], "columns that are folded on the page"
    assert any(row[0] == '\'=HYPERLINK("x")' for row in rows)


def test_folded_columns_are_shown_on_request(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["plain"], figures=[])
    shown = "return [...document.querySelectorAll('#layers th')].filter(head => head.offsetWidth).length"
    before = browser.execute_script(shown)
    browser.find_element("css selector", "#layers > .tools button").send_keys(Keys.ENTER)
    assert browser.execute_script(shown) == before + 2
    browser.find_element("css selector", "#layers > .tools button").send_keys(Keys.ENTER)
    assert browser.execute_script(shown) == before


def test_a_table_is_copied_for_a_spreadsheet(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["plain"], figures=[])
    browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    browser.find_element("css selector", "#layers > .tools button[aria-label]").send_keys(Keys.ENTER)
    lines = browser.execute_script("return window.copied").split("\r\n")
    rows = browser.execute_script("return document.querySelector('#layers table').rows.length")
    assert len(lines) == rows
    assert len({line.count("\t") for line in lines}) == 1
    wait(browser, "return document.querySelector('#layers .tools').textContent.includes('Copied')")


def test_no_table_is_cut_off_at_desktop_width(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    check_no_table_is_cut_off(browser, pages["plain"], FIGURES)
