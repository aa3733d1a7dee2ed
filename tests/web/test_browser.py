# SPDX-License-Identifier: Apache-2.0
"""Browser tests of the demo: pictures, uploads, the ratio slider, methods, model comparison and token explanations.

Saves screenshots, with `make test-web VTPRUNE_SHOTS=docs` into docs/.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from web_support import SHOTS, browser_missing, chromium

pytestmark = pytest.mark.skipif(browser_missing() is not None, reason=browser_missing() or "")
PATIENCE = 120  # seconds
QWEN = "embedded-qwen2_5_vl"


@pytest.fixture(scope="module")
def page(server):
    driver = chromium("1280,1500")
    driver.set_page_load_timeout(PATIENCE)
    driver.get(server.url)
    _wait(driver, "#preview img")
    yield driver
    driver.quit()


def _wait(driver, selector, condition=lambda found: True):
    """Waits for the first element that matches a CSS selector and a condition."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def found(d):
        return next((e for e in d.find_elements(By.CSS_SELECTOR, selector) if condition(e)), False)

    return WebDriverWait(driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException]).until(
        found, f"no {selector}"
    )


def _tick(driver, group, *names):
    """Ticks exactly these checkboxes of a group."""
    from selenium.webdriver.common.by import By

    for label in driver.find_elements(By.CSS_SELECTOR, f"{group} label"):
        box = label.find_elements(By.CSS_SELECTOR, "input")
        if box and box[0].is_selected() != (label.text.strip() in names):
            driver.execute_script("arguments[0].click()", box[0])


def _slide(driver, value):
    from selenium.webdriver.common.keys import Keys

    box = _wait(driver, "#ratio input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(value, Keys.TAB)


def _ask(driver, *methods, kept, models=(QWEN,)):
    """Presses the button and waits for these methods' rows and these numbers of kept patches; returns the rows.

    Releasing the slider also sends a request, so several answers may arrive.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    expected = [[model, method] for model in models for method in ("all tokens", *methods)]
    driver.execute_script("document.querySelectorAll('#result .vt').forEach(e => e.remove())")
    driver.execute_script("arguments[0].click()", _wait(driver, "#ask"))

    def there(d):
        rows = _rows(d)
        return [row[:2] for row in rows] == expected and _kept(d) == kept and rows

    return WebDriverWait(driver, PATIENCE).until(there, f"no answer of {expected} with {kept} kept patches")


def _rows(driver):
    """Cells of the table of answers, by row."""
    return driver.execute_script(
        "return [...document.querySelectorAll('#result table.sides tr')].slice(1)"
        ".map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent))"
    )


def _kept(driver):
    script = "return [...document.querySelectorAll('#result svg.patches')].map(s => s.querySelectorAll(\"%s\").length)"
    return driver.execute_script(script % "rect[data-kept='1']")


def _shot(driver, name, selector="body"):
    """Saves a screenshot of an element of the page."""
    element = _wait(driver, selector)
    driver.execute_script("arguments[0].scrollIntoView()", element)
    raw = Path(SHOTS / name)
    raw.parent.mkdir(exist_ok=True)
    assert element.screenshot(str(raw))
    Image.open(raw).convert("RGB").quantize(128).save(raw, optimize=True)
    assert raw.stat().st_size < 300_000


def test_a_scene_is_answered_with_and_without_pruning(page):
    assert _wait(page, "#question textarea, #question input").get_attribute("value")
    _tick(page, "#methods", "iwp")
    (_, _, answer, tokens, _, first, *parts), (_, _, pruned, fewer, memory, *_) = _ask(page, "iwp", kept=[130])
    assert answer and pruned
    assert tokens == "1,296" and fewer.startswith("130 (-90 %)")
    assert re.fullmatch(r"[\d,]+ KiB \(-\d+ %\)", memory) and re.fullmatch(r"[\d,]+ ms", first)
    assert re.fullmatch(r"[\d,.]+ ms 0\.0 ms [\d,.]+ ms \d+\.\d times as fast", " ".join(parts))
    assert _wait(page, "#result .heat img").get_attribute("src").startswith("data:image/jpeg")
    _shot(page, "space.png")


def test_the_slider_changes_what_is_kept(page):
    _slide(page, "0.5")
    assert _ask(page, "iwp", kept=[648])[1][3].startswith("648 (-50 %)")


def test_a_patch_tells_why(page):
    patch = _wait(page, "#result svg.patches rect[data-kept='0']")
    title = page.execute_script("return arguments[0].querySelector('title').textContent", patch)
    assert re.match(r"Patch row \d+, column \d+: dropped before layer \d+\. Score \S+, rank \d+ of 1296\.", title)
    event = "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    page.execute_script(event, patch)
    assert _wait(page, "#result .why").text == title
    twin = _wait(page, "#result rect.twin")
    assert twin.get_attribute("data-token") == patch.get_attribute("data-twin")
    assert twin.get_attribute("data-kept") == "1"


def test_methods_are_compared_and_progressive_ones_show_their_stages(page):
    _slide(page, "0.1")
    _tick(page, "#methods", "iwp", "pyramiddrop", "divprune")
    _ask(page, "divprune", "iwp", "pyramiddrop", kept=[130, 130, 130])
    stages = page.execute_script(
        "return [...document.querySelectorAll('#result .card[data-method=pyramiddrop] .stages figcaption')]"
        ".map(e => e.textContent)"
    )
    assert len(stages) > 1 and all(re.fullmatch(r"before layer \d+: \d+ of 1296 kept", text) for text in stages)
    assert "without scores" in _wait(page, "#result .card[data-method=divprune] p.heat").text
    _shot(page, "space-methods.png", "#result")


def test_two_models_are_compared(page):
    _tick(page, "#methods", "iwp")
    _tick(page, "#models", QWEN, "weights")
    rows = _ask(page, "iwp", kept=[130, 14], models=(QWEN, "weights"))
    assert rows[0][2] and rows[2][2]
    _tick(page, "#models", QWEN)


def test_the_vision_tower_is_cut_as_well(page):
    box = _wait(page, "#tower input")
    page.execute_script("arguments[0].click()", box)
    whole, cut = _ask(page, "iwp", kept=[130])
    before, after = (float(row[6].removesuffix(" ms").replace(",", "")) for row in (whole, cut))
    assert after < before
    page.execute_script("arguments[0].click()", box)


def test_an_upload_is_shown_and_asked_about_and_a_bad_one_gets_a_message(page, tmp_path):
    from vtprune import refvlm

    long = Image.new("RGB", (432, 288), "white")
    long.paste(refvlm.scenes.scene(12).image.resize((288, 288)), (72, 0))
    long.save(tmp_path / "mine.png")
    (tmp_path / "bad.png").write_text("no picture")
    page.find_element("css selector", "#upload input[type=file]").send_keys(str(tmp_path / "mine.png"))
    _wait(page, "#choice input:checked", lambda e: e.get_attribute("value") == "my upload")
    _ask(page, "iwp", kept=[86])
    assert _wait(page, "#result svg.patches").get_dom_attribute("viewBox") == "0 0 432 288"
    page.execute_script("arguments[0].click()", _wait(page, "#upload button[aria-label^='Remove'], #upload button"))
    _wait(page, "#upload input[type=file]").send_keys(str(tmp_path / "bad.png"))
    _wait(page, "#message", lambda e: "no picture that can be read" in e.text)
    page.execute_script("arguments[0].click()", _wait(page, "#choice input[value='scene 7']"))
    _ask(page, "iwp", kept=[14])
    assert _wait(page, "#result svg.patches").get_dom_attribute("viewBox") == "0 0 144 144"
