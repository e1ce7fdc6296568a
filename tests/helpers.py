"""Small models for tests, with every weight away from zero so that nothing is silent."""

import importlib
import itertools
import os
import socket
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import Recipe, small

_ports = itertools.count()

# Shapes that together have all optional parts of a model: those of nanochat, and two with what is left.
PARTS = {
    "modern": {"lambdas": True, "backout": True, "value_embeds": "A", "qk_gain": 1.2, "rope_base": 100_000.0,
               "slc_norm": True, "mlp_ratio": 4.5, "embed_init": 0.8, "head_init": 0.001, "fc_init": 0.4,
               "slc_gate_init": "unit"},
    "convolved": {"lambdas": True, "smear": True, "value_embeds": "SA", "attn_conv": 3, "slc_gate": "full",
                  "rope_base": 0.0},
    "ungated": {"backout": True, "smear": True, "value_embeds": "S", "attn_conv": 1, "slc_gate": "none",
                "slc_norm": True},
}


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


def tiny_profile() -> Recipe:
    """Return the recipe `small`, so small that all its stages take seconds."""
    few = {"num_iterations": 2, "eval_every": -1}
    base = replace(small.base, shape=replace(small.base.shape, depth=2, max_seq_len=128), total_batch_size=512,
                   horizon=replace(small.base.horizon, num_iterations=3), eval_tokens=1000)
    return replace(
        small, docs=600, tokenizer=replace(small.tokenizer, vocab_size=300), base=base,
        base_eval=replace(small.base_eval, split_tokens=1000), identity=replace(small.identity, count=20),
        mid=replace(small.mid, **few, total_batch_size=512, eval_tokens=1000),
        sft=replace(small.sft, **few, target_examples_per_step=4, eval_steps=1),
        rl=replace(small.rl, **few, examples_per_step=1, num_samples=2, max_new_tokens=4, eval_examples=2,
                   eval_samples=1),
        chat_eval=replace(small.chat_eval, max_problems=2, max_new_tokens=4))


def running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody waits for does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")


def gone(pids: list[int], seconds: float = 30) -> bool:
    """Whether all of these end within some seconds."""
    limit = time.monotonic() + seconds
    while still := [pid for pid in pids if running(pid)]:
        if time.monotonic() > limit:
            return not still
        time.sleep(0.05)
    return True


def _run_triton(operation: str, name: str, *args):
    return getattr(importlib.import_module(f"nanochat.kernels.{operation}.triton"), name)(*args)


def forms_of(operation):
    """Return a fixture: by name, "forward" or "backward", the Triton kernel of an operation's package in the
    interpreter and the plain PyTorch that defines it, one after the other."""
    @pytest.fixture(params=["triton", "plain"])
    def kernel(request):
        if request.param == "plain":
            return lambda name, *args: getattr(operation, f"{name}_pytorch")(*args)
        pool, package = request.getfixturevalue("interpreter"), operation.__name__.rsplit(".", 1)[1]
        return lambda name, *args: pool.submit(_run_triton, package, name, *args).result()
    return kernel
