"""nanochat/request.py: what a request gets where it says nothing, at each of the doors, and what it may ask."""

import inspect
import subprocess
import sys

import pytest

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.request import CHAT_CLI, COMPLETE_CLI, ENGINE, Settings, answer_reserve
from nanochat.server.serving import ServerConfig
from scripts import chat_cli, chat_web, complete
from tests.conftest import ROOT


def test_every_door_has_the_defaults_it_was_published_with():
    for method in (Engine.generate, Engine.complete):
        parameters = inspect.signature(method).parameters
        assert {name: parameters[name].default for name in ENGINE._fields} == {
            "max_tokens": None, "temperature": 1.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "seed": 42}
    cli, text, web = chat_cli.Config(), complete.Config(), chat_web.Config()
    assert (cli.max_tokens, cli.temperature, cli.top_k) == (512, 0.6, 50) == CHAT_CLI[:3]
    assert (text.max_tokens, text.temperature, text.top_k, text.seed) == (128, 0.0, 50, 42) == (*COMPLETE_CLI[:3], 42)
    assert (web.max_tokens, web.temperature, web.top_k) == (512, 0.8, 50)
    server = ServerConfig()
    for name in ("max_tokens", "temperature", "top_k", "max_n", "max_chars", "max_body_bytes", "timeout"):
        assert getattr(server, name) == getattr(web, name)


def test_a_flag_of_the_server_is_the_default_of_both_endpoints_but_for_the_length_of_completions():
    config = ServerConfig(temperature=0.3, top_k=7, max_tokens=99)
    assert config.chat_defaults[:3] == (99, 0.3, 7)
    assert config.completion_defaults == config.chat_defaults._replace(max_tokens=16)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
                                   {"top_p": 1.1}, {"repetition_penalty": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused_by_name(wrong):
    [name] = wrong
    with pytest.raises(UserError, match=f"^{name} must be"):
        Settings(**wrong)


def test_each_sample_of_a_seed_has_random_numbers_of_its_own():
    first, again, other = (Settings(seed=3, sample=sample).random().random() for sample in (0, 0, 1))
    assert first == again != other


def test_an_answer_reserves_no_more_than_a_quarter_of_the_context():
    assert [answer_reserve(max_tokens, 128) for max_tokens in (5, 32, 999)] == [5, 32, 32]


def test_the_http_process_does_without_pytorch():
    code = "import sys, nanochat.server.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
