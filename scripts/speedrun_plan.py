"""What a speedrun does, decided before anything is done: recipe, text, batch and commands for this machine and its
settings.

    plan = make_plan(find_machine())        # reads the environment: SPEEDRUN_PROFILE, SPEEDRUN_TEXT, ...
    for command in commands(plan):
        print(command.shell())              # what to type; scripts/speedrun.py runs the same list
"""

import importlib
import math
import os
import platform
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from nanochat.checks import need_writable
from nanochat.cli import COUNT, ROWS, Range, flag, near_name, parse, parse_settings
from nanochat.dataset.__main__ import ImportFlags
from nanochat.dataset.readers import TextFormat, look_at_files
from nanochat.dataset.shards import FINEWEB_EDU, HUB_TEXTS, data_dir, read_source
from nanochat.distributed import Ranks, compute_dtype, peak_flops
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.gpt import GPTConfig
from nanochat.logs import available_cores
from nanochat.memory import MicroBatch, choose_batch, rows_that_divide
from nanochat.recipe import MOST_ROWS, PROFILES, RECIPES, Recipe, Rows, at_depth, changed_flags, published
from nanochat.run import BaseRun, RecipeName, flags_of, horizon_of, model_shape
from nanochat.stages import CHAT_STAGES, STAGES, Stage
from nanochat.training import share_of_micro_batches
from tasks.hub import MIRROR, find_in_mirror
from tasks.recipes import hub_splits

CHARS_PER_TOKEN = 4.8                      # of FineWeb-Edu and 65,536 tokens; taken for ClimbMix and 32,768 too
SHARD_CHARS, SHARD_BYTES = 250e6, 100e6
TOKENIZER_SHARDS = 8                       # hold the 2 billion characters that the tokenizer is trained on
EXPECTED_MFU = 0.5
CALLED_FROM = "NANOCHAT_CALLED_FROM"       # the folder where speedrun.sh was started


@dataclass
class Machine:
    """What there is to train on. gpu_memory: bytes of the smallest GPU."""

    gpus: list[str]
    gpu_memory: int
    cores: int
    name: str = field(default_factory=platform.machine)

    def describe(self) -> str:
        """Return the machine in a few words."""
        if self.gpus:
            kinds = ", ".join(f"{self.gpus.count(kind)} × {kind}" for kind in sorted(set(self.gpus)))
            return f"{kinds} with {self.gpu_memory / 1e9:.0f} GB each, {self.cores} CPU cores"
        return f"no GPU, {self.cores} CPU cores ({self.name})"


@dataclass
class Settings:
    """Settings of a speedrun in the environment, each SPEEDRUN_ and its name in capitals."""

    profile: str = flag("", f"what is trained, one of {', '.join(PROFILES)}; unset: what fits the machine")
    recipe: Literal[Literal[""], RecipeName] = flag("", "how a profile d12 to d32 is trained; unset: published")
    text: str = flag("", "files and folders of your own text")
    text_flags: str = flag("", "flags of `python -m nanochat.dataset import` for them")
    gpus: int = flag(-1, "GPUs to use; unset: all", within=Range(0, 1024))
    device_batch: int = flag(0, "rows a GPU takes at a time; unset: what fits its memory", within=ROWS)
    steps: int = flag(0, "optimizer steps of the base model; unset: the recipe's", within=COUNT)
    shards: int = flag(0, "shards of the hub's text; unset: what the steps need", within=COUNT)
    rl: Literal["", "1", "0"] = flag("", "with reinforcement learning, or without; unset: as the recipe")
    max_restarts: int = flag(3, "how often a stage is started again where a process ends on its own",
                             within=Range(0, 1000))


