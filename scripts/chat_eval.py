"""Evaluate a chat model: multiple choice, problems with the calculator, code, spelling; ChatCORE over all of them.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i mid -a 'ARC-Easy|GSM8K' -x 100
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft

Files under $NANOCHAT_BASE_DIR: chat_eval/<source>_<tag>_<step>/<task>.jsonl, one line a problem with the answers of the
model; and the log, logs/chat_eval_<source>_<tag>.jsonl.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nanochat.checks import NOTHING_CHANGED, check_tag, dry_run_flag, need_writable
from nanochat.cli import COUNT, COUNT_OR_ALL, ROWS, SEED, STEP_OR_LAST, TEMPERATURE, TOP_K, flag, parse, run_main
from nanochat.distributed import joined_ranks, machine_first
from nanochat.errors import NotWritten, UserError
from nanochat.evaluation.chat import chatcore, evaluate_task
from nanochat.files import atomic_write, base_dir, to_json
from nanochat.loading import load_for_decoding
from nanochat.logs import RunLog
from nanochat.recipe import published
from nanochat.run import ChatData, chat_data_of
from nanochat.stages import CHAT_STAGES, STAGES
from nanochat.tools.sandbox import run_python
from nanochat.training import clock
from tasks import recipes
from tasks.hub import MIRROR

GRADING = published.chat_eval
PROGRESS_EVERY = 5.0  # seconds between lines of progress


@dataclass
class Config:
    """Flags of chat_eval."""

    source: Literal[tuple(stage.name for stage in CHAT_STAGES)] = flag("sft", "stage of the model", short="i")
    task_name: str = flag("", "tasks, separated by |; unset takes all", short="a")
    temperature: float = flag(GRADING.temperature, "of sampling; 0 is greedy", short="t", within=TEMPERATURE)
    max_new_tokens: int = flag(GRADING.max_new_tokens, "most tokens of an answer", short="m", within=COUNT)
    num_samples: int = flag(GRADING.num_samples, "answers to a problem; one correct answer is enough (pass@k)",
                            short="n", within=ROWS)
    top_k: int = flag(GRADING.top_k, "sample from this many most likely tokens; 0 = all", short="k", within=TOP_K)
    batch_size: int = flag(GRADING.batch_size, "sequences in one batch", short="b", within=ROWS)
    model_tag: str = flag("", "which model; unset takes the only or the deepest one", short="g")
    step: int = flag(-1, "which of its checkpoints; -1 is the last", short="s", within=STEP_OR_LAST)
    max_problems: int = flag(GRADING.max_problems, "problems of each task; -1 = all", short="x", within=COUNT_OR_ALL)
    data: ChatData = flag("auto", "which tasks: the published ones, those of the built-in small world, or sums and "
                          "spelling alone; auto is those of its training")
    seed: int = flag(42, "of sampling, where the temperature is above 0", within=SEED)
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    dry_run: bool = dry_run_flag()

    def check(self) -> None:
        """Raise UserError for a tag that is none."""
        check_tag(self.model_tag)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the flags say. Raises UserError for a mistake of the user."""
    config = parse(Config, argv, __doc__)
    with joined_ranks(config.device_type) as ranks:
        run(config, ranks)


def select_tasks(names: str, data: str, seed: int) -> dict:
    """Return the functions that make the tasks, by name.

    Args:
        names: separated by |; empty takes all of `data`.
        data: "hub", "small-world" or "basics".
        seed: of the small world, and of what else is made here.

    Raises:
        UserError: for a name that does not exist.
    """
    known = recipes.graded(data, seed)
    other = {name: make for one in recipes.DATA for name, make in recipes.graded(one, seed).items()}
    if not names:
        return known
    found = {}
    for name in (part.strip() for part in names.split("|")):
        match = next((one for one in (*known, *other) if one.lower() == name.lower()), None)
        if match is None:
            raise UserError(f"there is no task {name!r}; there is {', '.join(dict.fromkeys([*known, *other]))}")
        found[match] = known.get(match) or other[match]
    return found


