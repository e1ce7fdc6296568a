"""What a run will take before anything is rented: memory, minutes of every stage, dollars.

    python -m scripts.plan --depth 20 --gpus 8                  # the published recipe on eight H100s
    python -m scripts.plan --recipe modern --depth 24 --gpus 8
    python -m scripts.plan --depth 26 --gpus 1 --card RTX-4090
    python -m scripts.plan --depth 20 --gpus 8 --price 24       # dollars an hour for the whole machine

It needs no GPU: everything is counted from the code, and each number says whether it was computed or measured, and on
what. `bash speedrun.sh` announces the same numbers for the machine it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.measure import table
from nanochat.cli import COUNT, NOT_NEGATIVE, Range, flag, parse, run_main
from nanochat.dataset.shards import HUB_TEXTS
from nanochat.distributed import gpu_peak
from nanochat.errors import UserError
from nanochat.gpt import meta_model
from nanochat.memory import usable_memory
from nanochat.recipe import RECIPES, at_depth, published
from nanochat.run import RecipeName
from nanochat.training import clock
from scripts.estimate import CARDS, EXPECTED, Card, Line, stage_lines, step_lines, step_seconds
from scripts.speedrun_plan import Machine, RunPlan, accumulation_of, sized_plan


@dataclass
class Flags:
    """Flags of plan."""

    recipe: RecipeName = flag(published.name, "how the model is trained")
    depth: int = flag(0, "layers of the model, from which the rest follows; 0: the recipe's own", within=Range(0, 1000))
    gpus: int = flag(8, "GPUs of one machine", within=Range(1, 1024))
    card: str = flag("H100", f"kind of GPU: {', '.join(CARDS)}")
    price: float = flag(20.0, "dollars an hour for the whole machine; 0 leaves the cost out", within=NOT_NEGATIVE)
    cores: int = flag(64, "CPU cores of the machine", within=COUNT)
    rl: bool = flag(False, "with reinforcement learning")


def describe(plan: RunPlan, card: Card, price: float) -> str:
    """Return all that is known of a run before it begins, as text with tables in Markdown.

    price: dollars an hour for the whole machine; 0 leaves the cost out.
    """
    config, gpus = plan.model_config, len(plan.machine.gpus)
    model = meta_model(config)
    parameters, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token()
    tokens = plan.steps * plan.recipe.base.total_batch_size
    accumulation = accumulation_of(plan)
    lines, stages = step_lines(config, plan.batch.rows, card, gpus, accumulation), stage_lines(plan, card)
    step, whole = step_seconds(lines), step_seconds(stages)
    speed = plan.recipe.base.total_batch_size / step
    text = [
        f"machine   {gpus} × {card.name}, {card.memory / 1e9:.0f} GB each",
        f"model     depth {config.n_layer}, width {config.n_embd}, {parameters:,} parameters, "
        f"{flops / 1e9:.3f} GFLOP a token",
        f"training  {plan.steps:,} steps of {plan.recipe.base.total_batch_size:,} tokens = {tokens / 1e9:.2f}B tokens, "
        f"{tokens * flops:.2e} FLOP",
        f"text      {plan.shards} shards of {HUB_TEXTS[plan.source].title}, {plan.shards * 0.1:.0f} GB to fetch; "
        f"{plan.disk / 1e9:.0f} GB of disk in all",
        f"memory    {plan.batch.need / 1e9:.1f} GB a GPU with {plan.batch.rows} rows of {config.sequence_len}"
        + (" and activation checkpointing" if plan.batch.recompute else "")
        + f", {accumulation} micro-batch{'es' if accumulation > 1 else ''} a step (counted, not measured on a card)",
        f"speed     {1000 * step:.0f} ms a step, {speed:,.0f} tokens/s, "
        f"MFU {100 * speed * flops / gpus / card.flops:.0f} % (computed)",
        "", table(["a step of one GPU", "ms", "from"], _rows(lines, 1000), (0, 2)),
        "", table(["the run", "minutes", "from"], [*_rows(stages, 1 / 60), ["sum", f"{whole / 60:.1f}", clock(whole)]],
                  (0, 2))]
    if price:
        text.append(f"\ncost      ${whole / 3600 * price:,.2f} at ${price:g} an hour for the machine")
    if reached := EXPECTED.get((plan.recipe.name, config.n_layer)):
        text.append(f"expected  {reached}")
    return "\n".join(text)


def _rows(lines: Sequence[Line], scale: float) -> list[list[str]]:
    return [[line.name, f"{scale * line.seconds:.1f}", line.basis] for line in lines]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan. Raises UserError for a card or a number that is none."""
    flags = parse(Flags, argv, __doc__)
    if flags.card not in CARDS:
        raise UserError(f"--card={flags.card}: it must be one of {', '.join(CARDS)}")
    card, recipe = CARDS[flags.card], RECIPES[flags.recipe]
    recipe = at_depth(flags.depth or recipe.base.shape.depth, recipe)
    if flags.rl:
        recipe = replace(recipe, stages=(*recipe.stages, "rl"))
    machine = Machine([card.name] * flags.gpus, int(card.memory), flags.cores)
    dtype = torch.float32 if gpu_peak(card.name, torch.bfloat16) is None else torch.bfloat16
    plan = sized_plan(f"d{recipe.base.shape.depth}", recipe, machine, source=recipe.source, chat="hub", dtype=dtype)
    if plan.batch.need > usable_memory(card.memory, flags.gpus):
        raise UserError(f"{plan.tag} does not fit a {card.name}: {plan.batch.need / 1e9:.1f} GB are needed for one "
                        f"row, {usable_memory(card.memory, flags.gpus) / 1e9:.1f} can be used. Try a smaller --depth, "
                        "more --gpus or another --card.")
    print(describe(plan, card, flags.price))


if __name__ == "__main__":
    run_main(main)
