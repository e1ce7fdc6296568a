"""Speed of evaluation: bits per byte, CORE and generated answers, beside the plain ways, in one table of ratios.

    python -m bench.eval                                            # a d4, about a minute on two cores; needs no files
    python -m bench.eval --depth=20 --vocab-size=65536 --device-batch-size=32 --max-seq-len=2048    # on a GPU
    python -m bench.eval --peer=../another-checkout                 # times the losses of that checkout too

Bits per byte: our model in the best precision of the device, beside the twin (float32, eager), our model in float32,
and an all-attention model. CORE: batches with shared prefixes beside one prompt at a time; on tasks of random text
where there is no bundle. Generated answers: batches of prompts beside one at a time. The table says how far the two
ways agree. Weights are random; the tokenizer is trained on text of the small world. bench.core and bench.chat report
more on one of them.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import chat, core, peer
from bench.measure import (
    command_line,
    interleaved,
    json_flag,
    median,
    provenance,
    provenance_line,
    random_model,
    si,
    table,
    text_batches,
    write_results,
)
from bench.twin import TwinGPT
from nanochat.cli import COUNT, DEPTH, ROUNDS, ROW_TOKENS, ROWS, Range, flag, parse, run_main
from nanochat.distributed import Ranks, close_ranks, compute_dtype, init_ranks
from nanochat.errors import UserError
from nanochat.evaluation.core_bundle import CoreTask, bundle_dir, open_bundle
from nanochat.evaluation.loss import evaluate_bpb
from nanochat.gpt import GPTConfig
from nanochat.small_world import documents
from nanochat.tokenizer import RustBPETokenizer

PARTS = ("bpb", "core", "chat")


@dataclass
class Config:
    """Flags of bench.eval."""

    depth: int = flag(4, "layers; also sets the width", within=DEPTH)
    vocab_size: int = flag(8192, "tokens in the vocabulary; for generated answers, that of the tokenizer",
                           within=Range(1, 1 << 24))
    max_seq_len: int = flag(256, "tokens in a sequence", within=ROW_TOKENS)
    device_batch_size: int = flag(16, "sequences in a batch, for bits per byte", within=ROWS)
    bundle: str = flag("", "folder with core.yaml and tasks; unset is that of $NANOCHAT_BASE_DIR, or else random text")
    max_per_task: int = flag(12, "examples of each CORE task", within=COUNT)
    problems: int = flag(8, "problems of each chat task, and sequences in a batch", within=ROWS)
    max_tokens: int = flag(24, "most tokens of an answer", within=COUNT)
    rounds: int = flag(3, "times that each way is timed; the median is reported", within=ROUNDS)
    only: str = flag("", f"some of {', '.join(PARTS)}, separated by commas; unset is all")
    peer: str = flag("", "another checkout with a nanochat.gpt, whose losses are timed too")
    device: str = flag("", "cuda, mps or cpu; unset takes the best available")
    json: str = json_flag()


def twin_losses(twin: TwinGPT) -> Callable[..., Tensor]:
    """The twin with the interface that `evaluate_bpb` expects: all logits at once, in float32."""
    def losses(inputs: Tensor, targets: Tensor, loss_reduction: str) -> Tensor:
        logits = twin(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
    return losses


def random_tasks(folder: Path, count: int) -> list[CoreTask]:
    """Tasks of the three kinds with `count` examples of words of the small world; some of the tasks are five-shot."""
    words = " ".join(islice(documents(), 50)).split()
    dice = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(low, high)))
    made = {
        "multiple_choice": lambda: {"query": text(10, 30), "choices": [text(1, 6) for _ in range(4)],
                                    "gold": dice.randrange(4)},
        "schema": lambda: {"context_options": [text(8, 16), text(8, 16)], "continuation": text(3, 8),
                           "gold": dice.randrange(2)},
        "language_modeling": lambda: {"context": text(20, 60), "continuation": text(1, 2)},
    }
    tasks = []
    for kind, shots in (("multiple_choice", 5), ("multiple_choice", 0), ("schema", 0), ("language_modeling", 5)):
        path, shots = folder / f"{kind}_{shots}.jsonl", min(shots, count - 1)
        path.write_text("".join(json.dumps(made[kind]()) + "\n" for _ in range(count)))
        tasks.append(CoreTask(f"random {kind.replace('_', ' ')}", kind, shots, " ", 0.0, path))
    return tasks


def ratio_row(what: str, ours: float, beside: str, theirs: float, agree: str) -> dict[str, Any]:
    """A row of the table: two speeds of the same work, and how far the results agree."""
    return {"what": what, "ours": ours, "beside": beside, "theirs": theirs, "ratio": ours / theirs, "agree": agree}


def bpb_rows(shape: GPTConfig, config: Config, ranks: Ranks) -> list[dict[str, Any]]:
    """Tokens a second of bits per byte."""
    device, dtype = ranks.device, compute_dtype(ranks.device, training=False)
    name, what = str(dtype).removeprefix("torch."), "bits per byte, tokens/s"
    batches = list(islice(text_batches(config.device_batch_size, config.max_seq_len, device), 2))
    attention = random_model(GPTConfig(**{**shape.to_dict(), "layer_pattern": "A" * shape.n_layer}), device).eval()
    model, exact = random_model(shape, device).eval(), random_model(shape, device).eval()
    twin = TwinGPT(shape).to(device).eval()
    twin.load_state_dict(exact.state_dict())
    model.compute_dtype = attention.compute_dtype = dtype
    one = torch.ones(shape.vocab_size, device=device)
    ways = {"ours": model, "twin, float32 eager": twin_losses(twin), f"all-attention, {name}": attention}
    if dtype != torch.float32:
        ways["ours, float32"] = exact
    bpb: dict[str, float] = {}
    work = {how: lambda how=how, way=way: bpb.update({how: evaluate_bpb(way, batches, one)})
            for how, way in ways.items()}
    seconds = interleaved(work, device, config.rounds, warmup=1)
    tokens = sum(inputs.numel() for inputs, _ in batches)
    speed = {how: tokens / median(times) for how, times in seconds.items()}
    rows = []
    for how in ways:
        if how != "ours":
            agree = "-" if "attention" in how else f"{bpb['ours']:.4f} and {bpb[how]:.4f}"
            rows.append({**ratio_row(f"{what}, {name}", speed["ours"], how, speed[how], agree),
                         "tokens": tokens, "seconds": seconds["ours"], "their_seconds": seconds[how]})
    if config.peer:
        B, T = config.device_batch_size, config.max_seq_len
        for timed in peer.run_peer(config.peer, "forward", shape, B, T, steps=config.rounds, warmup=1,
                                   device=device.type):
            beside = f"peer {timed['peer']}, {timed['how']}"
            if "error" in timed:
                rows.append({"what": what, "beside": beside, "error": timed["error"]})
            else:
                theirs = B * T / median(timed["seconds"])
                rows.append(ratio_row(f"{what}, {name}", speed["ours"], beside, theirs, "-"))
    return rows


def core_row(shape: GPTConfig, config: Config, tokenizer, tasks: Iterable[CoreTask], ranks: Ranks) -> dict[str, Any]:
    """Examples a second of CORE, in float32."""
    rows, total = core.compare(random_model(shape, ranks.device).eval(), tokenizer, list(tasks), config.max_per_task, 1)
    found = ratio_row("CORE, examples/s, float32", total["examples"] / total["seconds"], "one prompt at a time",
                      total["examples"] / total["plain_seconds"], f"{total['same']} of {total['examples']} answers")
    return {**found, "tasks": rows, "differ": total["examples"] - total["same"]}


def chat_row(shape: GPTConfig, config: Config, tokenizer, ranks: Ranks) -> dict[str, Any]:
    """Problems a second of tasks with generated answers. The model has the vocabulary of the tokenizer."""
    shape = GPTConfig(**{**shape.to_dict(), "vocab_size": tokenizer.get_vocab_size()})
    model = random_model(shape, ranks.device).eval()
    model.compute_dtype = compute_dtype(ranks.device, training=False)
    tasks = [task for task in chat.small_world_tasks() if task.kind == "generative"]
    rows = chat.compare(model, tokenizer, tasks, ranks, config.problems, config.max_tokens, 1)
    problems, together, alone, same = (sum(row[key] for row in rows)
                                       for key in ("problems", "seconds", "alone_seconds", "same"))
    name = str(model.dtype).removeprefix("torch.")
    return {**ratio_row(f"generated answers, problems/s, {name}", problems / together, "one prompt at a time",
                        problems / alone, f"{same} of {problems} answers"), "tasks": rows}


def compare(config: Config, parts: Sequence[str], ranks: Ranks) -> list[dict[str, Any]]:
    """All rows of the table. Raises UserError for a vocabulary that is smaller than that of the tokenizer."""
    shape = GPTConfig.from_depth(config.depth, vocab_size=config.vocab_size, sequence_len=max(config.max_seq_len, 1024))
    rows = bpb_rows(shape, config, ranks) if "bpb" in parts else []
    if set(parts) == {"bpb"}:
        return rows
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(), 2000), min(1024, config.vocab_size))
    if "core" in parts:
        with tempfile.TemporaryDirectory() as folder:
            tasks = random_tasks(Path(folder), config.max_per_task)
            if config.bundle or (bundle_dir() / "core.yaml").is_file():
                tasks = open_bundle(config.bundle or None, fetch=False).present().tasks
            rows.append(core_row(shape, config, tokenizer, tasks, ranks))
    if "chat" in parts:
        rows.append(chat_row(shape, config, tokenizer, ranks))
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table of the rows of `compare`."""
    return table(["evaluation", "ours", "beside", "its speed", "ratio", "agreement"],
                 [[row["what"], si(row.get("ours")), row["beside"], si(row.get("theirs")),
                   f"{row['ratio']:.2f}×" if "ratio" in row else "-", row.get("agree", "-")] for row in rows], (0, 2))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for a mistake of the user, and where CORE's answers differ."""
    config = parse(Config, argv, __doc__)
    for name in ("device_batch_size", "max_seq_len", "max_per_task", "problems", "max_tokens", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if config.vocab_size < 300:
        raise UserError(f"--vocab-size must be at least 300, so that a tokenizer fits into it; not {config.vocab_size}")
    parts = [part.strip() for part in config.only.split(",") if part.strip()] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--only names {sorted(unknown)[0]!r}, which is none of {', '.join(PARTS)}")
    ranks = init_ranks(config.device)
    try:
        about = provenance(command_line("bench.eval", argv))
        rows = compare(config, parts, ranks)
    finally:
        close_ranks()
    print(f"{provenance_line(about)}\nd{config.depth}, V {config.vocab_size:,}, {config.device_batch_size} sequences "
          f"of {config.max_seq_len} tokens, on {ranks.device}\n\n{format_rows(rows)}", flush=True)
    for row in rows:
        if "error" in row:
            print(f"{row['beside']}: {row['error']}")
    write_results(config.json, about, config, rows)
    if any(row.get("differ") for row in rows):
        raise UserError("CORE in batches and one prompt at a time came to different answers: "
                        "its times above mean nothing")


if __name__ == "__main__":
    run_main(main)
