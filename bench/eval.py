"""How fast models are measured: bits per byte, CORE and graded answers, ours beside the plain ways, in one table of ratios.

    python -m bench.eval                                            # a d4, about a minute on two cores; needs no files
    python -m bench.eval --depth=20 --vocab-size=65536 --device-batch-size=32 --max-seq-len=2048 --bundle=eval_bundle     # on a GPU
    python -m bench.eval --peer=../another-checkout                 # times the losses of that checkout too

Bits per byte: ours in the device's precision beside the twin (float32, eager), ours in float32, and all-attention. CORE: in batches that
share what prompts begin with, beside one prompt at a time; on tasks made of random text where there is no bundle. Answers that are written:
many prompts decoded together, beside one at a time. Both ways must agree, and how far they do is in the table. Weights are random; the
tokenizer is made of the small world's text. bench.core and bench.chat tell more of one of them.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import chat, core, peer
from bench.measure import (
    circumstances,
    command_line,
    in_a_line,
    interleaved,
    lively,
    si,
    table,
    text_batches,
    typical,
    write_json,
)
from bench.twin import TwinGPT
from nanochat.cli import flag, parse, run_main
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

    depth: int = flag(4, "layers; sets width too")
    vocab_size: int = flag(8192, "tokens the model knows; for written answers, those of the tokenizer")
    max_seq_len: int = flag(256, "tokens in a row")
    device_batch_size: int = flag(16, "rows in a batch of bits per byte")
    bundle: str = flag("", "folder with core.yaml and some tasks; unset is $NANOCHAT_BASE_DIR's, or random text where there is none")
    max_per_task: int = flag(12, "examples of each CORE task")
    problems: int = flag(8, "problems of each chat task, and rows decoded together")
    max_tokens: int = flag(24, "tokens of an answer at most")
    rounds: int = flag(3, "times that each way is timed; the median counts")
    only: str = flag("", f"some of {', '.join(PARTS)}, with commas between; unset is all")
    peer: str = flag("", "a checkout that offers nanochat.gpt, to time its losses too")
    device: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    json: str = flag("", "file to write all numbers to")


def twin_losses(twin: TwinGPT) -> Callable[..., Tensor]:
    """The twin as `evaluate_bpb` calls a model: all logits at once, in float32."""
    def losses(inputs: Tensor, targets: Tensor, loss_reduction: str) -> Tensor:
        logits = twin(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
    return losses


def random_tasks(folder: Path, count: int) -> list[CoreTask]:
    """Tasks of the three kinds with `count` examples each, made of the small world's words: some with five examples before a question."""
    words = " ".join(islice(documents(), 50)).split()
    dice = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(low, high)))
    made = {
        "multiple_choice": lambda: {"query": text(10, 30), "choices": [text(1, 6) for _ in range(4)], "gold": dice.randrange(4)},
        "schema": lambda: {"context_options": [text(8, 16), text(8, 16)], "continuation": text(3, 8), "gold": dice.randrange(2)},
        "language_modeling": lambda: {"context": text(20, 60), "continuation": text(1, 2)},
    }
    tasks = []
    for kind, shots in (("multiple_choice", 5), ("multiple_choice", 0), ("schema", 0), ("language_modeling", 5)):
        path, shots = folder / f"{kind}_{shots}.jsonl", min(shots, count - 1)
        path.write_text("".join(json.dumps(made[kind]()) + "\n" for _ in range(count)))
        tasks.append(CoreTask(f"random {kind.replace('_', ' ')}", kind, shots, " ", 0.0, path))
    return tasks


def line(what: str, ours: float, beside: str, theirs: float, agree: str) -> dict[str, Any]:
    """A row of the table: two speeds of the same thing."""
    return {"what": what, "ours": ours, "beside": beside, "theirs": theirs, "ratio": ours / theirs, "agree": agree}


