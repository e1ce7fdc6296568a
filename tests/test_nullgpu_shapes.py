"""On the null GPU: which attention runs for shapes that vary, and whether the allocator's segments grow everywhere."""

import importlib
import os
import random
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from nanochat import distributed
from nanochat.chat_data import SupervisedSteps
from nanochat.distributed import Ranks
from nanochat.engine import Engine, Row
from nanochat.evaluation.chat import evaluate_task
from nanochat.evaluation.core import score_questions
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import sdpa
from nanochat.ragged import round_length
from nanochat.rl import AnswerGroup, batches
from nanochat.server.scheduler import Scheduler
from nanochat.server.worker import ModelHost
from nanochat.tokenizer import RustBPETokenizer
from tasks.small_world import WorldChoice
from tests.test_ragged import Chats, Lengths, random_questions, serve_prompts

pytest.importorskip("tests.nullgpu")

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


def record_choices():
    """Return a set that fills with (backend, B, T, S, masked) of each call of PyTorch's attention."""
    met, real = set(), sdpa.F.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        choice = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal, enable_gqa=enable_gqa)
        met.add((BACKENDS[choice], q.shape[0], q.shape[2], k.shape[2], attn_mask is not None))
        return real(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    sdpa.F = SimpleNamespace(scaled_dot_product_attention=recorded)
    return met


def train_on(model, micro_batches):
    for inputs, targets, *factors in micro_batches:
        model(inputs, targets, "sum", factors=factors[0] if factors else None).backward()


def ragged_stages():
    """Run every ragged stage a little; return what attention met, by stage."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    met, ranks, rng = record_choices(), Ranks(0, 0, 1, torch.device("cuda", 0)), random.Random(0)
    tokenizer = RustBPETokenizer.train_from_iterator(["some words to make a few tokens of"] * 3, 300)
    V = tokenizer.get_vocab_size()
    with ranks.device:
        model = GPT(GPTConfig(sequence_len=512, vocab_size=V, n_layer=1, layer_pattern="A", n_head=4, n_kv_head=2,
                              n_embd=256))
    model.compute_dtype = torch.bfloat16
    found = {}

    def stage(name, run):
        met.clear()
        run()
        found[name] = sorted(met)

    def supervised():
        sizes = [rng.randrange(10, 700) for _ in range(64)]
        with SupervisedSteps(Lengths(), Chats(sizes), examples_per_step=16, device_batch_size=4, max_tokens=512,
                             ranks=ranks) as steps:
            for step in range(4):
                train_on(model, steps(step))

    def reinforced():
        prompt = [1] * 40
        rows = [Row(prompt, 256, tokens=[1] * n, mask=[1] * n) for n in rng.choices(range(5, 257), k=16)]
        train_on(model, batches([AnswerGroup(rows, [i % 2 for i in range(16)])], 8, 0, ranks.device))

    def rollouts():
        prompts = [[rng.randrange(V) for _ in range(rng.randrange(2, 300))] for _ in range(9)]
        Engine(model, tokenizer, graphs=False).generate_many(prompts, 3, max_tokens=4, batch_size=16)

    stage("sft", supervised)
    stage("rl", reinforced)
    with torch.no_grad():
        stage("rollouts", rollouts)
        stage("core", lambda: score_questions(model, random_questions(40, rng, V), 2048))
        stage("choices", lambda: evaluate_task(model, tokenizer, WorldChoice("test", size=20), ranks, batch_size=8))
        server = Scheduler(Engine(model, tokenizer, graphs=False), chunk=64, max_rows=4)
        stage("server", lambda: serve_prompts(server, V))
        stage("generate", lambda: list(model.generate(torch.ones(1, 9, dtype=torch.long), 4)))
    met.clear()  # last, what a compiled step asks for after all these: the choice is as PyTorch would make it
    sdpa.torch = SimpleNamespace(compiler=SimpleNamespace(is_compiling=lambda: True))
    q = torch.zeros(4, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    with suppress(RuntimeError):  # cuDNN itself is not there
        sdpa.sdpa(q, q, q, causal=True)
    return found, sorted(met)


def test_no_ragged_stage_runs_attention_that_is_planned(nullgpu):
    found, compiled = nullgpu.run(ragged_stages)
    assert compiled == [["cudnn", 4, 256, 256, False]]
    for stage, met in found.items():
        assert met, stage
        assert all(backend == ("efficient" if masked else "flash") for backend, *_, masked in met), (stage, met)
        if stage != "generate":  # one token a row, which grows with each step
            assert {T for _, _, T, _, _ in met if T > 1} <= {round_length(n) for n in range(513)}, (stage, met)
    assert len({tuple(shape) for shape in found["sft"]}) <= 8


SCRIPTS = ["scripts.base_train", "scripts.mid_train", "scripts.chat_sft", "scripts.chat_rl", "scripts.base_loss",
           "scripts.base_eval", "scripts.chat_eval", "scripts.chat_cli", "scripts.complete", "nanochat.llm",
           "nanochat.server.worker 0", "nanochat.server.worker 1"]


def allocator_settings():
    """Return for each script whether segments grow once it has chosen its GPU."""
    real, found = distributed.use_gpu, {}

    def use_gpu(device):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        real(device)
        torch.cuda.init()
        raise KeyboardInterrupt(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])

    distributed.use_gpu = use_gpu
    for name in SCRIPTS:
        module = importlib.import_module(name.split()[0])
        try:
            if name == "nanochat.llm":
                module.LLM("sft")
            elif name.startswith("nanochat.server"):
                module.use_gpu = use_gpu
                ModelHost(SimpleNamespace(device="cuda:1" if name.endswith("1") else "cuda"), None)
            else:
                module.main(["--prompt=a"] if name == "scripts.complete" else [])
        except KeyboardInterrupt as told:
            found[name] = told.args[0]
    return found


def test_the_segments_of_the_allocator_grow_in_every_script(nullgpu):
    assert not any(name.endswith("ALLOC_CONF") for name in os.environ)
    assert nullgpu.run(allocator_settings, count=2) == dict.fromkeys(SCRIPTS, True)
