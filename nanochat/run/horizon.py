"""How long a base model is trained, and what follows from it: batch, learning rates and weight decay.

    run = horizon_of(config, vocab_size)       # config: flags of base_train, or those of a recipe
    run.num_iterations, run.total_batch_size, run.lr_factor, run.decay_factor
"""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, meta_model
from nanochat.optim import parameter_groups
from nanochat.recipe import Horizon, Shape, fields_of
from nanochat.recipe.laws import automatic_batch, decay_factor, rate_factor

NO_HORIZON = "no horizon: set --num-iterations, --target-flops or --target-param-data-ratio above 0"


@dataclass(frozen=True)
class BaseRun:
    """What the flags of base training come to.

    shape: of the model. parameters: of the model, all. num_iterations: optimizer steps. total_batch_size: tokens in
    each. flops_per_token: of training. lr_factor, decay_factor: of all learning rates, and of Muon's weight decay.
    """

    shape: GPTConfig
    parameters: int
    num_iterations: int
    total_batch_size: int
    flops_per_token: float
    lr_factor: float
    decay_factor: float

    @property
    def tokens(self) -> int:
        return self.num_iterations * self.total_batch_size


def model_shape(shape: Any, vocab_size: int) -> GPTConfig:
    """Return the model of a recipe's Shape, or of flags with the same names. Raises UserError where they make none."""
    pattern = shape.layer_pattern * (shape.depth if len(shape.layer_pattern) == 1 else 1)
    parts = {field.name: getattr(shape, field.name) for field in fields(Shape)
             if field.name not in ("depth", "max_seq_len", "layer_pattern", "window")}
    try:
        return GPTConfig.from_depth(shape.depth, sequence_len=shape.max_seq_len, vocab_size=vocab_size,
                                    layer_pattern=pattern or None, window=shape.window or None, **parts)
    except ValueError as error:
        raise UserError(f"these flags make no model: {error}") from error


def flags_of(part: Any) -> SimpleNamespace:
    """Return a part of a recipe as flags: its fields, and those of its parts, side by side."""
    return SimpleNamespace(**dict(fields_of(part)))


def horizon_of(config: Any, vocab_size: int) -> BaseRun:
    """Return what flags of base training come to.

    Args:
        config: flags with the names of the fields of BaseRecipe and its parts; see `flags_of`.
        vocab_size: of the tokenizer.

    Raises:
        UserError: they make no model, no horizon, or one of less than a step.
    """
    shape = model_shape(config, vocab_size)
    model = meta_model(shape)
    parameters, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token()
    horizon = Horizon(config.num_iterations, config.target_flops, config.target_param_data_ratio, config.ratio_of)
    counted = parameters if config.ratio_of == "all" else scaling_parameters(model)
    reference = reference_tokens(config, shape)
    batch = config.total_batch_size
    if batch == "auto":
        wanted = replace(horizon, num_iterations=-1).steps(counted, flops, 1)  # tokens
        if not wanted or not reference:
            raise UserError("--total-batch-size=auto follows --target-param-data-ratio and --reference-depth, which "
                            "must be above 0: set them, or give the batch in tokens")
        batch = automatic_batch(wanted, reference)
    steps = horizon.steps(counted, flops, batch)
    if steps is None:
        raise UserError(NO_HORIZON)
    if steps < 1:
        raise UserError(f"the horizon is less than one step of {batch:,} tokens: set --num-iterations, or a smaller "
                        "--total-batch-size")
    return BaseRun(shape, parameters, steps, batch, flops, rate_factor(batch, config.reference_batch),
                   decay_factor(batch, config.reference_batch, steps * batch, reference))


def scaling_parameters(model: GPT) -> int:
    """Return how many parameters the matrices of the blocks and the head have: those that cost FLOPs."""
    matrices = (p for group in parameter_groups(model) if group["kind"] == "muon" for p in group["params"])
    return sum(p.numel() for p in matrices) + model.lm_head.weight.numel()


def reference_tokens(config: Any, shape: GPTConfig) -> float:
    """Return the horizon, in tokens, of the model of reference_depth under the same flags; 0 where there is none."""
    if config.reference_depth < 1 or config.target_param_data_ratio <= 0:
        return 0.0
    pattern = config.layer_pattern if len(config.layer_pattern) == 1 else ""  # that of another depth fits no other
    other = SimpleNamespace(**{**vars(config), "depth": config.reference_depth, "layer_pattern": pattern})
    return config.target_param_data_ratio * scaling_parameters(meta_model(model_shape(other, shape.vocab_size)))
