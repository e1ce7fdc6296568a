"""The chat page in a real browser, against a scripted server: asking, answering, branches, markdown, failures.

    python -m pytest tests/test_page.py tests/test_page_frame.py

Screenshots of the main states go to $NANOCHAT_SCREENSHOTS, .cache/screenshots if unset.

Needs playwright, and a Chromium or Chrome of the system ($NANOCHAT_CHROMIUM, or on the PATH); skipped with the reason
without them.
"""

import json
import re

import pytest

from tests import page_browser
from tests.page_browser import answer, ask, button, expect, finished, picture, ready, shown
from tests.page_helpers import CODE, DIE, FOREVER, GATE, RICH, Extra, Fails, Finish, Refused, Tool

FIXTURES = ("browser", "page", "running_server", "server", "shared_page", "window")
browser, page, running_server, server, shared_page, window = (getattr(page_browser, name) for name in FIXTURES)


# ---- asking and answering

def test_the_empty_page_says_what_the_model_is_and_offers_prompts(page, server):
    expect(page.locator("#empty")).to_contain_text("It makes things up")
    expect(page.locator("#empty")).to_contain_text("no internet")
    picture(page, "empty-light")
    page.locator(".prompt").first.click()
    finished(page)
    assert shown(page) == ["Who are you?", "You said: Who are you?"]
    expect(page.locator("#empty")).to_be_hidden()


def test_an_answer_streams_and_its_text_grows_in_place(page, server):
    server.script["hello"] = [["Good ", GATE, "day **to you**"]]
    ask(page, "hello", wait=False)
    expect(answer(page).locator(".prose")).to_have_text("Good")
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    expect(page.locator("#announcer")).to_have_text("The model is answering.")
    server.gate.set()
    finished(page)
    assert answer(page).locator(".prose").inner_html() == "<p>Good day <strong>to you</strong></p>"
    expect(page.locator("#announcer")).to_have_text("Good day **to you**")
    expect(answer(page).locator(".stats")).to_have_text("3 tokens · 61 tokens/s")
    expect(page.locator("#meter-text")).to_have_text("20 % of 2,048 tokens")
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "hello"}]
    assert body["stream"] and body["model"] == "sft" and "seed" not in body and body["tools_shown"]


def test_the_whole_conversation_goes_to_the_server_with_the_tool_calls_as_parts(page, server):
    server.script["2+2?"] = [["It is ", Tool("python", ["2", "+2"]), Tool("python_output", ["4"]), "4."]]
    page.locator("#settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.keyboard.press("Escape")
    ask(page, "2+2?")
    assert answer(page).locator(".chip").text_content() == "calculator: 2+2 = 4"
    ask(page, "thanks")
    said = [("text", "It is "), ("python", "2+2"), ("python_output", "4"), ("text", "4.")]
    parts = [{"type": type_, "text": text} for type_, text in said]
    assert server.requests[1][1]["messages"] == [{"role": "system", "content": "Be brief."},
                                                 {"role": "user", "content": "2+2?"},
                                                 {"role": "assistant", "content": parts},
                                                 {"role": "user", "content": "thanks"}]


def test_the_calculator_shows_as_it_is_used(page, server):
    server.script["sum"] = [["The sum ", Tool("python", ["17*", "23"]), GATE, Tool("python_output", ["391"]),
                             " it is."]]
    ask(page, "sum", wait=False)
    expect(answer(page).locator(".chip .pending")).to_have_text("= …")
    server.gate.set()
    finished(page)
    assert answer(page).locator(".prose").text_content() == "The sum calculator: 17*23 = 391 it is."


def test_events_and_characters_cut_anywhere_arrive_whole(page, server):
    text = "né 日本 🙂"
    data = ("data: " + json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False)).encode()
    server.script["bytes"] = [[*[bytes([byte]) for byte in data], b"\r", b"\n\r\n", b": a comment\n\n",
                               b"data:" + data[6:] + b"\n\n"]]
    ask(page, "bytes")
    assert shown(page)[-1] == text + text


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_work_on_the_server_and_keeps_what_came(page, server, how):
    server.script["go on"] = [[FOREVER]]
    ask(page, "go on", wait=False)
    expect(answer(page).locator(".prose")).to_contain_text("on and on")
    if how == "button":
        picture(page, "streaming-light")
        button(page, "Stop (Esc)").click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    assert "on and on" in shown(page)[-1]
    expect(answer(page).locator(".stats")).to_have_text("stopped")
    for _ in range(200):
        if server.ended:
            break
        page.wait_for_timeout(20)
    assert server.ended == ["gone"]
    ask(page, "and now")  # it can go on
    assert shown(page)[-1] == "You said: and now"


