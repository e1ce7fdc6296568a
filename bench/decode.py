"""How fast tokens come out: prefill, then greedy decoding through a state, beside the published engine and full forwards with the twin.

    python -m bench.decode --depth=4 --vocab-size=2048 --prompt=128 --new-tokens=64 --batches=1,64
    python -m bench.decode --depth=12 --vocab-size=65536 --batches=1     # the shape that the goals for CPUs are of
    python -m bench.decode --peer=../another-checkout                    # times the decoding of that checkout too

Ours decodes through the engine, with all it does between two tokens, and so does the published engine's twin (bench/published_engine.py,
float32); they take turns, some steps each, so that what else the machine does falls on all alike. The naive way runs the whole text through
the model for every token: slow, and right; timed at some lengths between the prompt's and the end's, since it costs more with each. Greedy
tokens of ours and the naive way must agree before anything is timed. "of the limit": bytes a step has to read (weights, the state in use)
over the copy bandwidth measured here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from bench import peer, published_engine
from bench.measure import (
    circumstances,
    command_line,
    copy_bandwidth,
    in_a_line,
    lively,
    nbytes,
    seconds_of,
    si,
    table,
    typical,
    write_json,
)
from bench.peer import Endless
from bench.twin import TwinGPT
from nanochat.cache import Cache
from nanochat.cli import flag, parse, run_main
from nanochat.distributed import close_ranks, compute_dtype, init_ranks
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loading import ready_to_decode

TURN = 8  # steps of one case before the next one's
PUBLISHED = "published engine, float32"


@dataclass
class Config:
    """Flags of bench.decode."""

    depth: int = flag(4, "layers; sets width too")
    vocab_size: int = flag(2048, "tokens the model knows")
    prompt: int = flag(128, "tokens of the prompt")
    new_tokens: int = flag(64, "tokens to generate a row")
    batches: str = flag("1,64", "rows at a time, one measurement each")
    naive_points: int = flag(3, "lengths at which the naive way is timed")
    prefills: int = flag(3, "timed prefills; the median counts")
    peer: str = flag("", "a checkout that offers nanochat.gpt, to time its decoding too")
    threads: int = flag(0, "CPU threads; 0 leaves it to torch")
    device: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    json: str = flag("", "file to write all numbers to")


@torch.inference_mode()
def prefill_seconds(model: GPT, B: int, T: int, times: int = 3) -> list[float]:
    """Seconds to take in B prompts of T random tokens, into fresh states, up to the logits of the last token."""
    ids = torch.randint(model.config.vocab_size, (B, T), device=model.device)

    def once() -> None:
        model(ids, cache=model.new_cache(B, T), last_only=True)
    once()
    return [seconds_of(once, model.device) for _ in range(times)]


def decoding(model: GPT | TwinGPT, B: int, prompt: int, new: int, graphs: bool | None = None) -> Iterator[float]:
    """Yield the seconds of each of `new` greedy decoding steps of B rows behind a prompt, through the engine; a TwinGPT through the
    published one. A step is from one column of tokens on the host to the next; the first ones, in which memory grows, are left out.
    graphs: of Engine.
    """
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    generate = Engine(model, Endless(), graphs=graphs).generate if isinstance(model, GPT) else partial(published_engine.generate, model)
    columns = generate(ids, num_samples=B, max_tokens=new + 4, temperature=0)
    for _ in range(4):
        next(columns)
    while True:
        start = time.perf_counter()
        if next(columns, None) is None:
            return
        yield time.perf_counter() - start


def decode_seconds(model: GPT | TwinGPT, B: int, prompt: int, new: int, graphs: bool | None = None) -> list[float]:
    """Seconds of each decoding step of B rows."""
    return list(decoding(model, B, prompt, new, graphs))


def decode_in_turns(models: dict[str, GPT | TwinGPT], B: int, prompt: int, new: int) -> dict[str, list[float]]:
    """Seconds of each decoding step of B rows for each model; a few steps of one, then of the next, and so on."""
    running = {name: decoding(model, B, prompt, new) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(-(-new // TURN)):
        for name, steps in running.items():
            seconds[name] += islice(steps, TURN)
    return seconds


@torch.inference_mode()
def naive_seconds(twin: TwinGPT, B: int, prompt: int, new: int, points: int) -> list[float]:
    """Seconds of a full forward with the twin and its next tokens, at `points` lengths spread evenly over the generation."""
    device, seconds = twin.lm_head.weight.device, []
    for i in range(points):
        length = prompt + round((i + 0.5) * (new - 1) / points)
        ids = torch.randint(twin.config.vocab_size, (B, length), device=device)
        twin(ids)
        seconds.append(seconds_of(lambda ids=ids: twin(ids)[:, -1].argmax(-1).tolist(), device))
    return seconds


def agreement(model: GPT, twin: TwinGPT, prompt: int, new: int) -> int:
    """How many greedy tokens through the engine, from the first on, are the twin's by full forwards too; ties within 1e-3 count."""
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    ours = Engine(model, Endless()).generate_batch(ids, max_tokens=new, temperature=0)[0][0][prompt:]
    with torch.inference_mode():
        for i, token in enumerate(ours):
            logits = twin(torch.tensor([ids + ours[:i]], device=model.device))[0, -1]
            if logits[token] < logits.max() - 1e-3:
                return i
    return new