def settings() -> Settings:
    """Return the settings of this process's environment. Raises UserError for a name or a value that is wrong."""
    found = parse_settings(Settings, "SPEEDRUN_")
    if found.profile and found.profile not in PROFILES:
        near = near_name(found.profile, PROFILES)
        raise UserError(f"SPEEDRUN_PROFILE is {found.profile!r}: it must be one of {', '.join(PROFILES)}."
                        + (f" Did you mean {near}?" if near else ""))
    if found.text_flags and not found.text.strip():
        raise UserError("SPEEDRUN_TEXT_FLAGS is set, but SPEEDRUN_TEXT is not: it names the text they are for.")
    return found


def find_machine() -> Machine:
    """Look at this machine. SPEEDRUN_GPUS limits the GPUs; UserError where it names more than there are."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = settings().gpus
    wanted = count if given < 0 else given
    if wanted > count:
        raise UserError(f"SPEEDRUN_GPUS is {wanted}, but this machine shows {count} GPU{'s' if count != 1 else ''}.")
    devices = [torch.cuda.get_device_properties(i) for i in range(wanted)]
    return Machine([d.name for d in devices], min((d.total_memory for d in devices), default=0), available_cores())


def text_paths(text: str) -> list[str]:
    """Return the files and folders that SPEEDRUN_TEXT names: one path that exists, whatever characters it has; else one
    a line, where all lines exist; else several with spaces between, those with spaces or quotes of their own in quotes.

    Raises UserError where a quote is not closed.
    """
    if not text.strip():
        return []
    for parts in ([text], [line.strip() for line in text.splitlines() if line.strip()]):
        found = [_from_there(part) for part in parts]
        if all(map(os.path.exists, found)):  # unlike Path.exists, False for a name that is too long
            return found
    try:
        return [_from_there(part) for part in shlex.split(text)]
    except ValueError as error:
        raise UserError(f"SPEEDRUN_TEXT is {text!r}: there is no such file or folder, and it is no list of them: "
                        f"{str(error).lower()}. Give one path as it is, one a line, or put each in double "
                        "quotes.") from error


def _from_there(path: str) -> str:
    """Return a path as seen from the folder where speedrun.sh was started: it changes to the project's."""
    path, there = os.path.expanduser(path), os.environ.get(CALLED_FROM)
    return path if os.path.isabs(path) or not there or there == os.getcwd() else os.path.join(there, path)


def import_flags(text: str) -> ImportFlags:
    """Return the flags of SPEEDRUN_TEXT_FLAGS. Raises UserError, or SystemExit with a line, where they are wrong."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"SPEEDRUN_TEXT_FLAGS is {text!r}: {str(error).lower()}.") from error
    flags = parse(ImportFlags, words)
    if flags.to or flags.dry_run:
        raise UserError(f"SPEEDRUN_TEXT_FLAGS is {text!r}: --to and --dry-run do not go with a speedrun.")
    return flags


def hub_reachable() -> bool:
    """Return whether the Hugging Face hub (or HF_ENDPOINT) answers within a few seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a welcome
    except (OSError, ValueError):
        return False
    return True


@dataclass
class RunPlan:
    """What a speedrun will do.

    profile: name of the recipe. source: of the text, "small-world", "import" or one of the hub's.
    text, text_flags: paths to import, and flags of the import.
    steps: optimizer steps of the base model. device_batch: rows a device takes at a time in base and mid-training.
    batch: the micro-batch of base training that is expected with "auto".
    shards: of the hub's text. seconds: of base training, None where the device's speed is not known. disk: bytes.
    chat: data of the chat stages, "small-world", "hub" or "basics", or "" where there are none, for the reason
        why_no_chat.
    """

    profile: str
    recipe: Recipe
    machine: Machine
    source: str
    text: list[str]
    steps: int
    device_batch: Rows
    batch: MicroBatch
    shards: int
    seconds: float | None
    disk: float
    chat: str
    why_no_chat: str = ""
    text_flags: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        return self.recipe.base.shape.depth

    @property
    def model_config(self) -> GPTConfig:
        return model_shape(self.recipe.base.shape, self.recipe.tokenizer.vocab_size)

    @property
    def tag(self) -> str:
        """The name of the model's checkpoint folder in each stage."""
        return f"d{self.depth}"