def test_the_list_can_be_used_while_an_answer_streams(page, server):
    ask(page, "first")
    page.locator("#new").click()
    server.script["go on"] = [[FOREVER]]
    ask(page, "go on", wait=False)
    expect(answer(page).locator(".prose")).to_contain_text("on and on")
    row = page.locator(".conversation", has_text="first").locator(".open")
    row.hover()
    page.mouse.down()
    page.wait_for_timeout(100)  # a list that is made anew under the pointer would lose the click
    page.mouse.up()
    assert shown(page) == ["first", "You said: first"]
    page.locator(".conversation", has_text="go on").click()
    page.keyboard.press("Escape")
    finished(page)


def test_an_answer_goes_on_while_another_conversation_is_open(page, server):
    server.script["slow"] = [["It ", GATE, "took long"]]
    ask(page, "slow", wait=False)
    expect(answer(page).locator(".prose")).to_have_text("It")
    page.locator("#new").click()
    expect(page.locator(".conversation .running")).to_be_visible()
    ask(page, "quick")
    server.gate.set()
    expect(page.locator(".conversation .running")).to_have_count(0)
    page.locator(".conversation", has_text="slow").click()
    assert shown(page) == ["slow", "It took long"]


# ---- alternatives and branches

def test_regenerate_keeps_the_alternatives(page, server):
    server.script["tell"] = [["one"], ["two"], ["three"]]
    ask(page, "tell")
    for _ in range(2):
        button(answer(page), "Another answer").click()
        finished(page)
    assert shown(page) == ["tell", "three"]
    expect(answer(page).locator(".count")).to_have_text("3/3")
    button(answer(page), "Previous alternative").click()
    assert shown(page) == ["tell", "two"]
    expect(answer(page).locator(".count")).to_have_text("2/3")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Previous alternative"
    ask(page, "more")  # goes on from the second
    assert [message["content"] for message in server.requests[-1][1]["messages"]] == ["tell", "two", "more"]


def test_editing_makes_a_branch_and_the_earlier_one_stays_reachable(page, server):
    ask(page, "first")
    ask(page, "second")
    page.locator(".message.user").first.hover()
    button(page.locator(".message.user").first, "Edit").click()
    area = page.get_by_label("Edit your message")
    assert area.input_value() == "first"
    area.fill("third")
    picture(page, "editing-light")
    area.press("Escape")
    assert shown(page)[0] == "first"
    button(page.locator(".message.user").first, "Edit").click()
    page.get_by_label("Edit your message").fill("other")
    page.get_by_label("Edit your message").press("Enter")
    finished(page)
    assert shown(page) == ["other", "You said: other"]
    picture(page, "branches-light")
    button(page.locator(".message.user").first, "Previous alternative").click()
    assert shown(page) == ["first", "You said: first", "second", "You said: second"]
    assert [message["content"] for message in server.requests[-1][1]["messages"]] == ["other"]


# ---- markdown

