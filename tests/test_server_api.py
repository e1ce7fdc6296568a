"""The HTTP side as OpenAI's own client sees it: shapes, text, log-probabilities, seeds, and what is refused."""

import json

import httpx
import openai
import pytest
import torch

from nanochat.loading import load_for_decoding
from tests import server_helpers
from tests.server_helpers import CONTEXT, Running

folder = server_helpers.folder


@pytest.fixture(scope="module")
def server(folder):
    server = Running(folder, f"--log-chats={folder}/chats.jsonl")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def loaded(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        return load_for_decoding("sft", "cpu")[:2]


def ask(text="the cat sat", *more):
    return [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate((text, *more))]


def post(server, path, body, **headers):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json", **headers},
                      timeout=60)


# ---- answers

def test_an_answer_at_once_has_openais_shape(client):
    answer = client.chat.completions.create(model="sft", messages=ask(), max_tokens=9, seed=1)
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "sft"
    assert choice.index == 0 and choice.finish_reason == "length" and choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage.completion_tokens == 9 and answer.usage.total_tokens == answer.usage.prompt_tokens + 9


def test_a_streamed_answer_is_the_one_at_once_in_openais_chunks(client):
    given = dict(model="sft", messages=ask(), max_tokens=20, seed=3)
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    *others, last, usage = chunks
    assert others[0].choices[0].delta.role == "assistant" and others[0].choices[0].delta.content is None
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert all(chunk.choices[0].delta.role is None for chunk in others[1:])
    assert all(c.choices[0].finish_reason is None for c in others)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in others) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])
    assert last.nanochat["timings"]["context_length"] == CONTEXT["sft"]
    assert last.nanochat["timings"]["completion_tokens"] == 20
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**given, stream=True))


def test_a_stream_ends_with_done_and_its_usage_is_null_before(server):
    body = {"messages": ask(), "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in post(server, "/v1/chat/completions", body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert "usage" not in post(server, "/v1/chat/completions", {**body, "stream_options": {}}).text


def test_a_seed_gives_the_same_answers_and_n_of_them_differ(client):
    def texts(seed, n=3):
        answer = client.chat.completions.create(model="sft", messages=ask(), max_tokens=12, n=n, seed=seed)
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content for choice in answer.choices]

    first = texts(7)
    assert texts(7) == first and len(set(first)) == 3 and texts(7, 1) == first[:1] and texts(-8) != first
    assert texts(None) != texts(None)
    chunks = list(client.chat.completions.create(model="sft", messages=ask(), max_tokens=12, n=3, seed=7, stream=True))
    streamed = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(3)]
    assert streamed == first
    assert sum(bool(chunk.model_extra.get("nanochat")) for chunk in chunks) == 1  # the timings, once


