"""The page in a browser, for its tests: fixtures, and what a person does and sees."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.page_helpers import Server

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("NANOCHAT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SCREENSHOTS = Path(os.environ.get("NANOCHAT_SCREENSHOTS") or ROOT / ".cache" / "screenshots")
PHONE = {"width": 390, "height": 780}
WATCH = """addEventListener("securitypolicyviolation", (event) => {
  (window.violations ??= []).push(`${event.violatedDirective} ${event.blockedURI}`);
});"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed", exc_type=ImportError)
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH, and NANOCHAT_CHROMIUM is unset")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running_server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(running_server):
    yield running_server
    running_server.gate.set()
    running_server.reset()


def new_context(browser, **options):
    context = browser.new_context(**{"viewport": {"width": 1180, "height": 800}, "reduced_motion": "reduce", **options})
    context.set_default_timeout(10000)
    context.add_init_script(WATCH)
    return context


@pytest.fixture(scope="module")
def shared_page(browser):
    """One window for most tests, since its cache makes the page open faster; what the page keeps is cleared after each
    test."""
    context = new_context(browser)
    yield context.new_page()
    context.close()


@pytest.fixture
def window(browser, server, shared_page):
    """Opens the page, in a profile of its own where anything is asked of it. No script error and no breach of the
    policy may be left."""
    pages, errors = [], []

    def failed(error):
        errors.append(str(error))

    def open_(url=None, **options):
        page = new_context(browser, **options).new_page() if options or pages else shared_page
        pages.append(page)
        page.on("pageerror", failed)
        page.goto(url or server.url)
        ready(page)
        return page

    yield open_
    for page in pages:
        assert page.evaluate("window.violations ?? []") == []
        if page is not shared_page:
            page.context.close()
            continue
        page.remove_listener("pageerror", failed)
        page.unroute_all()
        cdp = page.context.new_cdp_session(page)
        page.goto("about:blank")
        cdp.send("Storage.clearDataForOrigin",
                 {"origin": server.url.rstrip("/"), "storageTypes": "indexeddb,local_storage"})
        cdp.detach()
    assert errors == []


@pytest.fixture
def page(window):
    return window()


def expect(locator):
    from playwright.sync_api import expect
    return expect(locator)


def ready(page):
    page.locator("html[data-ready]").wait_for(state="attached")


def ask(page, text, wait=True):
    """Send a message; wait until its answer has ended."""
    page.locator("#area").fill(text)
    page.locator("#area").press("Enter")
    if wait:
        finished(page)


def finished(page):
    page.locator('.message.assistant:nth-last-child(1 of .message)[aria-busy="false"]').wait_for(state="attached")


def answer(page):
    """The newest answer."""
    return page.locator(".message.assistant").last


def button(place, name):
    return place.get_by_role("button", name=name, exact=True)


def shown(page):
    """The texts of the messages."""
    return [text.strip() for text in page.locator(".message .bubble, .message .prose").all_inner_texts()]


def picture(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