EVIL = """<script>window.hit = 1</script> <img src=x onerror="window.hit = 2"> <svg onload="window.hit = 3"></svg>

[click](javascript:window.hit=4) [data](data:text/html,<script>window.hit=5</script>) <a \
href="javascript:window.hit=6">x</a>

![picture](https://example.org/spy.png) <iframe srcdoc="<script>parent.hit=7</script>"></iframe> <div \
style="position:fixed">over all</div>

```html" onmouseover="window.hit=8
<script>window.hit = 9</script>
```

<style>body { display: none }</style> <form action="https://example.org"><input autofocus \
onfocus="window.hit=10"></form>

| <b onclick="window.hit=11">cell</b> |
| --- |
| `<img src=x onerror=window.hit=12>` |

[fine](https://example.org/page "title") <https://example.org/auto>
"""


def test_markdown_from_a_model_can_do_nothing(page, server):
    elsewhere = []
    page.on("request", lambda request: None if request.url.startswith(server.url) else elsewhere.append(request.url))
    server.script["evil"] = [list(EVIL)]
    ask(page, "evil")
    prose = answer(page).locator(".prose")
    for link in prose.locator("a").all():
        assert link.get_attribute("href").startswith("https://example.org/")
        assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")
    assert prose.locator("a").all_inner_texts() == ["picture", "fine", "https://example.org/auto"]
    prose.get_by_text("click data").click()
    prose.get_by_role("columnheader").click()
    active = "script, img, iframe, form, input, style, [style], [onclick], [onload], [onmouseover]"
    assert prose.locator(active).count() == 0
    assert "<script>window.hit = 1</script>" in prose.inner_text()  # seen for what it is
    assert page.evaluate("window.hit") is None and elsewhere == []
    page.reload()  # from the browser's store, too
    ready(page)
    assert page.evaluate("window.hit") is None and page.locator(".prose a").count() == 3


def test_html_in_titles_and_messages_is_text(page, server):
    evil = "<img src=x onerror=window.hit=1>"
    ask(page, evil)
    assert shown(page)[0] == evil and page.locator(".conversation .title").inner_text() == evil
    assert page.evaluate("window.hit") is None and page.locator("img").count() == 0




