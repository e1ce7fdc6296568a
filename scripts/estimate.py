"""What a run takes, told before it begins: parameters, FLOPs, memory, minutes and dollars.

    step = step_lines(config, rows=32, card=CARDS["H100"], gpus=8)     # where the time of a training step goes
    for stage in stages(plan, CARDS["H100"]): print(stage.name, stage.seconds, stage.basis)

Times on GPUs are computed: FLOPs of products by a share of the data sheet's rate, and bytes of everything else by a
share of the memory's, both counted from the code. Where a step was measured on a card, MEASURED_STEPS says so and is
used instead. python -m scripts.plan prints all of it.
"""

from dataclasses import dataclass

import torch

from nanochat.buckets import newton_schulz_flops
from nanochat.distributed import gpu_peak
from nanochat.gpt import GPTConfig, meta_model
from nanochat.optim import parameter_groups
from nanochat.recipe import RECIPES, at_depth
from nanochat.run import scaling_parameters
from scripts.speedrun_plan import (
    SHARD_BYTES,
    TOKENIZER_SHARDS,
    Machine,
    RunPlan,
    accumulation_of,
    chat_stages,
    sized_plan,
)

# What kernels reach of a card's data sheet. Products and memory: seen for large ones on H100s (public benchmarks of
# cuBLAS and of copies); attention: FlashAttention 2 and cuDNN at rows of 2,048, forward and backward; links: NCCL's bus
# bandwidth at large messages.
OF_PRODUCTS, OF_ATTENTION, OF_MEMORY, OF_LINKS = 0.69, 0.47, 0.81, 0.61


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    name: as the driver says it, without the vendor. memory: bytes, as CUDA tells them. bandwidth: bytes/s of the
    memory. link: bytes/s to and from the other GPUs of its machine, each way.
    """

    name: str
    memory: float
    bandwidth: float
    link: float

    @property
    def flops(self) -> float:
        """Dense FLOP/s in bfloat16; in float32 where the card has no bfloat16."""
        return gpu_peak(self.name, torch.bfloat16) or gpu_peak(self.name, torch.float32) or 0.0


PCIE4 = 25e9
CARDS = {
    "B200": Card("B200", 191.5e9, 8.0e12, 900e9), "H200": Card("H200", 150.1e9, 4.8e12, 450e9),
    "H100": Card("H100 80GB HBM3", 84.9e9, 3.35e12, 450e9),
    "A100": Card("A100-SXM4-80GB", 85.1e9, 2.04e12, 300e9), "A100-40": Card("A100-SXM4-40GB", 42.3e9, 1.56e12, 300e9),
    "RTX-5090": Card("GeForce RTX 5090", 33.7e9, 1.79e12, 2 * PCIE4),
    "RTX-4090": Card("GeForce RTX 4090", 25.3e9, 1.01e12, PCIE4),
    "RTX-3090": Card("GeForce RTX 3090", 25.3e9, 0.94e12, PCIE4), "L4": Card("L4", 23.6e9, 0.30e12, PCIE4),
    "T4": Card("T4", 15.6e9, 0.32e12, PCIE4 / 2),
}


def card_named(name: str) -> Card | None:
    """Return the card that a driver calls `name`; None for one that is not in CARDS."""
    name = name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    return next((card for card in CARDS.values() if name == card.name), None)


# ---- a training step

@dataclass(frozen=True)
class Line:
    """A part of something: its name, its seconds, and what they follow from."""

    name: str
    seconds: float
    basis: str


# What a layer moves besides its products, forward and backward, in activations (tokens × E × 2 bytes); counted from the
# kernels that a compiled d20 step launches with relu² in the products' epilogues: 4 there, 16 for residual sums and
# norms, 14 for rotary and norm in an attention layer, 8.3 for the core of an SLC2 layer (dev/LOG.md).
UNITS = 30.8
# More of it for optional parts, counted from the definitions: for each layer with lambdas; for each with a value
# embedding, its gradient in float32 included; for each SLC2 layer with a norm; for each attention layer with a
# convolution over its queries, keys and values; for backout or smear, once.
LAMBDAS, VALUE_EMBED, SLC_NORM, ATTN_CONV, ONCE = 10, 14, 5, 18, 8
CROSS_ENTROPY = 4.1      # passes over the logits, the sums of the head's gradient included
LAUNCH_SECONDS = 6e-6    # of the host, for a kernel in eager mode


def step_lines(config: GPTConfig, rows: int, card: Card, gpus: int, accumulation: int = 1) -> list[Line]:
    """Return where the time of one GPU goes in an optimizer step.

    Args:
        config: of the model; rows are of its sequence_len.
        rows: of a micro-batch of one GPU.
        gpus: that share the step.
        accumulation: micro-batches of one GPU in a step.
    """
    E, V, L = config.n_embd, config.vocab_size, config.n_layer
    tokens = rows * config.sequence_len * accumulation
    products, memory = OF_PRODUCTS * card.flops, OF_MEMORY * card.bandwidth
    model = meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = 6 * scaling_parameters(model) * tokens
    attention = model.flops_per_token() * tokens - matrices  # what mixers do besides
    activation, logits = tokens * E * 2, tokens * V * 2
    units = UNITS * L + _units_of_parts(config)
    casts = parameters * 28 * accumulation + 6 * activation
    lines = [
        Line("matrix products", matrices / products, f"{matrices / 1e12:.0f} TFLOP"),
        Line("attention", attention * 3.5 / 3 / (OF_ATTENTION * card.flops),
             f"{attention * 3.5 / 3e12:.1f} TFLOP, scores computed again backward"),
        Line("norms, residuals, rotary, relu², SLC2", units * activation / memory,
             f"{units * activation / 1e9:.0f} GB"),
        Line("cross-entropy", CROSS_ENTROPY * logits / memory, f"{CROSS_ENTROPY * logits / 1e9:.0f} GB"),
        Line("embedding, casts of weights and gradients", casts / memory, f"{casts / 1e9:.0f} GB"),
    ]
    muon = [p for group in parameter_groups(model) if group["kind"] == "muon" for p in group["params"]]
    newton_schulz = sum(newton_schulz_flops(*p.shape) for p in muon) / gpus
    moved = parameters / gpus * 96 + (8 * sum(p.numel() for p in muon) if gpus > 1 else 0)
    lines.append(Line("optimizer", moved / memory + newton_schulz / products,
                      f"{moved / 1e9:.1f} GB and {newton_schulz / 1e12:.2f} TFLOP"))
    if gpus > 1:
        share = 4 * (gpus - 1) / gpus / (OF_LINKS * card.link)
        sent, last = parameters * share, model.transformer.wte.weight.numel() * share
        beside = 0.6 * lines[0].seconds / accumulation  # of the last micro-batch's backward pass
        waits = last + max(0.0, sent - last - beside) + max(0.0, sent - beside)
        lines.append(Line("waiting for other GPUs", waits,
                          f"{1000 * sent:.1f} ms of gradients and as much of weights, the rest beside the products"))
    return lines


def _units_of_parts(config: GPTConfig) -> float:
    """Return what the optional parts of a model move, in activations."""
    pattern = config.pattern()
    return (LAMBDAS * config.lambdas * len(pattern) + ONCE * (config.backout + config.smear)
            + VALUE_EMBED * sum(letter in config.value_embeds for letter in pattern)
            + SLC_NORM * config.slc_norm * pattern.count("S") + ATTN_CONV * (config.attn_conv > 0) * pattern.count("A")
            + (config.mlp_ratio - 4) * len(pattern))


def step_seconds(lines: list[Line]) -> float:
    """Return the seconds of a step."""
    return sum(line.seconds for line in lines)


# ---- what there is to choose from

PRICE = 2.5  # dollars an hour for a rented GPU, an H100 of late 2026

# What models reach, by recipe and depth. Nobody has trained the modern recipe on the hybrid at these sizes: the numbers
# are those of nanochat's models of the same depth, which are attention alone, on the same data with the same recipe.
EXPECTED = {
    ("published", 20): "CORE 0.18, as published in November 2025",
    ("modern", 12): "CORE about 0.14, as nanochat's d12 on the same text",
    ("modern", 18): "CORE above 0.18: nanochat's smaller d16 has 0.16 to 0.18",
    ("modern", 22): "CORE about 0.26, as nanochat's d22",
    ("modern", 24): "CORE about 0.26, as nanochat's d24; GPT-2 has 0.2565",
}


def choices(machine: Machine, card: Card) -> list[list[str]]:
    """Return what can be trained on this machine, one row each: the settings, minutes, dollars, what it reaches.

    Minutes are of a whole run, computed as `stage_lines` says.
    """
    rows = []
    for name, depth in EXPECTED:
        recipe = at_depth(depth, RECIPES[name])
        plan = sized_plan(f"d{depth}", recipe, machine, source=recipe.source, chat="hub",
                          dtype=torch.float32 if gpu_peak(card.name, torch.bfloat16) is None else torch.bfloat16)
        seconds = sum(line.seconds for line in stage_lines(plan, card))
        settings = f"SPEEDRUN_RECIPE={name} SPEEDRUN_PROFILE=d{depth}"
        rows.append([settings, f"{seconds / 60:.0f}", f"{seconds / 3600 * PRICE * len(machine.gpus):.0f}",
                     EXPECTED[name, depth]])
    return rows


# ---- the stages of a run

# Assumed, where nothing was measured: a rented node's network; a process with its imports, CUDA, NCCL and a model to
# load; torch.compile of a model, cold.
NETWORK, START, COMPILE = 100e6, 30.0, 60.0
SETUP_BYTES, SETUP_SECONDS = 3e9, 65.0   # packages fetched; the rest was measured on two cores of a Xeon
TRAINING_CHARS = 60e6                    # characters/s a core that tokenizer training reads: 120 MB/s on two cores
CORE_TOKENS = 150e6                      # that the 22 tasks of CORE take, with their examples
TOKENS = {"smoltalk": 800, "mmlu": 200, "gsm8k": 200, "spelling": 40, "bee": 250, "identity": 150}  # a conversation
CONVERSATIONS = {"smoltalk": 460_000, "mmlu": 100_000, "gsm8k": 8_000, "identity": 1_000}
SFT_OTHERS, SFT_TOKENS = 11_400, 500     # ARC and GSM8K beside what the recipe names; tokens of a conversation
PROMPTS, PROMPT_TOKENS, WRITTEN = 17_600, 150, 1_740  # of a grading: choices, their tokens, answers written in full
DECODED_ROWS, DECODE_STEPS = 64, 512     # of a batch of answers that are written


def stage_lines(plan: RunPlan, card: Card) -> list[Line]:
    """Return the parts of a whole run on GPUs of this kind, in order, each with its seconds.

    The seconds are computed, but for those whose basis says where they were measured.
    """
    recipe, gpus = plan.recipe, max(1, len(plan.machine.gpus))
    base, config = recipe.base, plan.model_config
    rows, accumulation = plan.batch.rows, accumulation_of(plan)
    step = step_seconds(step_lines(config, rows, card, gpus, accumulation))
    forward = step / base.total_batch_size / 2.6  # a token without backward, on all GPUs together

    def minutes_of_bpb(tokens: float, times: float) -> float:
        return times * tokens * forward

    validations = plan.steps / base.eval_every + 1 if base.eval_every > 0 else 0
    chars = min(recipe.tokenizer.max_chars, TOKENIZER_SHARDS * 250e6)
    lines = [
        Line("set-up", SETUP_SECONDS + SETUP_BYTES / NETWORK,
             f"65 s measured on two cores, and 3 GB at {NETWORK / 1e6:.0f} MB/s"),
        Line("first text, tokenizer", TOKENIZER_SHARDS * SHARD_BYTES / NETWORK
             + chars / (TRAINING_CHARS * min(16, max(2, plan.machine.cores))) + 20,
             "tokenizer training at 60M characters/s a core, measured on two; the rest of the text arrives beside"),
        Line("base model", plan.steps * step, f"{plan.steps:,} steps of {1000 * step:.0f} ms"),
        Line("its start and compilation", START + COMPILE, "assumed"),
        Line("its validations", minutes_of_bpb(base.eval_tokens, validations),
             f"{validations:.0f} of {base.eval_tokens / 1e6:.1f}M tokens"),
        Line("evaluation of the base model", START + (2 * recipe.base_eval.split_tokens + CORE_TOKENS) * forward,
             f"two splits and {CORE_TOKENS / 1e6:.0f}M tokens of CORE"),
    ]
    trained = [stage.name for stage in chat_stages(plan)]
    grading = (START + (PROMPTS * PROMPT_TOKENS) * forward * 2
               + _decode_seconds(config, card) * DECODE_STEPS * -(-WRITTEN // (DECODED_ROWS * gpus)))
    if "mid" in trained:
        counts = {**CONVERSATIONS, **{name: recipe.mid.mixture[name] for name in ("spelling", "bee")}}
        tokens = sum(counts[name] * TOKENS[name] for name in counts)
        steps = recipe.mid.num_iterations if recipe.mid.num_iterations > 0 else tokens / recipe.mid.total_batch_size
        lines += [Line("mid-training", START + COMPILE + steps * step
                       + minutes_of_bpb(recipe.mid.eval_tokens, steps / recipe.mid.eval_every + 1),
                       f"{steps:,.0f} steps, from {tokens / 1e6:.0f}M tokens of conversations"),
                  Line("grading after it", grading, "multiple choice, and answers of at most 512 tokens")]
    if "sft" in trained:
        sft = recipe.sft
        lines += [_packed_fine_tuning(plan, step, forward) if sft.packed else _padded_fine_tuning(plan, card),
                  Line("grading after it", grading, "as before")]
    return [*lines, Line("report", 10, "assumed")]


def _padded_fine_tuning(plan: RunPlan, card: Card) -> Line:
    sft, config, gpus = plan.recipe.sft, plan.model_config, max(1, len(plan.machine.gpus))
    examples = SFT_OTHERS + sum(sft.mixture[name] for name in ("smoltalk", "spelling", "bee", "identity"))
    steps = sft.num_iterations if sft.num_iterations > 0 else examples / sft.target_examples_per_step
    share = max(1, sft.target_examples_per_step // gpus)
    one = step_seconds(step_lines(config, 1, card, gpus)) * share * SFT_TOKENS * 2 / config.sequence_len
    host = 90 * config.n_layer * LAUNCH_SECONDS
    evaluated = steps / sft.eval_every * sft.eval_steps * one / 3
    return Line("fine-tuning", START + steps * max(one, host) + evaluated,
                f"{steps:,.0f} steps of {sft.target_examples_per_step} conversations")


def _packed_fine_tuning(plan: RunPlan, step: float, forward: float) -> Line:
    """step: seconds of an optimizer step of the base model. forward: of a token without backward."""
    sft, batch = plan.recipe.sft, plan.recipe.base.total_batch_size
    counts = {**CONVERSATIONS, "spelling": 1, "bee": 1}
    tokens = sum(counts[name] * abs(sft.mixture[name]) * TOKENS[name] for name in counts)  # -1: all
    steps = sft.num_iterations if sft.num_iterations > 0 else tokens / batch
    evaluated = (steps / sft.eval_every + 1) * sft.eval_steps * sft.target_examples_per_step * SFT_TOKENS * forward
    return Line("fine-tuning", START + COMPILE + steps * step + evaluated,
                f"{steps:,.0f} steps of the base model's, from {tokens / 1e6:.0f}M tokens of conversations")


def _decode_seconds(config: GPTConfig, card: Card) -> float:
    """Return the seconds of a decode step of a batch of rows: the weights are read once, in bfloat16."""
    parameters = sum(p.numel() for p in meta_model(config).parameters())
    return 2 * parameters / (OF_MEMORY * card.bandwidth) + 1e-4 * config.n_layer
