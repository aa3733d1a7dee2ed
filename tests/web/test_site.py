# SPDX-License-Identifier: Apache-2.0
"""Tests of the documentation site in Chromium, opened from disk; `make docs` builds it first."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from web_support import browser_missing, chromium

SITE = Path(__file__).resolve().parents[2] / "build" / "site"
pytestmark = [
    pytest.mark.skipif(browser_missing() is not None, reason=browser_missing() or ""),
    pytest.mark.skipif(not SITE.exists(), reason="no site in build/site: make docs"),
]
PAGES = sorted(SITE.rglob("*.html"))


@pytest.fixture(scope="module")
def browser():
    driver = chromium("1280,1400")
    yield driver
    driver.quit()


def test_every_page_is_reached_from_the_first():
    seen, todo = set(), [SITE / "index.html"]
    while todo:
        page = todo.pop()
        if page in seen or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r'href="?([^" >#]+\.html)', page.read_text(encoding="utf-8"))
        todo += [(page.parent / link).resolve() for link in links if ":" not in link]
    assert {page for page in PAGES if page.name != "404.html"} == seen


def test_code_blocks_and_pages_fit_1280_pixels(browser):
    wide = {}
    for page in PAGES:
        browser.get(page.as_uri())
        found = browser.execute_script(
            "return [[...document.querySelectorAll('.md-typeset pre > code')].filter("
            "e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.split('\\n')[0]),"
            "document.documentElement.scrollWidth > window.innerWidth]"
        )
        if found[0] or found[1]:
            wide[page.name] = found
    assert not wide


# What sticks out to the right of the screen and cannot be scrolled into it, and charts that do not open large.
PHONE = """
const inside = e => {
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible' && p.getBoundingClientRect().right <= innerWidth + 1) return true;
  return false;
};
const shown = [...document.querySelectorAll('.md-content *')].filter(e => e.getClientRects().length);
const wide = shown.filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !inside(e));
const charts = [...document.querySelectorAll('.md-content img')].filter(e => e.naturalWidth > innerWidth + 1);
return [
  document.documentElement.scrollWidth > innerWidth ? ['page'] : [],
  wide.map(e => e.tagName + ': ' + e.textContent.slice(0, 60)),
  charts.filter(e => !e.closest('a')).map(e => e.src),
].flat();
"""


def test_pages_fit_a_phone_of_390_pixels(browser):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wide = {}
        for page in PAGES:
            browser.get(page.as_uri())
            assert browser.execute_script("return innerWidth") == 390
            if found := browser.execute_script(PHONE):
                wide[page.name] = found
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not wide


@pytest.mark.parametrize(
    ("typed", "page"),
    [("--mean-ratio", "choosing.html"), ("install", "quickstart.html"), ("how to install", "quickstart.html")],
)
def test_the_search_finds_from_the_disk(browser, typed, page):
    browser.get((SITE / "index.html").as_uri())
    time.sleep(2)
    box = browser.find_element("css selector", ".md-search__input")
    box.click()
    box.send_keys(typed)
    for _ in range(60):
        time.sleep(0.5)
        links = [e.get_attribute("href") for e in browser.find_elements("css selector", ".md-search-result__link")]
        if any(page in link for link in links):
            return
    raise AssertionError(f"{typed}: {links}")