def test_a_stop_string_ends_the_answer_before_it_also_across_tokens(client):
    given = dict(model="sft", messages=ask(), max_tokens=60, seed=5)
    text = client.chat.completions.create(**given).choices[0].message.content
    for at, length in ((9, 1), (11, 3), (14, 9)):
        stop = text[at:at + length]
        for stops in (stop, [stop, "never there"]):
            answer = client.chat.completions.create(**given, stop=stops)
            assert answer.choices[0].message.content == text[:text.index(stop)]
            assert answer.choices[0].finish_reason == "stop"
        chunks = list(client.chat.completions.create(**given, stop=[stop], stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[:text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_a_plain_forward(client, loaded):
    model, tokenizer = loaded
    answer = client.chat.completions.create(model="sft", messages=ask(), max_tokens=6, temperature=0, logprobs=True,
                                            top_logprobs=3)
    told = answer.choices[0].logprobs.content
    ids = tokenizer.render_for_completion({"messages": ask()})
    assert len(told) == 6
    for entry in told:
        logp = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        top = logp.topk(3)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        most_likely = [tokenizer.decode_bytes([id]) for id in top.indices.tolist()]
        assert [bytes(other.bytes) for other in entry.top_logprobs] == most_likely
        assert entry.logprob == pytest.approx(float(logp.max()), abs=1e-4)
        ids.append(int(logp.argmax()))
    streamed = client.chat.completions.create(model="sft", messages=ask(), max_tokens=6, temperature=0, logprobs=True,
                                              top_logprobs=3, stream=True)
    logprobs = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry for given in logprobs if given for entry in given.content] == told


def test_completions_echo_a_prompt_and_score_it(client, loaded):
    model, tokenizer = loaded
    text = "the cat né"
    for echo_tokens in (0, 2):
        [choice] = client.completions.create(model="sft", prompt=text, max_tokens=echo_tokens, echo=True, logprobs=2,
                                             temperature=0).choices
        assert choice.text.startswith(text) and choice.finish_reason == "length"
        ids = tokenizer.encode(text, prepend="<|bos|>")
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        scores = [float(logp[i, id]) for i, id in enumerate(ids[1:])]
        told = choice.logprobs
        assert len(told.tokens) == len(ids) - 1 + echo_tokens == len(told.text_offset) == len(told.top_logprobs)
        assert told.token_logprobs[:len(scores)] == pytest.approx(scores, abs=1e-4)
        for i, entry in enumerate(told.top_logprobs[:len(scores)]):
            assert max(entry.values()) == pytest.approx(float(logp[i].max()), abs=1e-4) and 2 <= len(entry) <= 3
        whole = [(token, start) for token, start in zip(told.tokens, told.text_offset)
                 if not token.startswith("bytes:")]
        assert len(whole) >= 2 and all(choice.text[start:].startswith(token) for token, start in whole)
    ids = tokenizer.encode(text)
    [choice] = client.completions.create(model="sft", prompt=ids, max_tokens=1, echo=True, logprobs=1).choices
    assert choice.logprobs.token_logprobs[0] is None and len(choice.logprobs.tokens) == len(ids) + 1
    assert choice.text.startswith(text)


def test_prompts_can_be_texts_or_token_ids_one_or_many(client, loaded):
    tokenizer = loaded[1]
    texts = ["the cat", "2+2 ="]
    ids = [tokenizer.encode(text, prepend="<|bos|>") for text in texts]

    def complete(prompt, n=1, **more):
        answer = client.completions.create(model="sft", prompt=prompt, max_tokens=8, seed=2, n=n, **more)
        return [choice.text for choice in answer.choices], answer.usage.prompt_tokens

    one, both = complete(texts[0]), complete(texts, 2)
    assert complete(ids[0]) == one and complete(ids, 2) == both and both[1] == sum(map(len, ids))
    assert both[0][:2] == complete(texts[0], 2)[0] and both[0][2:] == complete(texts[1], 2)[0]
    assert complete([texts[0]]) == one
    chunks = list(client.completions.create(model="sft", prompt=texts, max_tokens=8, seed=2, n=2, stream=True,
                                            echo=True))
    streamed = ["".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == i) for i in range(4)]
    assert streamed == [texts[i // 2] + text for i, text in enumerate(both[0])]


def test_other_settings_reach_the_sampler(client):
    def text(**more):
        extra = {name: more.pop(name) for name in ("top_k", "repetition_penalty") if name in more}
        answer = client.chat.completions.create(model="sft", messages=ask(), max_tokens=30, seed=1, extra_body=extra,
                                                **more)
        return answer.choices[0].message.content
    greedy = text(temperature=0)
    assert text(top_k=1) == greedy and text(temperature=0, repetition_penalty=50.0) != greedy
    assert all(text(top_p=tiny) == greedy == text(temperature=tiny) for tiny in (1e-6, 1e-40, 5e-324))
    assert text(temperature=2.0, top_k=0) != text(temperature=2.0, top_k=2)


def test_the_list_of_models_and_the_docs(client, server):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"sft", "base"} and models["sft"].default and not models["base"].chat and models["sft"].chat
    assert models["base"].context_length == CONTEXT["base"] and models["sft"].step == 5 and models["sft"].created > 0
    assert models["sft"].defaults == {"temperature": 0.8, "top_k": 5, "max_tokens": 512}  # what the page begins with
    assert "messages" in httpx.get(server.url + "/docs").text
    described = httpx.get(server.url + "/openapi.json").json()
    responses = described["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"400", "401", "404", "429", "500", "503"} <= set(responses)
    assert httpx.get(server.url + "/health").json()["status"] == "ok"
    page = httpx.get(server.url + "/")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(server.url + "/static/app.js").status_code == 200
    for path in ("/static/../app.py", "/static/%2e%2e/app.py"):
        assert httpx.get(server.url + path).status_code == 404


def test_both_models_answer_each_as_asked(client):
    answers = [client.chat.completions.create(model=name, messages=ask(), max_tokens=4, temperature=0)
               for name in ("base", "sft")]
    assert [answer.model for answer in answers] == ["base", "sft"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'.*sft, base"):
        client.chat.completions.create(model="gpt-4", messages=ask())


def test_chats_are_logged_where_that_was_asked_for(client, folder):
    answer = client.chat.completions.create(model="sft", messages=ask("log this"), max_tokens=4, seed=1)
    records = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    [record] = [record for record in records if record.get("messages") == ask("log this")]
    assert record["answers"] == [[{"type": "text", "text": answer.choices[0].message.content}]]
    assert record["finish"] == ["length"]


# ---- the context

def test_a_conversation_that_does_not_fit_is_refused_or_loses_its_oldest_turns(client, server):
    long = ask("the first thing " * 5, "an answer", "the second " * 5, "an answer", "and the last")
    with pytest.raises(openai.BadRequestError, match=r"is \d+ tokens long; the context of sft is 128 tokens") as error:
        client.chat.completions.create(model="sft", messages=long)
    assert error.value.code == "context_length_exceeded"
    body = {"messages": long, "drop_oldest": True, "max_tokens": 5, "seed": 1, "stream": True}
    lines = post(server, "/v1/chat/completions", body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert chunks[0]["nanochat"] == {"dropped_turns": 1}
    assert all("dropped_turns" not in c.get("nanochat", {}) for c in chunks[1:])
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    whole = client.chat.completions.create(model="sft", messages=long[2:], max_tokens=5, seed=1)
    assert streamed == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="128"):
        client.chat.completions.create(model="sft", messages=ask("far too long " * 40),
                                       extra_body={"drop_oldest": True})


def test_the_answer_is_cut_to_what_fits(client):
    answer = client.chat.completions.create(model="sft", messages=ask(), max_tokens=128, seed=1)
    assert answer.usage.total_tokens == 128 and answer.choices[0].finish_reason == "length"
    assert answer.nanochat["timings"]["context_used"] == 128


def test_a_second_turn_computes_only_what_is_new(client):
    messages = ask("something long enough to be kept " * 3)
    client.chat.completions.create(model="base", messages=messages, max_tokens=4, seed=1)
    answer = client.chat.completions.create(model="base",
                                            messages=[*messages, {"role": "assistant", "content": "so"}, *ask("on")],
                                            max_tokens=4, seed=1)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 64


def test_messages_in_parts_are_the_text_they_hold(client):
    def text(messages):
        answer = client.chat.completions.create(model="sft", messages=messages, max_tokens=8, seed=1)
        return answer.choices[0].message.content

    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}]
    assert text([{"role": "user", "content": parts}]) == text(ask("the cat sat"))
    system = [{"role": "developer", "content": "the mat"}, *ask("the cat", "on")]
    as_system = [{**system[0], "role": "system"}, *system[1:], *ask("x")]
    assert text([*system, {"role": "user", "content": "x"}]) == text(as_system)
    call = [{"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"}]
    assert text([*ask("the cat", call), *ask("x")]) != text([*ask("the cat", "2+2 4"), *ask("x")])


# ---- what is refused

BAD = [
    ("[]", "JSON object"), ("{", "not valid JSON"), ("nan", "not valid JSON"), ('{"messages": []}', "messages"),
    ("{}", "messages"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    ('{"messages": [{"role": "user"}]}', "messages.0.content"),
    ("[" * 100_000, "JSON"), ('{"a":' * 50_000 + "1" + "}" * 50_000, "JSON"), ('{"messages": ' + "9" * 5000 + "}", ""),
    (b"\xff\xfe{", "JSON"),
    *((json.dumps({"messages": messages}), match) for messages, match in (
        ([{"role": "assistant", "content": "x"}], "role 'assistant' where 'user'|must be the user's"),
        (ask("a", "b"), "last message must be the user's"), ([*ask("a"), *ask("b")], "take turns"),
        ([{"role": "system", "content": "x"}], "last message"), ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "text alone"), ("x", "messages"),
        ({}, "messages"))),
    *((json.dumps({"messages": ask(), **more}), match) for more, match in (
        ({"temperature": float("nan")}, "temperature"), ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"n": 0}, "n:"),
        ({"n": 99}, "limit of a request is 32"), ({"n": 1.5}, "n:"), ({"max_tokens": 0}, "from 1 to .* 128"),
        ({"max_tokens": 999}, "from 1 to .* 128"), ({"max_tokens": 10 ** 30}, "max_tokens"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stop": ""}, "1 to 256"), ({"stop": 5}, "stop"), ({"top_logprobs": 3}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logprobs": 1}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools: this server does not support"), ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"), ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 10 ** 40}, "seed"), ({"stream": "yes"}, "stream"), ({"model": 5}, "model"),
        ({"repetition_penalty": 0}, "repetition"), ({"messages": ask("x" * 200_001)}, "the limit is 200,000"))),
]


