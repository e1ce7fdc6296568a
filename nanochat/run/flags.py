"""Flags that all stages share, the command line of a stage, and what is decided from both before it begins."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch

from nanochat.checkpoint.meta import read_meta, steps_in
from nanochat.checks import check_batch, check_tag, conversation_files, dry_run_flag
from nanochat.cli import COUNT, COUNT_OR_ALL, EVERY, NOT_NEGATIVE, SEED, STEP_OR_LAST, flag, parse
from nanochat.distributed import Ranks, joined_ranks, on_main
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.guard import CHECK_EVERY, GUARD
from nanochat.kernels.choose import Choice, Wish, apply_wish, choose, parse_wish, wish_of_environment
from nanochat.kernels.dispatch import TrainingShape, has_triton
from nanochat.loading import checkpoint_dir
from nanochat.logs import check_wandb
from nanochat.memory import RECOMPUTE_HELP, fit_batch
from nanochat.recipe import (
    MUON_EXTRAS,
    RECIPES,
    OptimizerGroup,
    Recipe,
    Recompute,
    fields_of,
    override,
    published,
)

C = TypeVar("C")
RecipeName = Literal[tuple(RECIPES)]
ChatData = Literal["auto", "hub", "small-world", "basics"]  # of the flag --data: tasks/recipes.py


def save_every_flag(default: int) -> Any:
    """Return the field of the flag --save-every."""
    return flag(default, "steps from one checkpoint to the next; -1 = at the end only", within=EVERY)


def keep_flag(default: int) -> Any:
    """Return the field of the flag --keep."""
    return flag(default, "periodical checkpoints to keep, beside the one of them with the best validation and those of "
                "--keep-every; the last one always stays", within=COUNT)


def optimizer_flags(recipe: Recipe) -> dict[str, Any]:
    """Return the flags of a stage that a recipe's optimizer groups set."""
    groups = recipe.groups
    return {"embedding_lr": groups["wte"].lr, "unembedding_lr": groups["lm_head"].lr,
            "matrix_lr": groups["matrices"].lr, "matrix_decay": groups["matrices"].weight_decay,
            "muon_extras": ",".join(groups["matrices"].extras)}


@dataclass
class TrainingFlags:
    """Flags of every stage that trains; the defaults are those after the base model.

    --recipe sets the defaults of the others: those of fields of the recipe's part of this stage, which have the same
    names, and those of the optimizer.
    """

    stage: ClassVar[str] = "mid"

    run: str = flag("dummy", "name of the wandb run; dummy means no wandb")
    recipe: RecipeName = flag("published", "what the other flags default to; "
                                                  "--recipe=modern --help shows its numbers")
    optimizer: Literal[Literal[""], RecipeName] = flag("", "recipe whose optimizer groups are used; unset: --recipe")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    model_tag: str = flag("", "which model to start from; unset takes the only or the deepest one. "
                              "The result has the same name")
    embedding_lr: float = flag(published.groups["wte"].lr, "learning rate of the embedding (AdamW)",
                               within=NOT_NEGATIVE)
    unembedding_lr: float = flag(published.groups["lm_head"].lr, "learning rate of the head (AdamW)",
                                 within=NOT_NEGATIVE)
    matrix_lr: float = flag(published.groups["matrices"].lr,
                            "learning rate of the matrices (Muon) and of the convolution taps (AdamW)",
                            within=NOT_NEGATIVE)
    weight_decay: float | None = flag(None, "weight decay of all that AdamW trains; unset: as the optimizer's groups",
                                      within=NOT_NEGATIVE)
    matrix_decay: float = flag(published.groups["matrices"].weight_decay,
                               "weight decay of the matrices, which falls to 0 along the run", within=NOT_NEGATIVE)
    muon_extras: str = flag(",".join(published.groups["matrices"].extras),
                            f"what Muon does besides, with commas between: {', '.join(MUON_EXTRAS)}")
    grad_clip: float = flag(published.grad_clip, "largest gradient norm; 0 = no limit", within=NOT_NEGATIVE)
    reduce_dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "what several processes send gradients in; bfloat16 is half the bytes, and is summed in float32")
    recompute: Recompute = flag(published.mid.recompute, RECOMPUTE_HELP)
    save_every: int = save_every_flag(published.mid.save_every)
    keep: int = keep_flag(published.mid.keep)
    keep_every: int = flag(-1, "periodical checkpoints of a step that is a multiple of this stay for good; -1 = none",
                           within=COUNT_OR_ALL)
    guard: Literal["skip", "stop", "off"] = flag("skip", GUARD)
    check_every: int = flag(100, CHECK_EVERY, within=EVERY)
    kernels: str = flag("auto", "implementations of the fused operations: auto (measured on GPUs), measure (anew), "
                        "default (not measured), or by name, such as relu2:torch,attention:flash")
    fresh: bool = flag(False, "start anew where a run of the same tag stands; that one is moved aside, not deleted")
    dry_run: bool = dry_run_flag()

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> dict[str, Any]:
        """Return the defaults of the flags by name, for a command line that may name a recipe."""
        asked = _asked(argv)
        recipe = RECIPES[asked["recipe"]]
        values = {"grad_clip": recipe.grad_clip, **dict(fields_of(getattr(recipe, cls.stage))),
                  **optimizer_flags(RECIPES[asked["optimizer"] or recipe.name])}
        return {field.name: values[field.name] for field in fields(cls) if field.name in values}

    def check(self) -> None:
        """Raise UserError for flags that do not fit one another."""
        check_tag(self.model_tag)
        check_batch(self)
        if wrong := [word for word in self.muon_extras.split(",") if word and word not in MUON_EXTRAS]:
            raise UserError(f"--muon-extras: there is no {wrong[0]!r}; it takes {', '.join(MUON_EXTRAS)}, with commas "
                            "between")

    def groups(self, lr_factor: float = 1.0, decay_factor: float = 1.0) -> dict[str, OptimizerGroup]:
        """Return the optimizer's groups, with all learning rates and Muon's weight decay multiplied by these."""
        return override(RECIPES[self.optimizer or self.recipe].groups, matrix_lr=self.matrix_lr,
                        embedding_lr=self.embedding_lr, unembedding_lr=self.unembedding_lr,
                        weight_decay=self.weight_decay, matrix_decay=decay_factor * self.matrix_decay,
                        muon_extras=self.muon_extras, lr_frac=lr_factor)


