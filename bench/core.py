"""How fast CORE is judged: in batches that share what prompts begin with, beside one prompt at a time.

    python -m bench.core --bundle=FOLDER --tokenizer=FOLDER --depth=4 --max-per-task=20

The head costs as much as the vocabulary is large: 65,536 by default, as in the published models, whatever the tokenizer has. Both judge the
same examples of every task whose file is in the bundle, in one run, task by task in turns, with a model of random weights, and must come to
the same answers, example by example; how many do is printed. The times hold the making and encoding of the prompts too.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.measure import circumstances, command_line, in_a_line, lively, table, write_json
from nanochat.cli import flag, parse, run_main
from nanochat.distributed import close_ranks, init_ranks
from nanochat.errors import UserError
from nanochat.evaluation.core import CoreTaskResult, evaluate_core_task, load_examples, score_plain
from nanochat.evaluation.core_bundle import CoreTask, open_bundle
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer


@dataclass
class Config:
    """Flags of bench.core."""

    bundle: str = flag("", "folder with core.yaml and some of its tasks; unset is eval_bundle, fetched if it is not there")
    tokenizer: str = flag("", "folder of a tokenizer; unset is that of $NANOCHAT_BASE_DIR")
    depth: int = flag(4, "layers; sets width too")
    vocab_size: int = flag(65536, "tokens the model knows; 0 takes the tokenizer's")
    sequence_len: int = flag(2048, "tokens in a row of the model")
    max_per_task: int = flag(20, "examples of each task")
    rounds: int = flag(1, "times that everything is judged in each way; the median counts")
    tasks: str = flag("", "labels of some tasks, with commas between; unset takes all that have a file")
    device: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    json: str = flag("", "file to write all numbers to")


def one_at_a_time(model, questions):
    """What `score_questions` does, by its definition."""
    return [score_plain(model, question) for question in questions]


def same(a: CoreTaskResult, b: CoreTaskResult) -> int:
    """How many examples two results agree on."""
    return sum(x.correct == y.correct for x, y in zip(a.examples, b.examples))


def compare(model, tokenizer, tasks: Sequence[CoreTask], max_per_task: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Judge these tasks in both ways; a row of numbers for each task, and their sums."""
    rows = []
    for task in tasks:
        examples = load_examples(task, max_per_task)
        evaluate_core_task(model, tokenizer, task, examples[:task.shots + 2])  # kernels load, memory grows
        fast, plain = [], []
        for _ in range(rounds):
            fast.append(evaluate_core_task(model, tokenizer, task, examples))
            plain.append(evaluate_core_task(model, tokenizer, task, examples, score=one_at_a_time))
        ours, theirs = (statistics.median(result.seconds for result in results) for results in (fast, plain))
        rows.append({"task": task.label, "kind": task.kind, "shots": task.shots, "examples": len(examples), "seconds": ours,
                     "plain_seconds": theirs, "same": same(fast[0], plain[0]), "right": sum(v.correct for v in plain[0].examples)})
    total = {"task": "all", "kind": "", "shots": "", **{key: sum(row[key] for row in rows)
                                                          for key in ("examples", "seconds", "plain_seconds", "same", "right")}}
    return rows, total


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for what the user can mend, and where the answers differ."""
    config = parse(Config, argv, __doc__)
    if min(config.max_per_task, config.rounds) < 1:
        raise UserError("--max-per-task and --rounds must be at least 1")
    tasks = open_bundle(config.bundle or None).present().tasks
    wanted = [label for label in config.tasks.split(",") if label]
    if unknown := set(wanted) - {task.label for task in tasks}:
        raise UserError(f"--tasks names {sorted(unknown)[0]!r}, which has no file in the bundle: {', '.join(t.label for t in tasks)}")
    tokenizer = RustBPETokenizer.from_directory(config.tokenizer) if config.tokenizer else get_tokenizer()
    V = config.vocab_size or tokenizer.get_vocab_size()
    if V < tokenizer.get_vocab_size():
        raise UserError(f"--vocab-size is {V}, but the tokenizer has {tokenizer.get_vocab_size()} tokens")
    shape = GPTConfig.from_depth(config.depth, vocab_size=V, sequence_len=config.sequence_len)
    device = init_ranks(config.device).device
    try:
        about = circumstances(command_line("bench.core", argv))
        model = lively(shape, device).eval()
        rows, total = compare(model, tokenizer, [task for task in tasks if not wanted or task.label in wanted], config.max_per_task,
                              config.rounds)
    finally:
        close_ranks()
    lines = [[row["task"], row["kind"].replace("_", " "), row["shots"], f"{row['seconds']:.2f}", f"{row['plain_seconds']:.2f}",
              f"{row['plain_seconds'] / row['seconds']:.1f}×", f"{row['same']} of {row['examples']}"] for row in [*rows, total]]
    print(f"{in_a_line(about)}\nd{config.depth}, layers {shape.pattern()}, V {shape.vocab_size:,}, float32, on {device}\n\n"
          + table(["CORE task", "kind", "shots", "s", "s one at a time", "ratio", "same answers"], lines), flush=True)
    if config.json:
        write_json(config.json, {"about": about, "config": asdict(config), "rows": rows, "total": total,
                                 "ratio": total["plain_seconds"] / total["seconds"]})
    if total["same"] < total["examples"]:
        raise UserError("the two ways came to different answers: the times above are worth nothing")


if __name__ == "__main__":
    run_main(main)