def step_bytes(model: GPT, B: int, context: int) -> int:
    """Bytes a decoding step reads at least: every weight but the embedding (B rows of it), and the state of B rows of `context` tokens."""
    weights = nbytes([*model.parameters(), *model.buffers()]) - nbytes([model.transformer.wte.weight])
    return weights + B * model.config.n_embd * model.transformer.wte.weight.element_size() + state_bytes(model, B, context)


def state_bytes(model: GPT, B: int, context: int) -> int:
    """Bytes of the state of B rows of `context` tokens."""
    cache = Cache([block.attn for block in model.transformer.h], B, context, device="meta", dtype=model.dtype)
    return cache.nbytes()


def in_dtype(shape: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model to decode with: weights, activations and state all in dtype."""
    return lively(shape, device).to(dtype).eval()


def measure(model: GPT, config: Config, B: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    """What is known of one of our models at batch B, whose decoding step takes `seconds`."""
    prefill = typical(prefill_seconds(model, B, config.prompt, config.prefills))
    middle = config.prompt + config.new_tokens // 2
    return {"prefill_tokens_per_second": B * config.prompt / prefill, "step_bytes": step_bytes(model, B, middle),
            "state_bytes": state_bytes(model, B, config.prompt + config.new_tokens),
            "of_the_limit": step_bytes(model, B, middle) / bandwidth / seconds}


def models_of(shape: GPTConfig, exact: GPT, device: torch.device, dtype: torch.dtype) -> dict[str, GPT]:
    """Our models by what the table calls them; `exact` is the float32 one."""
    attention, name = GPTConfig(**{**shape.to_dict(), "layer_pattern": "A" * shape.n_layer}), str(dtype).removeprefix("torch.")
    models = {"ours, float32": exact}
    if dtype != torch.float32:
        models = {"ours, bfloat16": ready_to_decode(lively(shape, device)), **models}
    if device.type == "cpu":  # elsewhere it is right, and slow
        models = {"ours, int8": ready_to_decode(lively(shape, device), "int8"), **models}
    return {**models, f"ours all-attention, {name}": ready_to_decode(lively(attention, device))}


def compare(shape: GPTConfig, config: Config, batches: list[int], device: torch.device) -> dict[str, Any]:
    """Measure all cases at all batches; returns rows, the copy bandwidth, and how many greedy tokens were the twin's."""
    exact = in_dtype(shape, device, torch.float32)
    twin = TwinGPT(shape).to(device).eval()
    twin.load_state_dict(exact.state_dict())
    compared, bandwidth, rows = min(16, config.new_tokens), copy_bandwidth(device), []
    agreed = agreement(exact, twin, config.prompt, compared)
    models = models_of(shape, exact, device, compute_dtype(device))
    for B in batches:
        naive = naive_seconds(twin, B, config.prompt, config.new_tokens, config.naive_points)
        naive_speed = B / (sum(naive) / len(naive))
        seconds = {name: typical(steps) for name, steps in
                   decode_in_turns({PUBLISHED: twin, **models}, B, config.prompt, config.new_tokens).items()}
        for name in (*models, PUBLISHED):
            speed = B / seconds[name]
            more = measure(models[name], config, B, seconds[name], bandwidth) if name in models else {}
            rows.append({"case": name, "batch": B, "tokens_per_second": speed, "vs_published": seconds[PUBLISHED] / seconds[name],
                         "vs_naive": speed / naive_speed, **more})
        rows.append({"case": "twin, float32, full forwards", "batch": B, "tokens_per_second": naive_speed,
                     "vs_published": naive_speed * seconds[PUBLISHED] / B, "vs_naive": 1.0})
        if config.peer:
            rows += peer_rows(shape, config, B, device, seconds[PUBLISHED], naive_speed)
    return {"rows": rows, "copy_bandwidth": bandwidth, "agreed": agreed, "compared": compared}


def peer_rows(shape: GPTConfig, config: Config, B: int, device: torch.device, published: float, naive_speed: float) -> list[dict[str, Any]]:
    """Time the decoding of another checkout, in a process of its own. published: seconds of a step of the published engine."""
    rows = []
    for found in peer.ask(config.peer, "generate", shape, B, config.prompt, steps=config.new_tokens, warmup=3, device=device.type):
        row = {"case": f"peer {found['peer']}, {found['how']}", "batch": B, **found}
        if seconds := found.get("seconds"):
            speed = B / typical(seconds)
            row |= {"tokens_per_second": speed, "vs_published": speed * published / B, "vs_naive": speed / naive_speed}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for what the user can mend."""
    config = parse(Config, argv, __doc__)
    try:
        batches = [int(part) for part in config.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches is numbers with commas between, such as 1,64; not {config.batches!r}") from None
    if min(batches) < 1 or min(config.prompt, config.new_tokens, config.naive_points, config.prefills) < 1:
        raise UserError("--batches, --prompt, --new-tokens, --naive-points and --prefills must be at least 1")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    shape = GPTConfig.from_depth(config.depth, sequence_len=config.prompt + config.new_tokens + 8, vocab_size=config.vocab_size)
    ranks = init_ranks(config.device)
    try:
        about = circumstances(command_line("bench.decode", argv))
        found = compare(shape, config, batches, ranks.device)
    finally:
        close_ranks()
    lines = [[row["case"], row["batch"], si(row.get("tokens_per_second")), f"{row['vs_published']:.2f}×" if "vs_published" in row else "-",
              f"{row['vs_naive']:.1f}×" if "vs_naive" in row else "-", si(row.get("prefill_tokens_per_second")),
              si(row["state_bytes"]) + "B" if "state_bytes" in row else "-",
              f"{100 * row['of_the_limit']:.0f}%" if "of_the_limit" in row else "-"] for row in found["rows"]]
    headers = ["greedy decoding", "batch", "tok/s", "vs published", "vs naive", "prefill tok/s", "state", "of the limit"]
    print(f"{in_a_line(about)}\nd{config.depth}, layers {shape.pattern()}, V {config.vocab_size:,}, prompt {config.prompt}, "
          f"{config.new_tokens} new tokens, on {ranks.device}; copy bandwidth {found['copy_bandwidth'] / 1e9:,.1f} GB/s\n\n"
          + table(headers, lines)
          + f"\n\ngreedy tokens equal to the twin's full forwards (float32): {found['agreed']} of {found['compared']}", flush=True)
    for row in found["rows"]:
        if "error" in row:
            print(f"{row['case']}: {row['error']}")
    if config.json:
        write_json(config.json, {"about": about, "config": asdict(config), **found})
    if found["agreed"] < found["compared"]:
        raise UserError("decoding through the state and full forwards gave different tokens: the speeds above are worth nothing")


if __name__ == "__main__":
    run_main(main)
