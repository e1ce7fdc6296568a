"""Evaluate a base model: what `scripts.base_loss` does, and, if it was trained on the small world, how many of its facts it knows.

    python -m scripts.base_eval
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag=d20

The facts are asked in phrasings that were held out of the training text. CORE is to come here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.cli import parse, run_main
from nanochat.gpt import GPT
from nanochat.logs import RunLog
from nanochat.loss_eval import log_likelihoods
from nanochat.small_world import facts, grade
from scripts import base_loss


@dataclass
class Config(base_loss.Config):
    """Flags of base_eval: those of base_loss."""


def small_world_recall(model, tokenizer, meta: dict[str, Any], log: RunLog) -> None:
    """Print and record how many facts of its small world the model completes, beside an untrained model and chance.

    meta: of the checkpoint; it says which small world the model was trained on. Nothing happens where it was another text.
    """
    source = meta.get("data") or {}
    if source.get("source") != "small-world":
        return
    seed = source.get("seed", 0)
    questions = facts(seed)
    torch.manual_seed(seed)
    untrained = GPT(model.config).to(model.device)
    torch.nn.init.normal_(untrained.lm_head.weight, std=0.02)  # zero at the start: all choices would tie
    trained, blank = (grade(questions, lambda prompts, choices, m=m: log_likelihoods(m, tokenizer, prompts, choices))
                      for m in (model, untrained))
    log.say("small world, held-out phrasings      trained  untrained  chance")
    order = ["world", *(kind for kind in trained if kind != "world")]
    for kind in order:
        name = {"world": "all facts of people, places, things"}.get(kind, f"  {kind}")
        log.say(f"{name:36s} {trained[kind].accuracy:7.1%}   {blank[kind].accuracy:7.1%}  {trained[kind].chance:6.1%}   "
                f"({trained[kind].count} prompts)")
    recall = {kind: trained[kind].accuracy for kind in order}
    log.record("small_world", **recall, untrained=blank["world"].accuracy, chance=trained["world"].chance)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the flags say. Raises UserError for what the user can mend."""
    base_loss.run(parse(Config, argv, __doc__), "base_eval", small_world_recall)


if __name__ == "__main__":
    run_main(main)
