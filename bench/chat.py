"""Measure how fast written answers are graded: many prompts decoded as one batch, against one prompt at a time.

    python -m bench.chat --depth=4 --problems=32 --max-tokens=64

Both ways grade the same small-world problems greedily with the same randomly initialised model, and should write the
same answers. The number of equal answers is printed; NANOCHAT_DTYPE=float32 avoids differences from near ties. The
tokenizer is trained on the text of the small world.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bench.measure import (
    command_line,
    interleaved,
    json_flag,
    median,
    provenance,
    provenance_line,
    random_model,
    table,
    write_results,
)
from nanochat.cli import COUNT, DEPTH, ROUNDS, ROWS, Range, flag, parse, run_main
from nanochat.distributed import Ranks, close_ranks, compute_dtype, init_ranks
from nanochat.errors import UserError
from nanochat.evaluation.chat import evaluate_task
from nanochat.gpt import GPT, GPTConfig
from nanochat.small_world import documents
from nanochat.tokenizer import RustBPETokenizer
from tasks.base import Task
from tasks.small_world import WorldQuestions, WorldSums
from tasks.spelling import SpellingBee


@dataclass
class Config:
    """Flags of bench.chat."""

    depth: int = flag(4, "layers; sets width too", within=DEPTH)
    vocab_size: int = flag(1024, "tokens of the vocabulary", within=Range(1, 1 << 24))
    problems: int = flag(32, "problems of each task, and rows decoded together", within=ROWS)
    max_tokens: int = flag(64, "tokens of an answer, at most", within=COUNT)
    rounds: int = flag(3, "times that each way is timed; the median counts", within=ROUNDS)
    device: str = flag("", "cuda, mps or cpu; unset takes the best available")
    json: str = json_flag()


def small_world_tasks() -> list[Task]:
    """Return the tasks to grade: facts, sums and spelling."""
    return [WorldQuestions("test"), WorldSums("test"), SpellingBee("test", source="invented")]


def compare(model: GPT, tokenizer, tasks: Sequence[Task], ranks: Ranks, problems: int, max_tokens: int, rounds: int
            ) -> list[dict[str, Any]]:
    """Grade tasks in both ways, alternating between them.

    Args:
        model, tokenizer, ranks: as for `evaluate_task`.
        tasks: what to grade.
        problems: problems of each task, and rows decoded together.
        max_tokens: tokens of an answer, at most.
        rounds: times that each way is timed.

    Returns:
        For each task its name, seconds together and alone, and how many answers are the same.
    """
    rows = []
    for task in tasks:
        def graded(batch_size: int, task: Task = task):
            return evaluate_task(model, tokenizer, task, ranks, max_problems=problems, max_tokens=max_tokens,
                                 batch_size=batch_size)

        together, alone = graded(problems).rows, graded(1).rows
        ways = {"together": lambda: graded(problems), "alone": lambda: graded(1)}
        seconds = interleaved(ways, ranks.device, rounds, warmup=0)
        rows.append({"task": task.name, "problems": len(together), "seconds": median(seconds["together"]),
                     "alone_seconds": median(seconds["alone"]), "same": sum(a == b for a, b in zip(together, alone))})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say, and print a table. Raises UserError for wrong flags."""
    config = parse(Config, argv, __doc__)
    if min(config.problems, config.max_tokens, config.rounds) < 1:
        raise UserError("--problems, --max-tokens and --rounds must be at least 1")
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(), 2000), config.vocab_size)
    shape = GPTConfig.from_depth(config.depth, vocab_size=tokenizer.get_vocab_size(), sequence_len=1024)
    ranks = init_ranks(config.device)
    try:
        about = provenance(command_line("bench.chat", argv))
        model = random_model(shape, ranks.device).eval()
        model.compute_dtype = compute_dtype(ranks.device, training=False)
        rows = compare(model, tokenizer, small_world_tasks(), ranks, config.problems, config.max_tokens, config.rounds)
    finally:
        close_ranks()
    lines = [[row["task"], row["problems"], f"{row['seconds']:.2f}", f"{row['alone_seconds']:.2f}",
              f"{row['alone_seconds'] / row['seconds']:.1f}×", f"{row['same']} of {row['problems']}"] for row in rows]
    print(f"{provenance_line(about)}\n"
          f"d{config.depth}, layers {shape.pattern()}, V {shape.vocab_size:,}, {model.dtype}, "
          f"on {ranks.device}, answers of at most {config.max_tokens} tokens\n\n"
          + table(["task", "problems", "s together", "s one at a time", "ratio", "same answers"], lines), flush=True)
    write_results(config.json, about, config, rows)


if __name__ == "__main__":
    run_main(main)