def run_of(recipe: Recipe) -> BaseRun:
    """Return what the recipe's base training comes to: model, steps, batch."""
    return horizon_of(flags_of(recipe.base), recipe.tokenizer.vocab_size)


def make_plan(machine: Machine) -> RunPlan:
    """Choose recipe, text, batch and shards for this machine and the environment.

    Raises UserError for a setting that is wrong, text of another run in the way, or no text to be had.
    """
    given = settings()
    name = given.profile or (f"d{RECIPES[given.recipe or 'published'].base.shape.depth}" if machine.gpus else "small")
    recipe = PROFILES[name]
    if given.recipe and name == "small":
        raise UserError("SPEEDRUN_RECIPE is for the profiles d12 to d32; small has a recipe of its own. Unset it, or "
                        "set SPEEDRUN_PROFILE too.")
    if given.recipe:
        recipe = at_depth(recipe.base.shape.depth, RECIPES[given.recipe])
    text = text_paths(given.text)
    text_flags = tuple(shlex.split(given.text_flags)) if import_flags(given.text_flags) else ()
    there = read_source(data_dir()).get("source") if data_dir().is_dir() else None
    source = "import" if text else recipe.source
    if source in HUB_TEXTS and there != source and not hub_reachable():
        raise UserError(
            f"the Hugging Face hub cannot be reached, so {HUB_TEXTS[source].title} cannot be fetched for {name}. Train "
            "on your own text instead: SPEEDRUN_TEXT=\"PATH ...\" bash speedrun.sh; or on the built-in small world: "
            "SPEEDRUN_PROFILE=small bash speedrun.sh")
    if there and there != source:
        raise UserError(f"{data_dir()} holds text of another kind ({there}) than this run would train on ({source}). "
                        f"Keep both: NANOCHAT_BASE_DIR={base_dir()}-{name} bash speedrun.sh")
    chat, why = "small-world" if source == "small-world" else "hub", ""
    if chat == "hub" and name == "small":
        chat = "basics"  # the published conversations are too many and too hard for it
    elif chat == "hub" and not os.environ.get("NANOCHAT_TASK_DATA") and not hub_reachable():
        chat = ""
        why = "the Hugging Face hub cannot be reached, and NANOCHAT_TASK_DATA names no mirror of its data sets"
    device = "cuda" if machine.gpus else "cpu"
    return sized_plan(name, recipe, machine, source=source, text=text, text_flags=text_flags, chat=chat,
                      why_no_chat=why, steps=given.steps, shards=given.shards, device_batch=given.device_batch,
                      dtype=compute_dtype(device), peak=peak_flops(device, compute_dtype(device)))


def sized_plan(name: str, recipe: Recipe, machine: Machine, *, source: str, chat: str, text: Sequence[str] = (),
               text_flags: Sequence[str] = (), why_no_chat: str = "", steps: int = 0, shards: int = 0,
               device_batch: int = 0, dtype: torch.dtype = torch.bfloat16, peak: float | None = None) -> RunPlan:
    """Return the plan of a run, with what follows from recipe and machine: steps, shards, micro-batch, time, disk.

    Args:
        name, source, chat, text, text_flags, why_no_chat: as in RunPlan.
        steps, shards, device_batch: instead of those that follow; 0 for these.
        dtype: of the matrix products.
        peak: FLOP/s of a device; None where that is not known.
    """
    run, gpus = run_of(recipe), max(1, len(machine.gpus))
    recipe = replace(recipe, base=replace(recipe.base, total_batch_size=run.total_batch_size))
    base, steps = recipe.base, steps or run.num_iterations
    tokens = steps * run.total_batch_size
    shards = shards or math.ceil(1.03 * tokens * CHARS_PER_TOKEN / SHARD_CHARS)
    return RunPlan(
        profile=name, recipe=recipe, machine=machine, source=source, text=list(text), steps=steps,
        device_batch=device_batch or base.device_batch_size,
        batch=batch_for(recipe, machine, run.shape, device_batch, dtype),
        shards=shards, seconds=None if peak is None else tokens * run.flops_per_token / (peak * EXPECTED_MFU * gpus),
        disk=16 * run.parameters * 6 + (shards * SHARD_BYTES if source in HUB_TEXTS else 200e6), chat=chat,
        why_no_chat=why_no_chat, text_flags=tuple(text_flags))


