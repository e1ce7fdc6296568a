"""Speed of prefill and of greedy decoding with a KV cache, beside the published engine and full forwards of the twin.

    python -m bench.decode --depth=4 --vocab-size=2048 --prompt=128 --new-tokens=64 --batches=1,64
    python -m bench.decode --depth=12 --vocab-size=65536 --batches=1     # the shape of the goals for CPUs
    python -m bench.decode --peer=../another-checkout                    # times the decoding of that checkout too

Our model decodes through the engine, with everything the engine does between two tokens, and so does the published
engine (bench/published_engine.py, float32). They are interleaved, some decode steps each, so that other load on the
machine affects all alike. The naive way has no cache and runs a full forward for every token. It is correct and slow,
and is timed at some lengths between those of the prompt and of the whole text, since its cost grows. Before anything is
timed, the greedy tokens of our engine are compared with those of full forwards. "of the limit" is the bytes that a step
has to read (weights, and the cache in use) over the measured copy bandwidth, as a part of the time of the step.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from bench import peer, published_engine
from bench.measure import (
    command_line,
    copy_bandwidth,
    json_flag,
    median,
    nbytes,
    provenance,
    provenance_line,
    random_model,
    seconds_of,
    si,
    table,
    write_results,
)
from bench.peer import Endless
from bench.twin import TwinGPT
from nanochat.cache import Cache
from nanochat.cli import COUNT, DEPTH, Range, flag, parse, run_main
from nanochat.distributed import close_ranks, compute_dtype, init_ranks
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loading import ready_to_decode

STEPS_A_TURN = 8  # decode steps of one case before those of the next case
PUBLISHED = "published engine, float32"


@dataclass
class Config:
    """Flags of bench.decode."""

    depth: int = flag(4, "layers; also sets the width", within=DEPTH)
    vocab_size: int = flag(2048, "tokens in the vocabulary", within=Range(1, 1 << 24))
    prompt: int = flag(128, "tokens of the prompt", within=COUNT)
    new_tokens: int = flag(64, "tokens to generate for each sequence", within=COUNT)
    batches: str = flag("1,64", "batch sizes, separated by commas; one measurement each")
    naive_points: int = flag(3, "lengths at which a full forward is timed", within=COUNT)
    prefills: int = flag(3, "timed prefills; the median is reported", within=COUNT)
    peer: str = flag("", "another checkout with a nanochat.gpt, whose decoding is timed too")
    threads: int = flag(0, "CPU threads; 0 is the default of torch", within=Range(0, 4096))
    device: str = flag("", "cuda, mps or cpu; unset takes the best available")
    json: str = json_flag()


@torch.inference_mode()
def prefill_seconds(model: GPT, B: int, T: int, times: int = 3) -> list[float]:
    """Seconds of each prefill of B prompts of T random tokens into a fresh cache, up to the last token's logits."""
    ids = torch.randint(model.config.vocab_size, (B, T), device=model.device)

    def once() -> None:
        model(ids, cache=model.new_cache(B, T), last_only=True)
    once()
    return [seconds_of(once, model.device) for _ in range(times)]


def decoding(model: GPT | TwinGPT, B: int, prompt: int, new: int, graphs: bool | None = None) -> Iterator[float]:
    """Decode greedily; yield the seconds of each decode step, from one token of each sequence on the host to the next.

    The first four steps, which allocate memory, are left out.

    Args:
        model: a GPT decodes through our engine, a TwinGPT through the published one.
        B: sequences, all with the same prompt.
        prompt: tokens of the prompt.
        new: timed steps.
        graphs: of Engine.
    """
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    generate = (Engine(model, Endless(), graphs=graphs).generate if isinstance(model, GPT)
                else partial(published_engine.generate, model))
    columns = generate(ids, num_samples=B, max_tokens=new + 4, temperature=0)
    for _ in range(4):
        next(columns)
    while True:
        start = time.perf_counter()
        if next(columns, None) is None:
            return
        yield time.perf_counter() - start


def decode_seconds(model: GPT | TwinGPT, B: int, prompt: int, new: int, graphs: bool | None = None) -> list[float]:
    """Seconds of each decode step of B sequences."""
    return list(decoding(model, B, prompt, new, graphs))


