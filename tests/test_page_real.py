"""The chat page in a real browser against the real server, with a tiny random model."""

import re
import time
import urllib.request

import pytest

from tests import page_browser
from tests.page_browser import answer, ask, button, expect, finished, picture, shown
from tests.page_helpers import CSP
from tests.server_helpers import Running, make_models

FIXTURES = ("browser", "page", "running_server", "server", "shared_page", "window")
browser, page, running_server, server, shared_page, window = (getattr(page_browser, name) for name in FIXTURES)
CONTEXT = 4096


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The address of `python -m scripts.chat_web` with a random model that never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("real")
    make_models(folder, {"base": CONTEXT, "sft": CONTEXT})
    with Running(folder) as server:
        yield server.url + "/"


def running_rows(url):
    """How many rows the server is decoding."""
    with urllib.request.urlopen(url + "metrics", timeout=10) as response:
        return sum(float(value) for value in re.findall(r"^\S*running\S* ([\d.e+]+)$", response.read().decode(),
                                                        re.MULTILINE))


def test_the_page_and_the_real_server_understand_each_other(window, real):
    with urllib.request.urlopen(real, timeout=10) as response:
        assert response.headers["Content-Security-Policy"] == CSP
    page = window(url=real, viewport={"width": 1000, "height": 700})
    assert page.locator("#model").input_value() == "sft"
    page.locator("#settings").click()
    longest = page.get_by_label("Longest answer, as a number")
    longest.fill(str(CONTEXT))
    longest.press("Tab")
    page.keyboard.press("Escape")

    ask(page, "the cat", wait=False)
    expect(answer(page).locator(".prose")).to_contain_text(re.compile(r"\S"))
    for _ in range(100):
        if running_rows(real):
            break
        time.sleep(0.05)
    assert running_rows(real) == 1
    button(page, "Stop (Esc)").click()
    finished(page)
    for _ in range(200):
        if not running_rows(real):
            break
        time.sleep(0.05)
    assert running_rows(real) == 0
    stopped = shown(page)[-1]
    assert stopped

    page.locator("#settings").click()
    longest.fill("8")
    page.get_by_label("Seed").fill("5")
    page.keyboard.press("Escape")
    ask(page, "on the mat")
    stats = re.compile(r"cut at the longest answer · 8 tokens · [\d.]+ tokens/s")
    expect(answer(page).locator(".stats")).to_contain_text(stats)
    expect(page.locator("#meter-text")).to_contain_text(f"of {CONTEXT:,} tokens")
    first = shown(page)[-1]
    button(answer(page), "Another answer").click()
    finished(page)
    assert shown(page)[-1] == first  # the same seed
    picture(page, "real-light")

    page.locator("#new").click()
    page.locator("#model").select_option("base")
    ask(page, "the cat sat ")
    expect(answer(page).locator(".stats")).to_contain_text("8 tokens")

    page.locator("#model").select_option("sft")
    page.locator("#new").click()
    ask(page, "cat mat " * CONTEXT)
    expect(answer(page).locator(".problem")).to_contain_text("This conversation no longer fits.")