@pytest.mark.parametrize("body, match", BAD, ids=range(len(BAD)))
def test_a_bad_chat_request_gets_400_that_says_why(server, body, match):
    response = post(server, "/v1/chat/completions", body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert pytest.importorskip("re").search(match, error["message"]), error


@pytest.mark.parametrize("body, match", [
    ({"prompt": []}, "empty"), ({"prompt": [[]]}, "empty"), ({"prompt": [1, -1]}, "no token -1"),
    ({"prompt": [10 ** 30]}, "no token 1000"),
    ({"prompt": [290]}, "ids are 0 to 289"), ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1] * 128}, "128 tokens long"),
    ({"prompt": ["a"] * 33}, "33 prompts"), ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of"), ({"prompt": "a", "max_tokens": 0}, "from 1"),
    ({"prompt": "a b " * 100}, "tokens long"),
])
def test_a_bad_completion_request_gets_400_that_says_why(server, body, match):
    response = post(server, "/v1/completions", body)
    assert response.status_code == 400 and match in response.json()["error"]["message"], response.text


def test_what_changes_nothing_is_accepted(client, server):
    given = dict(user="me", metadata={"a": "b"}, store=False, frequency_penalty=0, presence_penalty=0,
                 response_format={"type": "text"},
                 tool_choice="none", logit_bias={}, max_completion_tokens=3, parallel_tool_calls=True)
    assert client.chat.completions.create(model="sft", messages=ask(), **given).usage.completion_tokens == 3
    assert post(server, "/v1/completions",
                {"max_tokens": 2, "best_of": 1, "unknown": {"x": [1]}, "temperature": None}).status_code == 200


def test_only_json_gets_in_and_only_by_the_names_of_this_machine(server):
    body = json.dumps({"messages": ask(), "max_tokens": 2})
    # what any page may send
    assert post(server, "/v1/chat/completions", body, **{"Content-Type": "text/plain"}).status_code == 400
    port = server.url.rsplit(":", 1)[1]
    for host, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200), ("evil.example", 403),
                         ("", 403), (f"evil.example:{port}", 403), ("127.0.0.1.evil.example", 403), ("[::1", 403)):
        assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == status, host
    answer = httpx.options(server.url + "/v1/models",
                           headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"})
    assert "access-control-allow-origin" not in answer.headers and answer.status_code == 405
    assert post(server, "/v1/nothing", {}).status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405
