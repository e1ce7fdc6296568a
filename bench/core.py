"""Speed of CORE: batches with shared prefixes, beside one prompt at a time.

    python -m bench.core --bundle=FOLDER --tokenizer=FOLDER --depth=4 --max-per-task=20

Both ways score the same examples of every task in the bundle, in one run, task by task, with a model of random weights.
They must give the same result for every example; the table says for how many they do. The times include making and
encoding the prompts. The vocabulary sets the cost of the head: it has 65,536 tokens by default, as that of the
published models, whatever the tokenizer has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import (
    command_line,
    json_flag,
    median,
    provenance,
    provenance_line,
    random_model,
    table,
    write_results,
)
from nanochat.cli import COUNT, DEPTH, ROUNDS, ROW_TOKENS, Range, flag, parse, run_main
from nanochat.distributed import close_ranks, init_ranks
from nanochat.errors import UserError
from nanochat.evaluation.core import CoreTaskResult, evaluate_core_task, load_examples, score_plain
from nanochat.evaluation.core_bundle import CoreTask, open_bundle
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer


@dataclass
class Config:
    """Flags of bench.core."""

    bundle: str = flag("", "folder with core.yaml and tasks; unset is eval_bundle, downloaded if it is missing")
    tokenizer: str = flag("", "folder of a tokenizer; unset is that of $NANOCHAT_BASE_DIR")
    depth: int = flag(4, "layers; also sets the width", within=DEPTH)
    vocab_size: int = flag(65536, "tokens in the vocabulary of the model; 0 takes that of the tokenizer",
                           within=Range(0, 1 << 24))
    sequence_len: int = flag(2048, "longest sequence of the model, in tokens", within=ROW_TOKENS)
    max_per_task: int = flag(20, "examples of each task", within=COUNT)
    rounds: int = flag(1, "times that each way is timed; the median is reported", within=ROUNDS)
    tasks: str = flag("", "labels of tasks, separated by commas; unset takes all that have a file")
    device: str = flag("", "cuda, mps or cpu; unset takes the best available")
    json: str = json_flag()


def one_at_a_time(model, questions):
    """The definition of `score_questions`."""
    return [score_plain(model, question) for question in questions]


def same(a: CoreTaskResult, b: CoreTaskResult) -> int:
    """Number of examples on which two results agree."""
    return sum(x.correct == y.correct for x, y in zip(a.examples, b.examples))


def compare(model, tokenizer, tasks: Sequence[CoreTask], max_per_task: int, rounds: int
            ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Evaluate these tasks in both ways; return a row of numbers for each task, and their sums."""
    rows = []
    for task in tasks:
        examples = load_examples(task, max_per_task)
        evaluate_core_task(model, tokenizer, task, examples[:task.shots + 2])  # warm-up
        fast, plain = [], []
        for _ in range(rounds):
            fast.append(evaluate_core_task(model, tokenizer, task, examples))
            plain.append(evaluate_core_task(model, tokenizer, task, examples, score=one_at_a_time))
        ours, theirs = (median(result.seconds for result in results) for results in (fast, plain))
        rows.append({"task": task.label, "kind": task.kind, "shots": task.shots, "examples": len(examples),
                     "seconds": ours, "plain_seconds": theirs, "same": same(fast[0], plain[0]),
                     "right": sum(example.correct for example in plain[0].examples)})
    sums = {key: sum(row[key] for row in rows) for key in ("examples", "seconds", "plain_seconds", "same", "right")}
    return rows, {"task": "all", "kind": "", "shots": "", **sums}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for a mistake of the user, and where the results differ."""
    config = parse(Config, argv, __doc__)
    if min(config.max_per_task, config.rounds) < 1:
        raise UserError("--max-per-task and --rounds must be at least 1")
    tasks = open_bundle(config.bundle or None).present().tasks
    wanted = [label for label in config.tasks.split(",") if label]
    if unknown := set(wanted) - {task.label for task in tasks}:
        raise UserError(f"--tasks names {sorted(unknown)[0]!r}, which has no file in the bundle; there is "
                        f"{', '.join(task.label for task in tasks)}")
    tokenizer = RustBPETokenizer.from_directory(config.tokenizer) if config.tokenizer else get_tokenizer()
    V = config.vocab_size or tokenizer.get_vocab_size()
    if V < tokenizer.get_vocab_size():
        raise UserError(f"--vocab-size is {V}, but the tokenizer has {tokenizer.get_vocab_size()} tokens")
    shape = GPTConfig.from_depth(config.depth, vocab_size=V, sequence_len=config.sequence_len)
    device = init_ranks(config.device).device
    try:
        about = provenance(command_line("bench.core", argv))
        model = random_model(shape, device).eval()
        chosen = [task for task in tasks if not wanted or task.label in wanted]
        rows, total = compare(model, tokenizer, chosen, config.max_per_task, config.rounds)
    finally:
        close_ranks()
    lines = [[row["task"], row["kind"].replace("_", " "), row["shots"],
              f"{row['seconds']:.2f}", f"{row['plain_seconds']:.2f}", f"{row['plain_seconds'] / row['seconds']:.1f}×",
              f"{row['same']} of {row['examples']}"] for row in [*rows, total]]
    headers = ["CORE task", "kind", "shots", "s", "s one at a time", "ratio", "same answers"]
    print(f"{provenance_line(about)}\nd{config.depth}, layers {shape.pattern()}, V {shape.vocab_size:,}, float32, "
          f"on {device}\n\n{table(headers, lines)}", flush=True)
    write_results(config.json, about, config, rows, total=total, ratio=total["plain_seconds"] / total["seconds"])
    if total["same"] < total["examples"]:
        raise UserError("the two ways came to different answers: the times above mean nothing")


if __name__ == "__main__":
    run_main(main)
