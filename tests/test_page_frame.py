"""The chat page in a real browser: models, settings, the list of conversations, looks, keys, files."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests import page_browser
from tests.conftest import ROOT
from tests.page_browser import PHONE, answer, ask, button, expect, finished, picture, ready, shown
from tests.page_helpers import DIE, GATE, RICH, STATIC, Tool

FIXTURES = ("browser", "page", "running_server", "server", "shared_page", "window")
browser, page, running_server, server, shared_page, window = (getattr(page_browser, name) for name in FIXTURES)


# ---- models and settings

def test_a_base_model_continues_the_raw_text(page, server):
    page.locator("#model").select_option("base")
    expect(page.locator("#empty .lead")).to_contain_text("continues the text")
    server.script["Once upon a time "] = [["there **was**"]]
    ask(page, "Once upon a time ")
    path, body, _ = server.requests[-1]
    assert path == "/v1/completions" and body["prompt"] == "Once upon a time " and body["model"] == "base"
    assert "messages" not in body
    assert answer(page).locator(".prose").inner_text() == "there **was**"  # no markdown in it
    ask(page, " a king")
    assert server.requests[-1][1]["prompt"] == "Once upon a time there **was** a king"
    picture(page, "base-light")
    page.reload()
    ready(page)
    assert page.locator("#model").input_value() == "base"


def test_settings_reach_the_server_and_are_kept(page, server):
    page.locator("#settings").click()
    picture(page, "settings-light")
    page.get_by_label("Temperature, as a number").fill("0.3")
    page.get_by_label("Top-k, as a number").fill("7")
    page.get_by_label("Top-p, as a number").fill("0.9")
    page.get_by_label("Repetition penalty, as a number").fill("1.2")
    page.get_by_label("Longest answer, as a number").fill("999999")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Temperature", exact=True).press("ArrowRight")
    button(page, "Close settings").click()
    page.reload()
    ready(page)
    ask(page, "x")
    body = server.requests[-1][1]
    given = {"temperature": 0.35, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 2048, "seed": 42}
    assert {name: body[name] for name in given} == pytest.approx(given)
    page.locator("#settings").click()
    button(page, "Back to the defaults").click()
    page.keyboard.press("Escape")
    ask(page, "y")
    assert server.requests[-1][1]["temperature"] == 0.8 and "seed" not in server.requests[-1][1]


def test_slash_commands_do_as_published(page, server):
    def told(text):
        ask(page, text, wait=False)
        return page.locator(".remark").last.inner_text()

    assert told("/temperature") == "Temperature is 0.8."
    assert told("/temperature 0.4") == "Temperature is now 0.4."
    assert told("/temperature 9") == "Temperature is a number from 0 to 2."
    assert told("/topk 20") == "Top-k is now 20."
    assert told("/topk") == "Top-k is 20."
    assert told("/topk 1.5") == "Top-k is a whole number from 0 to 200."
    assert server.requests == []
    page.locator("#area").fill("/")
    expect(page.locator(".command")).to_have_count(4)
    picture(page, "commands-light")
    page.locator("#area").fill("/to")
    page.locator("#area").press("Tab")
    assert page.locator("#area").input_value() == "/topk "
    ask(page, "/help", wait=False)
    expect(page.get_by_role("dialog", name="Commands and keys")).to_be_visible()
    picture(page, "help-light")
    page.keyboard.press("Escape")
    ask(page, "hello")
    assert (server.requests[-1][1]["temperature"], server.requests[-1][1]["top_k"]) == (0.4, 20)
    ask(page, "/clear", wait=False)
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator(".conversation")).to_have_count(1)
    ask(page, "/nothing known")  # an ordinary message
    assert shown(page)[0] == "/nothing known"


# ---- conversations

def test_a_reload_keeps_conversations_and_settings_of_each(page, server):
    ask(page, "about cats")
    page.locator("#new").click()
    ask(page, "about dogs")
    page.reload()
    ready(page)
    assert shown(page) == ["about dogs", "You said: about dogs"]
    assert page.locator(".conversation .title").all_inner_texts() == ["about dogs", "about cats"]


def test_a_reload_in_mid_answer_keeps_what_had_come(page, server):
    server.script["slow"] = [["Half of ", GATE, "it"], ["All"]]
    ask(page, "slow", wait=False)
    expect(answer(page).locator(".prose")).to_have_text("Half of")
    page.wait_for_timeout(100)
    page.reload()
    ready(page)
    assert page.locator(".bubble").inner_text() == "slow"
    expect(answer(page).locator(".problem")).to_contain_text("The page was closed")
    button(answer(page), "Retry").click()
    finished(page)
    assert shown(page) == ["slow", "All"]


def test_search_finds_words_in_titles_and_messages(page, server):
    server.script["animals"] = [["A heron stands still."]]
    for text in ("animals", "rivers and lakes"):
        page.locator("#new").click()
        ask(page, text)
    titles = page.locator(".conversation .title")
    page.keyboard.press("Control+k")
    page.keyboard.type("HERON")
    assert titles.all_inner_texts() == ["animals"]
    page.locator("#search").fill("lakes rivers")
    assert titles.all_inner_texts() == ["rivers and lakes"]
    page.locator("#search").fill("volcano")
    expect(page.locator("#nothing")).to_have_text("Nothing found.")
    page.keyboard.press("Escape")
    expect(titles).to_have_count(2)


def test_rename_delete_and_undo(page, server):
    ask(page, "first words")
    row = page.locator(".conversation")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the conversation").fill("My name")
    page.keyboard.press("Enter")
    expect(row.locator(".title")).to_have_text("My name")
    expect(page.locator("#title")).to_have_text("My name")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    picture(page, "deleted-light")
    button(page, "Undo").click()
    expect(row.locator(".title")).to_have_text("My name")
    assert shown(page) == ["first words", "You said: first words"]
    row.hover()
    row.get_by_role("button", name="Delete").click()
    page.reload()
    ready(page)
    expect(row).to_have_count(0)


def test_what_is_exported_comes_in_again_the_same(page, window, server, tmp_path):
    server.script["2+2?"] = [[Tool("python", ["2+2"]), Tool("python_output", ["4"]), "four"], ["another"]]
    ask(page, "2+2?")
    button(answer(page), "Another answer").click()
    finished(page)
    page.locator("#new").click()
    ask(page, "second")
    with page.expect_download() as download:
        button(page, "Export all").click()
    file = tmp_path / "all.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text())
    assert exported["format"] == "nanochat-conversations" and len(exported["conversations"]) == 2
    page.locator("#file").set_input_files(file)
    expect(page.locator(".notice").last).to_contain_text("0 conversations imported, 2 already here")

    other = window()  # a browser that has none of them
    other.locator("#file").set_input_files(file)
    expect(other.locator(".notice")).to_contain_text("2 conversations imported.")
    other.locator(".conversation", has_text="2+2?").click()
    assert shown(other) == ["2+2?", "another"]
    button(answer(other), "Previous alternative").click()
    assert answer(other).locator(".prose").text_content() == "calculator: 2+2 = 4four"
    with other.expect_download() as download:
        other.locator(".conversation", has_text="second").hover()
        other.get_by_role("button", name="Export “second”").click()
    assert download.value.suggested_filename == "second.json"
    one = json.loads(Path(download.value.path()).read_text())["conversations"]
    assert one == [conversation for conversation in exported["conversations"] if conversation["title"] == "second"]


@pytest.mark.parametrize("text, said", [
    ("not json", "it is not JSON"), ("[]", "no conversations"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "message 1 has no role"),
    ('{"conversations": [{"nodes": {"a": {"role": "user", "parent": "a", "parts": []}}, "chosen": {"": "a"}}]}',
     "circle"),
    ('{"conversations": [{"nodes": {"a": {"role": "user", "parent": "", "parts": [{"type": "text", "text": 5}]}}}]}',
     "is not text"),
])
def test_a_file_that_is_no_conversation_is_refused_with_the_reason(page, text, said):
    page.locator("#file").set_input_files({"name": "odd.json", "mimeType": "application/json", "buffer": text.encode()})
    expect(page.locator(".notice")).to_contain_text(said)
    expect(page.locator(".conversation")).to_have_count(0)


def test_plain_messages_can_be_imported(page, server):
    said = [("system", "S"), ("user", "Hi"), ("assistant", "Hello")]
    text = json.dumps({"messages": [{"role": role, "content": content} for role, content in said]})
    page.locator("#file").set_input_files({"name": "plain.jsonl", "mimeType": "application/json",
                                           "buffer": f"{text}\n{text}\n".encode()})
    expect(page.locator(".conversation")).to_have_count(2)
    page.locator(".conversation").first.click()
    assert shown(page) == ["Hi", "Hello"]
    ask(page, "go on")
    roles = [message["role"] for message in server.requests[-1][1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_another_tab_sees_what_this_one_says(page, server):
    other = page.context.new_page()
    other.goto(server.url)
    ready(other)
    ask(page, "from here")
    expect(other.locator(".conversation .title")).to_have_text("from here")
    other.close()


# ---- how it looks, and for whom

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (value) => (value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
  const light = (colour) => [.2126, .7152, .0722].reduce((sum, weight, i) => sum + weight * linear(colour[i] / 255), 0);
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const field = element.matches("input, textarea, select");
    const words = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!field && !words) continue;
    if (element.closest(".unseen, .skip, noscript, [inert], :disabled")) continue;
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    let back = element;
    while (rgba(getComputedStyle(back).backgroundColor)[3] < 255) back = back.parentElement;
    const colours = [getComputedStyle(element).color, getComputedStyle(back).backgroundColor];
    const [dark, bright] = colours.map((colour) => light(rgba(colour))).sort((a, b) => a - b);
    const ratio = (bright + .05) / (dark + .05);
    const where = `${element.tagName}.${element.className} "${element.textContent.slice(0, 30)}"`;
    if (ratio < 4.5) poor.push(`${where} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_themes(window, server, scheme):
    page = window(color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    picture(page, f"empty-{scheme}")
    server.script["Tell me about short convolutions"] = [RICH]
    server.script["break"] = [["Half", DIE]]
    ask(page, "Tell me about short convolutions")
    picture(page, f"answer-{scheme}")
    assert page.evaluate(CONTRAST) == []
    ask(page, "break")
    ask(page, "/temperature", wait=False)
    assert page.evaluate(CONTRAST) == []
    picture(page, f"broken-{scheme}")
    page.locator("#settings").click()
    assert page.evaluate(CONTRAST) == []
    picture(page, f"settings-{scheme}")


def test_dark_and_light_follow_the_system_until_chosen(window):
    page = window(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    button(page, "Theme: as the system").click()
    button(page, "Theme: light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.reload()
    ready(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    button(page, "Theme: dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll_and_a_drawer(window, server, scheme):
    page = window(viewport=PHONE, color_scheme=scheme, has_touch=True)
    wide = ("[document.documentElement, document.getElementById('scroller')]"
            ".some((place) => place.scrollWidth > place.clientWidth)")
    assert page.evaluate(wide) is False
    picture(page, f"phone-empty-{scheme}")
    server.script["x" * 120] = [[*RICH, "\n\n" + "y" * 300 + "\n\n```\n" + "z" * 300 + "\n```"]]
    page.locator("#area").fill("x" * 120)
    page.locator("#send").click()
    finished(page)
    assert page.evaluate(wide) is False
    page.locator("#scroller").evaluate("(element) => { element.scrollTop = 100; }")
    expect(page.locator("#latest")).to_be_visible()
    picture(page, f"phone-answer-{scheme}")
    page.locator("#latest").click()
    expect(page.locator("#latest")).to_be_hidden()
    assert page.locator("#sidebar").is_hidden()
    button(page, "List of conversations").click()
    expect(page.locator("#sidebar")).to_be_visible()
    picture(page, f"phone-drawer-{scheme}")
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "menu"
    button(page, "List of conversations").click()
    page.locator(".conversation .open").click()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#settings").click()
    assert page.evaluate(wide) is False
    picture(page, f"phone-settings-{scheme}")


def test_the_narrowest_phone_holds_everything(window, server):
    page = window(viewport={"width": 320, "height": 560})
    ask(page, "hello")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    for name in ("menu", "settings", "theme", "send"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 320


def test_everything_can_be_done_from_the_keyboard(page, server):
    server.script["tell"] = [["one"], ["two"]]
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"

    def tab_to(name, back=False):
        for _ in range(40):
            if (page.evaluate(focused) or "").startswith(name):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none" or name == "area"  # seen; the field shows it on its frame
                return
            page.keyboard.press("Shift+Tab" if back else "Tab")
        pytest.fail(f"{name} cannot be reached; the focus is on {page.evaluate(focused)}")

    assert page.evaluate(focused) == "area"
    page.keyboard.type("tell")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    finished(page)
    tab_to("Another answer", back=True)
    page.keyboard.press("Enter")
    finished(page)
    assert shown(page) == ["tell", "two"]
    tab_to("Previous alternative", back=True)
    page.keyboard.press("Enter")
    assert shown(page) == ["tell", "one"]
    page.keyboard.press("/")
    assert page.evaluate(focused) == "area"
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == "Edit your message"
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".message")).to_have_count(0)
    page.keyboard.press("Control+k")
    assert page.evaluate(focused) == "search"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert shown(page) == ["tell", "one"]
    page.keyboard.press("Control+k")
    tab_to("Delete")
    page.keyboard.press("Enter")
    expect(page.locator(".conversation")).to_have_count(0)
    page.keyboard.press("Control+b")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.keyboard.press("Control+b")
    page.locator("#search").blur()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()


def test_the_answer_is_announced_once_not_by_token(page, server):
    server.script["count"] = [[f"{number} " for number in range(60)]]
    page.evaluate("new MutationObserver((changes) => { window.said = (window.said ?? 0) + changes.length; })"
                  ".observe(document.getElementById('announcer'), {childList: true, characterData: true})")
    ask(page, "count")
    expect(page.locator("#announcer")).to_contain_text("58 59")
    assert page.evaluate("window.said") <= 6
    assert page.locator("#messages").get_attribute("aria-live") is None


# ---- the files

def test_the_page_takes_nothing_from_elsewhere_and_sets_no_html():
    for file in [*STATIC.glob("*.js"), *STATIC.glob("*.css"), *STATIC.glob("*.html")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function",
                             text), file.name
        assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg"}, file.name
        if file.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=", text)


def test_the_vendored_files_are_the_ones_their_readme_names():
    vendor = STATIC / "vendor"
    named = dict(re.findall(r"^\| (\S+\.js) \| `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.MULTILINE))
    there = {file.relative_to(vendor).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
             for file in vendor.rglob("*.js")}
    assert named == there


def test_every_script_is_fetched_at_once():
    named = set(re.findall(r'<link rel="modulepreload" href="static/([^"]+)">', (STATIC / "index.html").read_text()))
    assert named == {file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*.js")} - {"app.js", "theme.js"}


def test_an_installed_package_holds_every_file_of_the_page():
    patterns = re.search(r'^"nanochat.server" = \[(.*)\]$', (ROOT / "pyproject.toml").read_text(),
                         re.MULTILINE).group(1)
    packed = {file for pattern in re.findall(r'"([^"]+)"', patterns) for file in STATIC.parent.glob(pattern)}
    # texts go in from everywhere
    there = {file for file in STATIC.rglob("*") if file.is_file() and file.suffix != ".txt"}
    assert there <= packed