def decode_in_turns(models: dict[str, GPT | TwinGPT], B: int, prompt: int, new: int) -> dict[str, list[float]]:
    """Seconds of each decode step of B sequences for each model, interleaved: STEPS_A_TURN steps of each at a time."""
    running = {name: decoding(model, B, prompt, new) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(-(-new // STEPS_A_TURN)):
        for name, steps in running.items():
            seconds[name] += islice(steps, STEPS_A_TURN)
    return seconds


@torch.inference_mode()
def naive_seconds(twin: TwinGPT, B: int, prompt: int, new: int, points: int) -> list[float]:
    """Seconds of one token by a full forward of the twin, at `points` lengths spread evenly over the generation."""
    device, seconds = twin.lm_head.weight.device, []
    for i in range(points):
        length = prompt + round((i + 0.5) * (new - 1) / points)
        ids = torch.randint(twin.config.vocab_size, (B, length), device=device)
        twin(ids)
        seconds.append(seconds_of(lambda ids=ids: twin(ids)[:, -1].argmax(-1).tolist(), device))
    return seconds


def agreement(model: GPT, twin: TwinGPT, prompt: int, new: int) -> int:
    """How many greedy tokens of the engine, from the first on, are also those of full forwards of the twin.

    A token counts where its logit is within 1e-3 of the largest one.
    """
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    ours = Engine(model, Endless()).generate_batch(ids, max_tokens=new, temperature=0)[0][0][prompt:]
    with torch.inference_mode():
        for i, token in enumerate(ours):
            logits = twin(torch.tensor([ids + ours[:i]], device=model.device))[0, -1]
            if logits[token] < logits.max() - 1e-3:
                return i
    return new


def step_bytes(model: GPT, B: int, context: int) -> int:
    """Bytes that a decode step must read: the weights, of the embedding only B rows; the cache of `context` tokens."""
    embedding = model.transformer.wte.weight
    weights = nbytes([*model.parameters(), *model.buffers()]) - nbytes([embedding])
    return weights + B * model.config.n_embd * embedding.element_size() + cache_bytes(model, B, context)


def cache_bytes(model: GPT, B: int, context: int) -> int:
    """Bytes of the cache of B sequences of `context` tokens."""
    mixers = [block.attn for block in model.transformer.h]
    return Cache(mixers, B, context, device="meta", dtype=model.dtype).nbytes()


def in_dtype(shape: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model for decoding: weights, activations and cache in dtype."""
    return random_model(shape, device).to(dtype).eval()


def measure(model: GPT, config: Config, B: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    """More numbers of one of our models at batch size B, whose decode step takes `seconds`."""
    prefill = median(prefill_seconds(model, B, config.prompt, config.prefills))
    middle = config.prompt + config.new_tokens // 2
    return {"prefill_tokens_per_second": B * config.prompt / prefill, "step_bytes": step_bytes(model, B, middle),
            "cache_bytes": cache_bytes(model, B, config.prompt + config.new_tokens),
            "of_the_limit": step_bytes(model, B, middle) / bandwidth / seconds}


def models_of(shape: GPTConfig, exact: GPT, device: torch.device, dtype: torch.dtype) -> dict[str, GPT]:
    """Our models by their name in the table; `exact` is the float32 one."""
    attention = GPTConfig(**{**shape.to_dict(), "layer_pattern": "A" * shape.n_layer})
    name = str(dtype).removeprefix("torch.")
    models = {"ours, float32": exact}
    if dtype != torch.float32:
        models = {"ours, bfloat16": ready_to_decode(random_model(shape, device)), **models}
    if device.type == "cpu":  # on other devices it is correct, and slow
        models = {"ours, int8": ready_to_decode(random_model(shape, device), "int8"), **models}
    return {**models, f"ours all-attention, {name}": ready_to_decode(random_model(attention, device))}


def compare(shape: GPTConfig, config: Config, batches: list[int], device: torch.device) -> dict[str, Any]:
    """Measure all cases at all batch sizes; return the numbers for `write_results`."""
    exact = in_dtype(shape, device, torch.float32)
    twin = TwinGPT(shape).to(device).eval()
    twin.load_state_dict(exact.state_dict())
    compared, bandwidth, rows = min(16, config.new_tokens), copy_bandwidth(device), []
    agreed = agreement(exact, twin, config.prompt, compared)
    models = models_of(shape, exact, device, compute_dtype(device, training=False))
    for B in batches:
        naive = naive_seconds(twin, B, config.prompt, config.new_tokens, config.naive_points)
        naive_speed = B / (sum(naive) / len(naive))
        steps = decode_in_turns({PUBLISHED: twin, **models}, B, config.prompt, config.new_tokens)
        seconds = {name: median(times) for name, times in steps.items()}
        for name in (*models, PUBLISHED):
            speed = B / seconds[name]
            more = measure(models[name], config, B, seconds[name], bandwidth) if name in models else {}
            rows.append({"case": name, "batch": B, "tokens_per_second": speed,
                         "vs_published": seconds[PUBLISHED] / seconds[name], "vs_naive": speed / naive_speed, **more,
                         "seconds": steps[name]})
        rows.append({"case": "twin, float32, full forwards", "batch": B, "tokens_per_second": naive_speed,
                     "vs_published": naive_speed * seconds[PUBLISHED] / B, "vs_naive": 1.0, "seconds": naive})
        if config.peer:
            rows += peer_rows(shape, config, B, device, seconds[PUBLISHED], naive_speed)
    return {"rows": rows, "copy_bandwidth": bandwidth, "agreed": agreed, "compared": compared}


def peer_rows(shape: GPTConfig, config: Config, B: int, device: torch.device, published: float, naive_speed: float
              ) -> list[dict[str, Any]]:
    """Time the decoding of another checkout, in a process of its own.

    published: seconds of a decode step of the published engine. naive_speed: tokens a second of full forwards.
    """
    rows = []
    for found in peer.run_peer(config.peer, "generate", shape, B, config.prompt, steps=config.new_tokens, warmup=3,
                               device=device.type):
        row = {"case": f"peer {found['peer']}, {found['how']}", "batch": B, **found}
        if seconds := found.get("seconds"):
            speed = B / median(seconds)
            row |= {"tokens_per_second": speed, "vs_published": speed * published / B, "vs_naive": speed / naive_speed}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for a mistake of the user, and where the tokens differ."""
    config = parse(Config, argv, __doc__)
    try:
        batches = [int(part) for part in config.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches is numbers separated by commas, such as 1,64; not {config.batches!r}") from None
    if min(batches) < 1 or min(config.prompt, config.new_tokens, config.naive_points, config.prefills) < 1:
        raise UserError("--batches, --prompt, --new-tokens, --naive-points and --prefills must be at least 1")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    longest = config.prompt + config.new_tokens + 8
    shape = GPTConfig.from_depth(config.depth, sequence_len=longest, vocab_size=config.vocab_size)
    ranks = init_ranks(config.device)
    try:
        about = provenance(command_line("bench.decode", argv))
        found = compare(shape, config, batches, ranks.device)
    finally:
        close_ranks()
    lines = [[row["case"], row["batch"], si(row.get("tokens_per_second")),
              f"{row['vs_published']:.2f}×" if "vs_published" in row else "-",
              f"{row['vs_naive']:.1f}×" if "vs_naive" in row else "-", si(row.get("prefill_tokens_per_second")),
              si(row["cache_bytes"]) + "B" if "cache_bytes" in row else "-",
              f"{100 * row['of_the_limit']:.0f}%" if "of_the_limit" in row else "-"] for row in found["rows"]]
    headers = ["greedy decoding", "batch", "tok/s", "vs published", "vs naive", "prefill tok/s", "cache",
               "of the limit"]
    print(f"{provenance_line(about)}\nd{config.depth}, layers {shape.pattern()}, V {config.vocab_size:,}, "
          f"prompt {config.prompt}, {config.new_tokens} new tokens, on {ranks.device}; "
          f"copy bandwidth {found['copy_bandwidth'] / 1e9:,.1f} GB/s\n\n{table(headers, lines)}\n\n"
          f"greedy tokens equal to the twin's full forwards (float32): {found['agreed']} of {found['compared']}",
          flush=True)
    for row in found["rows"]:
        if "error" in row:
            print(f"{row['case']}: {row['error']}")
    write_results(config.json, about, config, **found)
    if found["agreed"] < found["compared"]:
        raise UserError("decoding with a cache and full forwards gave different tokens: "
                        "the speeds above mean nothing")


if __name__ == "__main__":
    run_main(main)