def _asked(argv: Sequence[str]) -> dict[str, str]:
    """Return which recipe and optimizer a command line names; what is wrong with it is told later."""
    asked = {"recipe": "published", "optimizer": ""}
    for word, after in zip(argv, [*argv[1:], ""]):
        name, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else after
        if word.startswith("--") and name in asked and value in RECIPES:
            asked[name] = value
    return asked


@dataclass
class ChatStageFlags(TrainingFlags):
    """Flags of every stage after the base model."""

    recipe: Literal[Literal["auto"], RecipeName] = flag("auto", "what the other flags default to; auto is the recipe "
                                                          "that the base model was trained with")
    model_step: int = flag(-1, "which of its checkpoints; -1 is the last", within=STEP_OR_LAST)
    data: ChatData = flag("auto", "what to train on: the published mixture; conversations about the built-in small "
                          "world; or those that go with any text, who it is, sums and spelling. auto is that of the "
                          "stage before, and what goes with the base model")
    conversations: str = flag("", "further conversations, your own: .jsonl files, with commas between")
    num_iterations: int = flag(published.mid.num_iterations, "optimizer steps; -1 = num_epochs of the data",
                               within=COUNT_OR_ALL)
    init_lr_frac: float = flag(published.mid.init_lr_frac, "factor of all learning rates", within=NOT_NEGATIVE)
    seed: int = flag(published.mid.seed, "of the order of the conversations, and of what is sampled", within=SEED)

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> dict[str, Any]:
        """Return the defaults of the flags by name. At the end of base training Muon's weight decay has fallen to 0,
        and there it stays."""
        return {**super().defaults(argv), "matrix_decay": 0.0}

    def check(self) -> None:
        """Raise UserError for flags that do not fit one another, and for files that are not there."""
        super().check()
        for path in conversation_files(self.conversations):
            if not path.is_file():
                raise UserError(f"--conversations: there is no file {path}")


