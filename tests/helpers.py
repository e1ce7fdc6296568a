"""Small models for tests, with every weight away from zero so that nothing is silent."""

import importlib
import itertools
import os
import socket

import torch

from nanochat.gpt import GPT, GPTConfig

_ports = itertools.count()


def free_port() -> int:
    """Return a port that nobody listens on, for a process that is started next.

    Each worker of pytest-xdist has a range of its own, below those that systems give out by themselves: a port that
    the system chose and that was closed again could be another process's a moment later.
    """
    first = 10_000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in itertools.islice(_ports, 500):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + number % 500))
            except OSError:
                continue
            return first + number % 500
    raise RuntimeError(f"no port is free from {first} to {first + 499}")


def small_model(seed: int = 0, **given) -> GPT:
    """A GPT of a few thousand weights, all random and strong; fields of its config as given."""
    torch.manual_seed(seed)
    small = {"sequence_len": 32, "vocab_size": 97, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    config = GPTConfig(**{**small, **given})
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1.0 if "wte" in name or "conv1d" in name else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def small_text_and_tokenizer() -> None:
    """Write 600 documents of the small world and train a tokenizer of 400 tokens on them, in $NANOCHAT_BASE_DIR."""
    module_of("nanochat.dataset").main(["small-world", "--docs=600"])
    module_of("scripts.tok_train").main(["--vocab-size=400"])


def module_of(command: str):
    """Return the module that `python -m command` runs."""
    module = importlib.import_module(command)
    return importlib.import_module(f"{command}.__main__") if hasattr(module, "__path__") else module
