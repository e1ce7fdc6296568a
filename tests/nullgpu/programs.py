"""Programs that several tests and the recorder run under the null GPU: training steps, decode steps."""

import gc
from collections import Counter
from typing import Any

import torch

from bench.peer import Endless
from nanochat.distributed import Ranks, compute_dtype
from nanochat.engine import Batch, Engine, Row
from nanochat.gpt import GPT, GPTConfig
from nanochat.loading import ready_to_decode
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import RECIPES, published
from nanochat.sampling import Settings
from nanochat.training import train_step
from tests.nullgpu.inside import Recorded, recorded

V, T = published.tokenizer.vocab_size, published.base.shape.max_seq_len


def new_model(depth: int, device: str = "cuda", **shape: Any) -> GPT:
    """Return a model of this depth on the device, which computes as a training script's does."""
    with torch.device(device):
        model = GPT(GPTConfig.from_depth(depth, **{"vocab_size": V, "sequence_len": T, **shape}))
    model.compute_dtype = compute_dtype(model.device)
    return model


def ranks_of(world_size: int) -> Ranks:
    """Return rank 0 of so many, by torch's fake process group where there are several: collectives do nothing."""
    if world_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # of another size
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return Ranks(0, 0, world_size, torch.device("cuda", 0))


def kernels(seen: Recorded) -> dict[str, int]:
    """Return how many kernels of each kind were started: cuBLAS products, Triton's, PyTorch's own."""
    counts = Counter("product" if event["event"] == "product" else event["how"] for event in seen.launches())
    return {"all": sum(counts.values()), **counts}


def training(depth: int, rows: int, ranks: int = 1, *, compiled: bool = True, steps: int = 3,
             groups: str = "published", **shape: Any) -> dict[str, Any]:
    """Train for a few steps, validate once in between, as a base run does, and return what was seen.

    Args:
        depth, shape: of the model
        rows: of T tokens, in one micro-batch
        ranks: of a job of so many
        compiled: whether the blocks are compiled
        groups: whose optimizer groups, by the recipe's name

    Returns:
        allocated, reserved: bytes of memory at the peak of all steps
        kept: bytes between steps: weights and optimizer state
        launches: kernels of the last step by kind. syncs, refused: calls of the last step that waited; refusals of all
        graphs, breaks: of torch.compile in all. recompiled: graphs that the last step compiled
    """
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    mine, model = ranks_of(ranks), new_model(depth, **shape)
    optimizer = MuonAdamW(parameter_groups(model, RECIPES[groups].groups), mine)
    if compiled:
        model.compile_blocks(rows, model.config.sequence_len)
    ids = torch.zeros(rows, model.config.sequence_len, dtype=torch.long, device=mine.device)
    torch.cuda.reset_peak_memory_stats()
    with recorded() as whole:
        for step in range(steps):
            graphs = counters["stats"]["unique_graphs"]
            with recorded() as seen:
                train_step(model, optimizer, [(ids, ids)], mine, clip=published.grad_clip)
            if step == 0:
                with torch.no_grad():
                    model(ids, ids, loss_reduction="none")
    kept = torch.cuda.memory_allocated()
    found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "kept": kept,
             "launches": kernels(seen), "syncs": [event["call"] for event in seen.syncs()],
             "refused": [event["why"] for event in whole.of("refused")], "graphs": counters["stats"]["unique_graphs"],
             "breaks": sum(counters["graph_break"].values()), "recompiled": counters["stats"]["unique_graphs"] - graphs}
    del model, optimizer, ids
    torch._dynamo.reset()
    gc.collect()  # a compiled block is part of a circle
    torch.cuda.empty_cache()
    return found


def decoding(depth: int, rows: list[int], steps: int, *, device: str = "cuda", ready: bool = True,
             **shape: Any) -> dict[str, Any]:
    """Decode some rows with the engine, greedy, then sampled with every setting, and return what was seen.

    Args:
        depth, shape: of the model
        rows: of each batch
        steps: decode steps of each batch
        device: of the model; it need not be the current one
        ready: whether the model is made ready to decode, as in serving; else it stays as in training

    Returns:
        captures: whether each graph capture succeeded, and how many nodes it has. refused: refusals
        syncs: calls that waited, of the last steps, a list for each batch and kind of sampling
        devices: that kernels were started on. replays: graphs of the last step of each
    """
    model = new_model(depth, device, **shape)
    model = ready_to_decode(model) if ready else model.eval()
    engine, found = Engine(model, Endless()), {"syncs": [], "replays": [], "launches": []}
    with recorded() as whole:
        for n in rows:
            for options in ({"temperature": 0.0}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9,
                                                   "repetition_penalty": 1.1}):
                batch = Batch(engine)
                batch.add_prompts([Row([1] * (7 + i), steps + 1, Settings(seed=i, **options), stops=())
                                   for i in range(n)])
                for _ in range(steps - 1):
                    batch.step()
                with recorded() as seen:
                    batch.step()
                found["syncs"].append([event["call"] for event in seen.syncs()])
                found["replays"].append([event["nodes"] for event in seen.of("replay")])
                found["launches"].append(len(seen.launches()))
                batch.remove(batch.rows)
    found["captures"] = [(event["ok"], event["nodes"]) for event in whole.of("capture_end")]
    found["refused"] = [event["why"] for event in whole.of("refused")]
    found["devices"] = whole.devices()
    found["captured"] = engine.static._can_capture
    return found