def batch_for(recipe: Recipe, machine: Machine, shape: GPTConfig, device_batch: int, dtype: torch.dtype) -> MicroBatch:
    """Return the micro-batch that the base model's training will choose, by the memory of the GPUs.

    device_batch: rows that were asked for; 0 for the recipe's.
    """
    base, gpus = recipe.base, max(1, len(machine.gpus))
    total = base.total_batch_size // base.shape.max_seq_len
    given = device_batch or base.device_batch_size
    candidates = rows_that_divide(total, gpus, MOST_ROWS["base"]) if given == "auto" else [given]
    return choose_batch(shape, base.shape.max_seq_len, candidates, gpus, dtype=dtype,
                        memory=machine.gpu_memory or None, total_rows=total, recompute=base.recompute)


def accumulation_of(plan: RunPlan) -> int:
    """Return the micro-batches of one device in an optimizer step of the base model."""
    base = plan.recipe.base
    tokens = plan.batch.rows * base.shape.max_seq_len * max(1, len(plan.machine.gpus))
    return max(1, math.ceil(base.total_batch_size / tokens))


def chat_stages(plan: RunPlan) -> list[Stage]:
    """Return the stages after the base model that this run trains: the recipe's, with or without "rl" as SPEEDRUN_RL
    says."""
    wish = settings().rl
    wanted = {*plan.recipe.stages, "rl"} if wish == "1" else {*plan.recipe.stages} - ({"rl"} if wish == "0" else set())
    return [stage for stage in CHAT_STAGES if plan.chat and stage.name in wanted]


@dataclass(frozen=True)
class Command:
    """One command of a speedrun.

    title: what is printed above it. module, flags: what Python runs, one process a GPU where there are several.
    beside: it runs in the background, beside the commands after it.
    awaits: what runs in the background must have ended before the command after this one.
    grades: the stage whose checkpoint it evaluates. Such a command leaves no checkpoint that says it is done.
    """

    title: str
    module: str
    flags: tuple[str, ...] = ()
    gpus: int = 0
    beside: bool = False
    awaits: bool = False
    grades: str = ""

    def argv(self) -> list[str]:
        """Return the command for subprocess, with this Python."""
        return [sys.executable, *self._arguments()]

    def shell(self) -> str:
        """Return the command as it is typed where the virtual environment is active."""
        return shlex.join(["python", *self._arguments()]) + (" &" if self.beside else "")

    def _arguments(self) -> list[str]:
        if self.gpus > 1:
            return ["-m", "scripts.launch", f"--ranks={self.gpus}", self.module, "--", *self.flags]
        return ["-m", self.module, *self.flags]


