"""Whatever is sent, the server does not fail: requests made from its own OpenAPI description, valid ones and others."""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import server_helpers
from tests.server_helpers import Running

QUIET = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate],
         "suppress_health_check": list(HealthCheck)}


folder = server_helpers.folder


@pytest.fixture(scope="module")
def server(folder):
    with Running(folder, "--max-tokens=8", "--max-n=4", "--timeout=20") as server:
        yield server


def test_no_request_made_from_the_description_makes_it_fail(server):
    asked = set()
    for operation in schemathesis.openapi.from_url(server.url + "/openapi.json").get_all_operations():
        operation = operation.ok()

        @settings(max_examples=25, **QUIET)
        @given(operation.as_strategy())
        def none_fails(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 8)  # answers of a few tokens do here
            answer = case.call(timeout=60)
            asked.add((case.method, case.path, answer.status_code == 200))
            assert answer.status_code < 500, answer.text

        none_fails()
    assert asked >= {("POST", "/v1/completions", True), ("POST", "/v1/chat/completions", True),
                     ("GET", "/v1/models", True)}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
FIELDS = (
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "n", "stop",
    "seed", "logprobs", "top_logprobs", "echo", "stream", "stream_options", "drop_oldest", "tools", "response_format",
    "max_completion_tokens", "user",
)


@settings(max_examples=60, **QUIET)
@given(st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
       st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_no_value_of_a_known_field_makes_it_fail(server, path, fields):
    body = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "max_tokens": 2, **fields}
    if path == "/v1/completions":
        body.pop("messages", None)
    if isinstance(body["max_tokens"], int):
        body["max_tokens"] = min(body["max_tokens"], 8)
    answer = httpx.post(server.url + path, content=json.dumps(body), headers={"Content-Type": "application/json"},
                        timeout=60)
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_it_is_well_afterwards(server):
    assert httpx.get(server.url + "/health").json()["status"] == "ok"
    assert server.metrics()["nanochat_errors_total"] == 0 and server.metrics()["nanochat_restarts_total"] == 0
    assert "Traceback" not in "".join(server.lines)