def test_code_is_coloured_named_and_copied(window, server):
    page = window(permissions=["clipboard-read", "clipboard-write"])
    server.script["code"] = [RICH]
    ask(page, "code")
    code = answer(page).locator(".code")
    assert code.locator(".code-head span").first.inner_text() == "python" and code.locator(".hljs-keyword").count() >= 3
    button(code, "Copy code").click()
    expect(page.locator("#announcer")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == CODE
    button(answer(page).locator(".actions"), "Copy").click()
    expect(page.locator("#announcer")).to_have_text("Copied.")
    assert "[17*23 = 391]" in page.evaluate("navigator.clipboard.readText()")


def test_deep_nesting_and_broken_markdown_still_show(page, server):
    server.script["deep"] = [[">" * 4000 + " deep"], ["```python\nno end **of it"],
                             ["[a][b]\n\n", "text\n\n", "[b]: https://example.org/late"]]
    ask(page, "deep")
    assert "deep" in shown(page)[-1]
    ask(page, "deep")
    assert answer(page).locator(".code code").inner_text() == "no end **of it"
    ask(page, "deep")
    assert answer(page).locator("a").get_attribute("href") == "https://example.org/late"


# ---- when things go wrong

def test_a_server_that_dies_mid_answer_leaves_the_partial_answer_and_a_retry(page, server):
    server.script["go"] = [["Half of ", "an answer", GATE, DIE], ["All of it"]]
    ask(page, "go", wait=False)
    expect(answer(page).locator(".prose")).to_have_text("Half of an answer")
    server.gate.set()
    finished(page)
    assert shown(page) == ["go", "Half of an answer"]
    expect(answer(page).locator(".problem")).to_contain_text("broke")
    picture(page, "broken-light")
    button(answer(page), "Retry").click()
    finished(page)
    assert shown(page) == ["go", "All of it"]
    button(answer(page), "Previous alternative").click()
    assert shown(page) == ["go", "Half of an answer"]


def test_an_error_in_the_stream_is_shown_below_what_came(page, server):
    server.script["go"] = [["Half", Fails("The worker was out of memory.")], [Refused(500, "It broke.")]]
    ask(page, "go")
    assert shown(page) == ["go", "Half"]
    expect(answer(page).locator(".problem")).to_contain_text("The worker was out of memory.")
    button(answer(page), "Retry").click()
    expect(answer(page).locator(".problem")).to_contain_text("It broke.")
    expect(answer(page).locator(".count")).to_have_text("2/2")


def test_a_busy_server_counts_down_to_retry(page, server):
    server.script["go"] = [[Refused(429, "64 requests wait already.", headers={"Retry-After": "2"})], ["At last"]]
    ask(page, "go")
    expect(answer(page).locator(".problem")).to_contain_text("The server is busy.")
    retry = answer(page).locator(".problem button")
    assert re.fullmatch(r"Retry in [12] s", retry.inner_text()) and retry.is_disabled()
    picture(page, "busy-light")
    expect(retry).to_be_enabled()
    retry.click()
    finished(page)
    # nothing had come: no alternative
    assert shown(page) == ["go", "At last"] and page.locator(".alternatives").count() == 0


def test_a_key_is_asked_for_kept_and_sent(page, server):
    server.script["go"] = [[Refused(401, "The key is missing or wrong.", "invalid_api_key")], ["Welcome"]]
    ask(page, "go")
    picture(page, "key-light")
    key = page.get_by_label("This server asks for an API key.")
    key.fill("secret")
    key.press("Enter")
    finished(page)
    assert shown(page) == ["go", "Welcome"] and server.requests[-1][2]["Authorization"] == "Bearer secret"
    page.reload()
    ready(page)
    ask(page, "again")
    assert server.requests[-1][2]["Authorization"] == "Bearer secret"
    page.locator("#settings").click()
    button(page, "Forget the API key").click()
    page.keyboard.press("Escape")
    ask(page, "third")
    assert "Authorization" not in server.requests[-1][2]


def test_a_full_context_asks_before_the_oldest_turns_go(page, server):
    too_long = "The conversation is 2,100 tokens long, and the model reads 2,048."
    server.script["go"] = [[Refused(400, too_long, "context_length_exceeded")],
                           [Extra({"dropped_turns": 3}), "Still here"]]
    ask(page, "before")
    ask(page, "go")
    expect(answer(page).locator(".problem")).to_contain_text("This conversation no longer fits. " + too_long)
    assert server.requests[-1][1]["drop_oldest"] is False
    picture(page, "full-light")
    button(page, "Continue without the oldest turns").click()
    finished(page)
    assert server.requests[-1][1]["drop_oldest"] is True
    assert shown(page)[-1] == "Still here"
    expect(answer(page).locator(".note")).to_have_text(
        "To make room, the oldest 3 turns were left out of what the model read.")


def test_an_answer_cut_at_its_longest_says_so(page, server):
    server.script["long"] = [["word ", Finish("length")]]
    ask(page, "long")
    expect(answer(page).locator(".stats")).to_contain_text("cut at the longest answer")


def test_a_server_that_cannot_be_reached_is_said_and_tried_again(window, server):
    server.down = True
    page = window()
    expect(page.locator("#offline")).to_contain_text("The server is starting.")
    server.down = False
    button(page, "Retry").click()
    expect(page.locator("#offline")).to_be_hidden()
    assert page.locator("#model").input_value() == "sft"
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "hello")
    expect(answer(page).locator(".problem")).to_contain_text("The server cannot be reached.")
    page.unroute("**/v1/chat/completions")
    button(answer(page), "Retry").click()
    finished(page)
    assert shown(page) == ["hello", "You said: hello"]