def launch(flags: type[C], run: Callable[[C, Ranks], None], argv: Sequence[str] | None, description: str) -> None:
    """Parse the command line, join the ranks and call run(config, ranks): the `main` of every training script."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parse(flags, argv, description)
    parse_wish(config.kernels)  # raises for names that do not exist, before anything is loaded
    try:
        with joined_ranks(config.device_type) as ranks:
            on_main("looking at wandb", lambda: check_wandb(config.run), ranks)
            if isinstance(config, ChatStageFlags):
                before = on_main("looking at how the model was trained", lambda: config_of_model(config), ranks)
                if config.recipe == "auto":
                    argv.append(f"--recipe={recipe_of(before)}")
                    config = parse(flags, argv, description)
                if getattr(config, "inherit", False):
                    config = parse(flags, argv, description, inherited(config, before))
            run(config, ranks)
    finally:
        apply_wish(Wish())  # the choice was that of this run


def config_of_model(config: Any) -> dict[str, Any]:
    """Return the flags that the model was trained with which a chat stage starts from, as its meta file says.

    They are empty where it does not say, or there is no model: what is wrong is told by who loads it.
    """
    for stage in dict.fromkeys((getattr(config, "source", "base"), "base")):
        with suppress(UserError):
            folder = checkpoint_dir(stage, config.model_tag or None)
            for step in steps_in(folder) if config.model_step < 0 else [config.model_step]:
                with suppress(UserError):
                    return read_meta(folder, step).get("user_config") or {}
    return {}


def recipe_of(before: Mapping[str, Any]) -> str:
    """Return the name of the recipe of a model that was trained with these flags."""
    return before["recipe"] if before.get("recipe") in RECIPES else published.name


def inherited(config: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that a stage takes over from those that its model was trained with.

    They are those of the batch, and of the optimizer where the stage's is of the same recipe. Muon's weight decay is
    none of them.
    """
    batch = before.get("total_batch_size")
    names = ["total_batch_size", "reference_batch"] if isinstance(batch, int) and batch > 0 else []
    if (before.get("optimizer") or recipe_of(before)) == (config.optimizer or config.recipe):
        names += ["embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay", "muon_extras"]
    known = {field.name for field in fields(config)}
    return {name: before[name] for name in names if name in known and name in before}


def compile_wanted(choice: str, ranks: Ranks) -> bool:
    """Return whether the blocks are to be compiled, by the flag --compile: yes, no, or auto (on GPUs that can)."""
    if choice not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {choice!r}")
    if choice == "no" or ranks.device.type != "cuda":
        return choice == "yes"
    if torch.version.hip is None and not has_triton(ranks.device, (7, 0)):
        why = ("torch.compile needs Triton and a GPU of compute capability 7.0 or later; this is "
               f"{torch.cuda.get_device_name(ranks.device)}")
        if choice == "yes":
            raise UserError(f"--compile=yes, but {why}. Use --compile=auto or --compile=no.")
        if ranks.is_main:
            print(f"note: {why}: the blocks run uncompiled, slower")
        return False
    return True


def choose_kernels(config: Any, model: GPT, B: int, T: int, compiled: bool, ranks: Ranks) -> Choice:
    """Choose the implementations of the fused operations for this run, by the flag --kernels. Collective.

    Rank 0 measures where that is wanted, and all ranks do the same. Call it before anything is compiled.

    Args:
        B, T: rows and tokens of a micro-batch
        compiled: whether the blocks will be compiled

    Raises:
        UserError: --kernels or NANOCHAT_KERNELS names what does not exist
    """
    wish = parse_wish(config.kernels) if config.kernels != "auto" else wish_of_environment()
    shape = model.config
    sizes = TrainingShape(
        B=B, T=T, E=shape.n_embd, H=shape.n_head, G=shape.n_kv_head, D=shape.n_embd // shape.n_head, K=shape.n_kernel,
        V=shape.vocab_size, window=shape.window, matrices=-(-shape.n_layer // ranks.world_size))
    choice = on_main("measuring kernels", lambda: choose(wish, sizes, ranks.device, model.dtype, compiled), ranks)
    choice.apply()
    return choice


def fit_and_choose(config: Any, model: GPT, T: int, total_rows: int | None, most: int, ranks: Ranks, *,
                   meta: dict[str, Any], compiled: bool = False) -> tuple[Any, Choice]:
    """Decide rows, activation checkpointing and kernels, and prepare the model for them. Collective.

    Kernels are chosen between counting the rows and trying them, since nothing is compiled before they are.

    Args:
        config: the flags. They are not changed.
        model, T, total_rows, most, meta, compiled: as in `nanochat.memory.fit_batch`.

    Returns:
        The flags as `fit_batch` returns them, and the choice of kernels.
    """
    kernels: list[Choice] = []
    config = fit_batch(config, model, T, total_rows, most, ranks, meta=meta, compiled=compiled,
                       ready=lambda rows: kernels.append(choose_kernels(config, model, rows, T, compiled, ranks)))
    return config, kernels[0]