def run(config: Config, ranks) -> None:
    """Evaluate one model. Collective."""
    model, tokenizer, meta = load_for_decoding(config.source, ranks.device, model_tag=config.model_tag or None,
                                               step=None if config.step < 0 else config.step, ranks=ranks)
    data = chat_data_of(meta) if config.data == "auto" else config.data
    tasks = select_tasks(config.task_name, data, (meta.get("data") or {}).get("seed", 0))
    level = run_python("").level.name.lower() if "HumanEval" in tasks else ""  # now, so that an error comes early
    tag = Path(meta["folder"]).name
    folder = base_dir() / "chat_eval" / f"{config.source}_{tag}_{meta['step']:06d}"
    for path in (folder, base_dir() / "logs"):
        need_writable(path)
    if config.dry_run:
        seen = data != "hub" or os.environ.get(MIRROR)  # else they would have to be fetched
        counts = {name: f"{len(make()):,} problems" if seen else "from the hub" for name, make in tasks.items()}
        if ranks.is_main:
            print(f"{meta['loaded']} would be asked " + ", ".join(f"{name} ({count})" for name, count in counts.items())
                  + f"; the answers would go to {folder}\n{NOTHING_CHANGED}")
        return
    loaded = {name: machine_first(make, ranks) for name, make in tasks.items()}  # all, before the first is asked
    with RunLog(STAGES[config.source].graded_by, tag, asdict(config), enabled=ranks.is_main) as log:
        log.say(meta["loaded"])
        if level:
            log.say(f"programs of HumanEval run in a sandbox of the level {level}")
        accuracy, chance, published_way = {}, {}, {}
        not_kept: NotWritten | None = None
        for name, task in loaded.items():
            last_line = time.time()

            def progress(done: int, count: int, correct: int, name: str = name) -> None:
                nonlocal last_line
                log.progress(done, count, f"{name} {correct / done:.1%}")
                if time.time() - last_line > PROGRESS_EVERY and done < count:
                    last_line = time.time()
                    log.say(f"  {name:16s} {done}/{count}, {correct / done:.1%} so far")

            result = evaluate_task(model, tokenizer, task, ranks, batch_size=config.batch_size,
                                   max_problems=config.max_problems, num_samples=config.num_samples,
                                   max_tokens=config.max_new_tokens, temperature=config.temperature,
                                   top_k=config.top_k, seed=config.seed, progress=progress)
            accuracy[name], chance[name] = result.accuracy, result.chance
            published_way[name] = result.share("as_published")
            log.say(f"{name:18s} {result.accuracy:6.1%}  ({result.correct} of {result.count}, "
                    f"chance {result.chance:.1%}, {clock(result.seconds)})")
            for note in result.notes():
                log.say(f"  {note}")
            log.record("task", name=name, accuracy=result.accuracy, correct=result.correct, count=result.count,
                       chance=result.chance, seconds=result.seconds, **result.readings())
            if ranks.is_main:
                try:
                    with atomic_write(folder / f"{name}.jsonl", "w") as file:
                        file.writelines(to_json(row) + "\n" for row in result.rows)
                except NotWritten as error:  # hours may be ahead; the scores are in the log
                    log.say(f"warning: the answers are not kept: {error}")
                    not_kept = not_kept or error
        if set(tasks) == set(recipes.graded(data)):
            core, other = chatcore(accuracy, chance), chatcore(published_way, chance)
            log.say(f"{'ChatCORE' if data == 'hub' else 'mean above chance':18s} {core:6.4f}"
                    + (f"  ({other:.4f} with answers that were cut, as published)" if other != core else ""))
            log.record("chatcore", chatcore=core, as_published=other, tasks=accuracy, data=data)
        if not_kept is not None:
            raise not_kept


if __name__ == "__main__":
    run_main(main)
