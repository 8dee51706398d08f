"""The page of the report in a real browser: it works without a network, and no text is a script."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from report_runs import HOSTILE, write_rollouts, write_run

from codistill.output.page.build import write_page
from codistill.output.page.runs import load_runs

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two seeds and another run, whose rollouts are those of an older version."""
    folder = tmp_path_factory.mktemp("page")
    runs = [write_run(folder / name, seed=seed) for name, seed in (("a_1", 1), ("a_2", 2))]
    runs.append(write_run(folder / "old", algorithm="kdrl"))
    write_rollouts(runs[-1], 40, tokens=False)
    write_page(folder / "report.html", load_runs(runs), rollouts=50)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, page_file):
    """The page in a light window; whatever goes wrong in it is an error of the test after which it
    is seen."""
    page = browser.new_page(color_scheme="light", viewport={"width": 1200, "height": 800})
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.wrong.append(request.url))
    page.goto(page_file.as_uri())
    assert page.wrong.pop(0) == page_file.as_uri()
    yield page
    page.close()


@pytest.fixture(autouse=True)
def nothing_is_wrong(page):
    yield
    assert page.wrong == []
    assert page.evaluate("window.hacked") is None


def count(page) -> int:
    return page.locator("#table tbody tr:not(.detail)").count()


def test_figures_are_drawn(page):
    drawn = page.locator(".plot").evaluate_all("all => all.map(plot => plot.data.length)")
    assert len(drawn) == 17 and all(drawn)
    shown = page.locator(".plot .scatterlayer path.js-line, .plot .bars path")
    assert shown.count() > 40


def test_rows_are_filtered(page):
    assert count(page) == 18
    for name, value, expected in (
        ("run", "a_1", 6),
        ("right", "true", 3),
        ("kept", "true", 1),
        ("kept", "false", 2),
        ("step", "40", 2),
    ):
        page.locator(f"[name={name}]").select_option(value)
        assert count(page) == expected
    assert page.locator("#found").text_content() == "2 of 18 rollouts"
    page.locator("#filters").evaluate("form => { form.reset(); filter(); }")
    page.locator("[name=lowest]").fill("1")
    page.locator("[name=highest]").fill("1")
    assert count(page) == 5  # of rewards n/4, and of accuracies where there is nothing else
    page.locator("#filters").evaluate("form => { form.reset(); filter(); }")
    page.locator("[name=text]").fill("what is 3")
    assert count(page) == 3
    page.locator("#filters").evaluate("form => { form.reset(); filter(); }")
    page.locator("[name=sort]").select_option("high")
    assert page.locator("#table button").first.text_content() == "What is 5 + 0?"
    page.locator("#filters").evaluate("form => { form.reset(); filter(); }")


def open_row(page, run: str):
    page.locator("[name=run]").select_option(run)
    page.locator("#table button").first.click()
    return page.locator("#table .detail")


def test_a_token_has_a_colour_and_shows_its_numbers(page):
    detail = open_row(page, "a_1")
    tokens = detail.locator(".tokens span")
    assert tokens.all_text_contents() == [HOSTILE, "↵\n", " 0"]
    classes = tokens.evaluate_all("all => all.map(token => token.className)")
    assert classes == ["hint smaller", "larger", ""]
    shares = tokens.evaluate_all("all => all.map(t => t.style.getPropertyValue('--share'))")
    assert shares == ["50%", "100%", ""]
    tokens.nth(1).hover()
    numbers = page.locator("#numbers")
    text = numbers.text_content()
    for part in (r'"\n", id 2', "2 of 3", "−1.0000", "−3.0000", "2.0000", "7.389", "engine"):
        assert part in text, text
    page.mouse.move(0, 0)
    detail.locator(".tokens").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert numbers.is_visible() and "3 of 3" in numbers.text_content()
    page.keyboard.press("Escape")
    assert not numbers.is_visible()


def test_a_row_without_tokens_shows_plain_text(page):
    detail = open_row(page, "old")
    assert HOSTILE in detail.text_content() and detail.locator(".tokens").count() == 0
    opener = page.locator("#table button").first
    assert opener.get_attribute("aria-expanded") == "true"
    opener.press("Enter")
    assert page.locator("#table .detail").count() == 0


def test_a_run_is_hidden_and_shown(page):
    chip = page.locator(".chip", has_text="old")
    visible = "plot => plot.data.filter(t => t.legendgroup === 'old').map(t => t.visible)"
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert not any(page.locator(".plot").first.evaluate(visible))
    chip.click()
    assert all(page.locator(".plot").first.evaluate(visible))


def background(page) -> np.ndarray:
    """The colours of a screenshot, [pixels, 3]."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return np.asarray(image).reshape(-1, 3)


def test_light_and_dark(page):
    light = background(page)
    assert np.median(light) > 200 and len(np.unique(light, axis=0)) > 50, "a blank page"
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert max(np.median(dark), dark[0].max()) < 60 and len(np.unique(dark, axis=0)) > 50
    fill = "text => getComputedStyle(text).fill"
    label = page.locator(".plot .xtick text").first
    assert label.evaluate(fill) == "rgb(228, 232, 236)"
    page.locator("#theme").click()
    assert np.median(background(page)) > 200
    assert label.evaluate(fill) == "rgb(27, 33, 39)"


def test_a_narrow_window_is_wide_enough(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