def commands(plan: RunPlan) -> list[Command]:
    """Return all commands of the run, in order. A flag is there only where its value is not the script's default."""
    recipe, gpus = plan.recipe, len(plan.machine.gpus)
    default = RECIPES[recipe.name]  # what --recipe sets
    named = () if default is published else (f"--recipe={recipe.name}",)
    base = replace(recipe.base, horizon=replace(recipe.base.horizon, num_iterations=plan.steps),
                   device_batch_size=plan.device_batch)
    rows = plan.batch.rows if plan.device_batch == "auto" else plan.device_batch
    base_eval = replace(recipe.base_eval, device_batch_size=rows)
    parts = {"base": base, "mid": replace(recipe.mid, device_batch_size=plan.device_batch),  # rows as the base model's
             "sft": recipe.sft, "rl": recipe.rl}
    wandb = (f"--run={os.environ['WANDB_RUN']}",) if os.environ.get("WANDB_RUN") else ()
    tag = f"--model-tag={plan.tag}"

    result = [
        *_text(plan),
        Command("tokenizer", "scripts.tok_train", (*changed_flags(recipe.tokenizer, published.tokenizer),)),
        Command("base model", STAGES["base"].script,
                (*named, f"--depth={plan.depth}", *(flag for flag in changed_flags(base, default.base)
                                                    if not flag.startswith("--depth=")),
                 *((f"--shards={plan.shards}",) if plan.source in HUB_TEXTS else ()), *wandb), gpus, awaits=True),
        Command("evaluation of the base model", "scripts.base_eval",
                (tag, *changed_flags(base_eval, published.base_eval)), gpus, grades="base"),
    ]
    basics = plan.chat == "basics"
    if plan.chat:
        about = ("--data=the text that I was given", "--questions=") if basics else ()
        result.append(Command("who it is", "dev.gen_identity",
                              (*changed_flags(recipe.identity, published.identity), *about)))
    for stage in chat_stages(plan):
        flags = changed_flags(parts[stage.name], getattr(default, stage.name))
        result += [
            Command(stage.noun, stage.script,
                    (*named, tag, *flags, *(("--data=basics",) if basics else ()), *wandb), gpus),
            Command(f"grading after {stage.noun}", "scripts.chat_eval",
                    (f"--source={stage.name}", tag, *changed_flags(recipe.chat_eval, published.chat_eval)), gpus,
                    grades=stage.name),
        ]
    return [*result, Command("report", "nanochat.report", ("generate",))]


def check_plan(plan: RunPlan) -> None:
    """Look at everything that a run needs before its first command, so that no stage finds it missing after hours.

    Raises:
        UserError: text that cannot be read, data sets that a mirror lacks, flags that do not fit one another, or
            folders that cannot be written. SystemExit, with a line, for a flag that a command does not know.
    """
    for folder in ("base_data", "tokenizer", "logs", "report", *(stage.folder for stage in STAGES.values())):
        need_writable(base_dir() / folder)
    for command in commands(plan):
        script = importlib.import_module(command.module)
        if hasattr(script, "Config"):
            parse(script.Config, command.flags)
    base, gpus = plan.recipe.base, max(1, len(plan.machine.gpus))
    share_of_micro_batches(base.total_batch_size, plan.device_batch, base.shape.max_seq_len,
                           Ranks(0, 0, gpus, torch.device("cpu")))
    if plan.source == "import":
        flags = parse(ImportFlags, plan.text_flags)
        for path in plan.text:
            if not os.path.exists(path):
                several = len(plan.text) > 1
                raise UserError(f"SPEEDRUN_TEXT: {path} does not exist."
                                + (f" It was read as {len(plan.text)} paths, since none has the whole name; put quotes "
                                   "around a path with spaces." if several else ""))
        look_at_files(plan.text, TextFormat(flags.doc_separator.strip(), flags.text_column, flags.encoding))
    mirror = os.environ.get(MIRROR)
    if plan.chat == "hub" and mirror:
        for name, subset, split in hub_splits([stage.name for stage in chat_stages(plan)], plan.recipe):
            find_in_mirror(Path(mirror).expanduser(), name, subset, split)


def _text(plan: RunPlan) -> list[Command]:
    """Return the commands for the text. The first shards of the hub's are enough for the tokenizer and the base model
    to begin; the others are fetched meanwhile."""
    module = "nanochat.dataset"
    if plan.source == "import":
        return [Command("text", module, ("import", *plan.text_flags, *plan.text))]
    if plan.source == "small-world":
        return [Command("text", module, ("small-world", f"--docs={plan.recipe.docs}"))]
    first = min(plan.shards, TOKENIZER_SHARDS)
    which = () if plan.source == FINEWEB_EDU else (f"--source={plan.source}",)
    rest = [Command("rest of the text, in the background", module, ("-n", str(plan.shards), *which), beside=True)]
    return [Command("text", module, ("-n", str(first), *which)), *(rest if plan.shards > first else [])]