def bpb_lines(shape: GPTConfig, config: Config, ranks: Ranks) -> list[dict[str, Any]]:
    """Tokens a second of bits per byte. The twin's value and ours are both told."""
    device, dtype = ranks.device, compute_dtype(ranks.device)
    name, what = str(dtype).removeprefix("torch."), "bits per byte, tokens/s"
    batches = list(islice(text_batches(config.device_batch_size, config.max_seq_len, device), 2))
    attention = lively(GPTConfig(**{**shape.to_dict(), "layer_pattern": "A" * shape.n_layer}), device).eval()
    model, exact = lively(shape, device).eval(), lively(shape, device).eval()
    twin = TwinGPT(shape).to(device).eval()
    twin.load_state_dict(exact.state_dict())
    model.compute_dtype = attention.compute_dtype = dtype
    one = torch.ones(shape.vocab_size, device=device)
    ways = {"ours": model, "twin, float32 eager": twin_losses(twin), f"all-attention, {name}": attention}
    if dtype != torch.float32:
        ways["ours, float32"] = exact
    found: dict[str, float] = {}
    work = {how: lambda how=how, way=way: found.update({how: evaluate_bpb(way, batches, one)}) for how, way in ways.items()}
    speed = {how: sum(inputs.numel() for inputs, _ in batches) / typical(seconds)
             for how, seconds in interleaved(work, device, config.rounds, warmup=1).items()}
    lines = [line(f"{what}, {name}", speed["ours"], how, speed[how],
                  "-" if "attention" in how else f"{found['ours']:.4f} and {found[how]:.4f}") for how in ways if how != "ours"]
    if config.peer:
        for told in peer.ask(config.peer, "forward", shape, config.device_batch_size, config.max_seq_len, steps=config.rounds, warmup=1,
                             device=device.type):
            beside = f"peer {told['peer']}, {told['how']}"
            if "error" in told:
                lines.append({"what": what, "beside": beside, "error": told["error"]})
            else:
                theirs = config.device_batch_size * config.max_seq_len / typical(told["seconds"])
                lines.append(line(f"{what}, {name}", speed["ours"], beside, theirs, "-"))
    return lines


def core_line(shape: GPTConfig, config: Config, tokenizer, tasks: Iterable[CoreTask], ranks: Ranks) -> dict[str, Any]:
    """Examples a second of CORE, in float32."""
    rows, total = core.compare(lively(shape, ranks.device).eval(), tokenizer, list(tasks), config.max_per_task, 1)
    found = line("CORE, examples/s, float32", total["examples"] / total["seconds"], "one prompt at a time",
                 total["examples"] / total["plain_seconds"], f"{total['same']} of {total['examples']} answers")
    return {**found, "tasks": rows, "differ": total["examples"] - total["same"]}


def chat_line(shape: GPTConfig, config: Config, tokenizer, ranks: Ranks) -> dict[str, Any]:
    """Problems a second of tasks whose answers are written; the model knows the tokenizer's tokens."""
    shape = GPTConfig(**{**shape.to_dict(), "vocab_size": tokenizer.get_vocab_size()})
    model = lively(shape, ranks.device).eval()
    model.compute_dtype = compute_dtype(ranks.device)
    tasks = [task for task in chat.small_world_tasks() if task.kind == "generative"]
    rows = chat.compare(model, tokenizer, tasks, ranks, config.problems, config.max_tokens, 1)
    problems, together, alone, same = (sum(row[key] for row in rows) for key in ("problems", "seconds", "alone_seconds", "same"))
    name = str(model.dtype).removeprefix("torch.")
    return {**line(f"written answers, problems/s, {name}", problems / together, "one prompt at a time", problems / alone,
                   f"{same} of {problems} answers"), "tasks": rows}


def compare(config: Config, parts: Sequence[str], ranks: Ranks) -> list[dict[str, Any]]:
    """All lines of the table. Raises UserError for a vocabulary the tokenizer does not fit into."""
    shape = GPTConfig.from_depth(config.depth, vocab_size=config.vocab_size, sequence_len=max(config.max_seq_len, 1024))
    lines = bpb_lines(shape, config, ranks) if "bpb" in parts else []
    if set(parts) == {"bpb"}:
        return lines
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(), 2000), min(1024, config.vocab_size))
    if "core" in parts:
        with tempfile.TemporaryDirectory() as folder:
            tasks = random_tasks(Path(folder), config.max_per_task)
            if config.bundle or (bundle_dir() / "core.yaml").is_file():
                tasks = open_bundle(config.bundle or None, fetch=False).present().tasks
            lines.append(core_line(shape, config, tokenizer, tasks, ranks))
    if "chat" in parts:
        lines.append(chat_line(shape, config, tokenizer, ranks))
    return lines


def shown(lines: list[dict[str, Any]]) -> str:
    """The table of all lines."""
    return table(["evaluation", "ours", "beside", "its speed", "ratio", "agreement"],
                 [[row["what"], si(row.get("ours")), row["beside"], si(row.get("theirs")),
                   f"{row['ratio']:.2f}×" if "ratio" in row else "-", row.get("agree", "-")] for row in lines], (0, 2))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for what the user can mend, and where CORE's answers differ."""
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
        about = circumstances(command_line("bench.eval", argv))
        lines = compare(config, parts, ranks)
    finally:
        close_ranks()
    print(f"{in_a_line(about)}\nd{config.depth}, V {config.vocab_size:,}, {config.device_batch_size} rows of {config.max_seq_len} tokens, "
          f"on {ranks.device}\n\n{shown(lines)}", flush=True)
    for row in lines:
        if "error" in row:
            print(f"{row['beside']}: {row['error']}")
    if config.json:
        write_json(config.json, {"about": about, "config": asdict(config), "rows": lines})
    if any(row.get("differ") for row in lines):
        raise UserError("CORE in batches and one prompt at a time came to different answers: its times above are worth nothing")


if __name__ == "__main__":
    run_main(main)
