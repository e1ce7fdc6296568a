"""Evaluate a base model: CORE, bits per byte, samples, and the facts of the small world if the model was trained on it.

    python -m scripts.base_eval
    python -m scripts.base_eval --eval=core --max-per-task=100
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag=d20

The tasks of CORE are in eval_bundle under $NANOCHAT_BASE_DIR; they are downloaded once (162 MB) if they are missing.
The scores go to base_eval/base_model_<step>.csv, one row a task, and the result of every example to the .jsonl beside
it. The facts of the small world are asked in phrasings that were held out of the training text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checks import need_writable
from nanochat.cli import COUNT_OR_ALL, flag, parse, run_main
from nanochat.dataset.shards import shards_in
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.evaluation.core import CoreResult, bundle_of_ranks, check_bundle, evaluate_core
from nanochat.evaluation.core_bundle import Bundle, BundleUnavailable
from nanochat.evaluation.loss import log_likelihoods
from nanochat.files import atomic_write, base_dir, to_json
from nanochat.gpt import GPT
from nanochat.logs import RunLog
from nanochat.recipe import published
from nanochat.small_world import facts, grade
from scripts import base_loss

PARTS = ("core", "bpb", "sample", "small-world")


@dataclass
class Config(base_loss.Config):
    """Flags of base_eval, after those of base_loss."""

    eval: str = flag("", f"parts to run, of {','.join(PARTS)}; unset runs all that are possible here")
    max_per_task: int = flag(published.base_eval.max_per_task, "examples of each CORE task; -1 = all",
                             within=COUNT_OR_ALL)
    bundle: str = flag("", "folder of the tasks of CORE; unset is eval_bundle, downloaded if it is missing")

    def check(self) -> None:
        """Raise UserError for parts that do not exist, and a folder that is not there."""
        super().check()
        if wrong := [part for part in self.parts() if part not in PARTS]:
            raise UserError(f"--eval names {wrong[0]!r}; its parts are {', '.join(PARTS)}, separated by commas")
        if self.bundle and not Path(self.bundle).expanduser().is_dir():
            raise UserError(f"--bundle: there is no folder {self.bundle}")

    def parts(self) -> list[str]:
        """Return the parts that --eval names; [] for all that are possible."""
        return [part.strip() for part in self.eval.split(",") if part.strip()]


def small_world_recall(model, tokenizer, meta: dict[str, Any], log: RunLog) -> None:
    """Print and record the accuracy on facts of the small world, beside that of an untrained model and of guessing.

    meta: of the checkpoint; names the small world that the model was trained on. Does nothing for other training text.
    """
    source = meta.get("data") or {}
    if source.get("source") != "small-world":
        return
    seed = source.get("seed", 0)
    questions = facts(seed)
    torch.manual_seed(seed)
    untrained = GPT(model.config).to(model.device)
    torch.nn.init.normal_(untrained.lm_head.weight, std=0.02)  # zero when fresh: all choices would tie
    trained, blank = (grade(questions, lambda prompts, choices, m=m: log_likelihoods(m, tokenizer, prompts, choices))
                      for m in (model, untrained))
    log.say("small world, held-out phrasings      trained  untrained  chance")
    order = ["world", *(kind for kind in trained if kind != "world")]
    for kind in order:
        name = {"world": "all facts of people, places, things"}.get(kind, f"  {kind}")
        log.say(f"{name:36s} {trained[kind].accuracy:7.1%}   {blank[kind].accuracy:7.1%}  {trained[kind].chance:6.1%}"
                f"   ({trained[kind].count} prompts)")
    recall = {kind: trained[kind].accuracy for kind in order}
    log.record("small_world", **recall, untrained=blank["world"].accuracy, chance=trained["world"].chance)


def write_core(result: CoreResult, step: int) -> Path:
    """Write the table (task, accuracy, centred; CORE last) and a JSON line an example; return the path of the table."""
    path = base_dir() / "base_eval" / f"base_model_{step:06d}.csv"
    rows = [("Task", "Accuracy", "Centered")]
    rows += [(label, f"{task.accuracy:.6f}", f"{task.centered:.6f}") for label, task in result.tasks.items()]
    rows.append(("CORE", "", f"{result.core:.6f}"))
    with atomic_write(path.with_suffix(".jsonl"), "w") as file:
        for label, task in result.tasks.items():
            for i, example in enumerate(task.examples):
                record = {"task": label, "example": i, "correct": example.correct, "losses": example.losses}
                file.write(to_json(record) + "\n")
    with atomic_write(path, "w") as file:
        file.writelines(f"{task:<35}, {accuracy:<10}, {centered:<10}\n" for task, accuracy, centered in rows)
    return path


def core(model, tokenizer, bundle: Bundle, max_per_task: int, step: int, ranks: Ranks, log: RunLog) -> float:
    """Evaluate CORE; print it, record it and write its files. Collective."""
    result = evaluate_core(model, tokenizer, bundle, max_per_task, ranks=ranks, say=log.say)
    if ranks.is_main:
        log.say(f"CORE {result.core:.4f} over {len(result.tasks)} tasks in {result.seconds:.0f} s")
        log.record("core", step=step, **result.record())
        log.say(f"the table is in {write_core(result, step)}")  # last: a full disk does not cost the result
    return result.core


def evaluate(model, tokenizer, meta: dict[str, Any], config: Config, ranks: Ranks, log: RunLog) -> None:
    """Run the parts that --eval names, or all that are possible; the others are skipped with a message. Collective."""
    asked = config.parts()
    parts = asked or list(PARTS)
    if "core" in parts:
        own_text = (meta.get("data") or {}).get("source") == "small-world"
        try:
            bundle = bundle_of_ranks(config.bundle, ranks, fetch=bool(asked) or not own_text, say=log.say)
        except BundleUnavailable as error:
            if asked or config.bundle:
                raise
            reason = "the model knows only the small world, and " if own_text else ""
            log.say(f"CORE is skipped: {reason}{error}")
            log.record("skipped", what="CORE", why=f"{reason}{error}")
        else:
            core(model, tokenizer, bundle, config.max_per_task, meta["step"], ranks, log)
    text_parts = [part for part in ("bpb", "sample") if part in parts]
    if text_parts:
        folder = base_loss.text_folder(config)
        if asked or shards_in(folder):
            base_loss.evaluate(model, tokenizer, config, ranks, log, text_parts)
        else:
            log.say(f"bits per byte and samples are skipped: there is no text in {folder}")
            log.record("skipped", what="bits per byte and samples", why=f"there is no text in {folder}")
    if "small-world" in parts and ranks.is_main:
        small_world_recall(model, tokenizer, meta, log)


def look(tokenizer, meta: dict[str, Any], config: Config, ranks: Ranks) -> list[str]:
    """Return what would be evaluated, in words. Raises UserError where a part that --eval names is not possible.

    Text is looked at before CORE is evaluated, which may take an hour.
    """
    need_writable(base_dir() / "base_eval")
    asked, lines = config.parts(), []
    parts, small_world = asked or list(PARTS), (meta.get("data") or {}).get("source") == "small-world"
    if "core" in parts:
        try:
            bundle = bundle_of_ranks(config.bundle, ranks, fetch=False)
            check_bundle(bundle, config.max_per_task, ranks)
            lines.append(f"CORE: {len(bundle.tasks)} tasks")
        except BundleUnavailable:
            lines.append("CORE, if its tasks can be downloaded" if asked or not small_world else
                         "not CORE: its tasks are not there, and the model knows only the small world")
    if {"bpb", "sample"} & set(parts):
        if asked or shards_in(base_loss.text_folder(config)):
            lines += base_loss.look_at_text(tokenizer, config)
        else:
            lines.append(f"not bits per byte and samples: there is no text in {base_loss.text_folder(config)}")
    if "small-world" in parts and small_world:
        lines.append("the facts of the small world")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the flags say. Raises UserError for a mistake of the user."""
    config = parse(Config, argv, __doc__)
    base_loss.run(config, "base_eval",
                  lambda model, tokenizer, meta, ranks, log: evaluate(model, tokenizer, meta, config, ranks, log),
                  lambda tokenizer, meta, ranks: look(tokenizer, meta, config, ranks))


if __name__ == "__main__":
    run_main(main)
