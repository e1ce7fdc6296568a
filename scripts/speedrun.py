"""All stages in order: text, tokenizer, base model, mid-training, fine-tuning, reinforcement learning, gradings, the
report.

    bash speedrun.sh                        # sets up this machine, then runs this
    python -m scripts.speedrun --dry-run    # says what would be done and prints the commands, and does nothing

It looks at the machine, says what it will do, how long that takes and how much disk it needs, and does it. A stage that
is done is skipped, so the same command resumes after an interruption. Ctrl-C, SIGTERM and a closed terminal let the
stage save and end first (nanochat/launcher.py); Ctrl-C again ends it at once. Settings, all optional, from the
environment:

    SPEEDRUN_PROFILE=small|d12|d18|...    what is trained (nanochat/recipe/): small is for a CPU, on the built-in small
                                          world; d12, d18, d20, d22, d24, d26, d32 are models of these depths, for GPUs.
                                          Unset: d20 with a GPU (d24 by the recipe modern), else small.
    SPEEDRUN_RECIPE=published|modern      how they are trained. Unset: published
    SPEEDRUN_TEXT="PATH ..."              train on your own .txt, .md, .jsonl, .parquet files or folders: one path as
                                          it is, one a line, or several with spaces between
    SPEEDRUN_TEXT_FLAGS="--encoding ..."  flags of `python -m nanochat.dataset import` for these
    SPEEDRUN_GPUS=N                       GPUs to use. Unset: all
    SPEEDRUN_DEVICE_BATCH=N               rows a GPU takes at a time. Unset: what fits its memory
    SPEEDRUN_STEPS=N                      optimizer steps of the base model. Unset: the recipe's
    SPEEDRUN_SHARDS=N                     shards of the hub's text to fetch. Unset: what the steps need
    SPEEDRUN_RL=1|0                       with reinforcement learning, or without. Unset: with small alone
    NANOCHAT_TASK_DATA=FOLDER             a mirror of the data sets of the chat stages, for machines without network
                                          (tasks/hub.py)
    SPEEDRUN_MAX_RESTARTS=N               how often a stage is started again, from its last checkpoint, where a process
                                          of it is killed, fails or hangs; not where there is something to mend.
                                          Unset: 3
    NANOCHAT_HANG_WARN=S, _HANG_END=S     seconds after which a rank that hangs is named, and ended. Unset: 120, 600
    NNODES=N NODE_RANK=K                  this machine is node K of N, which all run this command (scripts/nodes.py);
    MASTER_ADDR=HOST MASTER_PORT=P        node 0 listens at HOST, port P (29500)
    WANDB_RUN=NAME                        log to wandb under this name
    NANOCHAT_BASE_DIR=FOLDER              where everything is kept. Unset: ~/.cache/nanochat
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.measure import table
from nanochat.checkpoint import latest_step
from nanochat.cli import NOT_NEGATIVE, flag, parse, run_main
from nanochat.dataset import shard_paths
from nanochat.dataset.shards import HUB_TEXTS
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, lock, need_disk
from nanochat.launcher import Group, Job, Owner
from nanochat.logs import check_wandb, log_path, print_line, read_log
from nanochat.small_world import facts
from nanochat.stages import STAGES
from nanochat.tokenizer import RustBPETokenizer, tokenizer_dir
from nanochat.training import clock
from nanochat.watch import hang_seconds
from scripts.estimate import PRICE, card_named, choices, stage_lines
from scripts.nodes import Leader, Place, follow, persist, place_of_environment
from scripts.speedrun_plan import Command, RunPlan, chat_stages, check_plan, commands, find_machine, make_plan, settings
from tasks.recipes import IDENTITY

MAKES_TEXT = ("nanochat.dataset", "scripts.tok_train", "dev.gen_identity")  # run by each node, if not on a shared disk
REPORT = "nanochat.report"


@dataclass
class Flags:
    """Flags of speedrun; the settings come from the environment."""

    setup_seconds: float = flag(0.0, "seconds the set-up took, for the total that is printed", within=NOT_NEGATIVE)
    dry_run: bool = flag(False, "say what would be done, print its commands, and do nothing")


def show_choices(plan: RunPlan) -> None:
    """Print what else could be trained on these GPUs, and what it costs, where their speed is known."""
    card = card_named(plan.machine.gpus[0]) if plan.machine.gpus else None
    if card is not None:
        rows = choices(plan.machine, card)
        print("What can be trained here. Minutes are computed, not measured; dollars at $"
              f"{PRICE:g} an hour for a GPU:\n\n"
              + table(["settings", "minutes", "$", "expected"], rows, (1, 2)) + "\n")


def announce(plan: RunPlan) -> None:
    """Print what will be done."""
    base = plan.recipe.base
    tokens = plan.steps * base.total_batch_size
    if plan.source in HUB_TEXTS:
        text = f"{HUB_TEXTS[plan.source].title} from the Hugging Face hub, {plan.shards} shards"
    else:
        text = {"small-world": "the built-in small world: made here, no network",
                "import": "your own text: " + shlex.join(plan.text)}[plan.source]
    card = card_named(plan.machine.gpus[0]) if plan.machine.gpus else None
    if card is not None:  # of all that is done; python -m scripts.plan prints the parts
        time_line = f"about {clock(sum(line.seconds for line in stage_lines(plan, card)))} in all, computed"
    elif plan.seconds is not None:
        time_line = f"about {clock(plan.seconds)} for training, beside fetching and evaluation"
    else:
        time_line = "unknown for this device"
    memory = f"{plan.batch.rows} rows of {base.shape.max_seq_len} at a time" + (
        f", {plan.batch.need / 1e9:.1f} GB a GPU" if plan.machine.gpus else "")
    print(f"machine   {plan.machine.describe()}\n"
          f"profile   {plan.profile}, recipe {plan.recipe.name}: a hybrid of depth {plan.depth}, "
          f"vocabulary {plan.recipe.tokenizer.vocab_size:,}, rows of {base.shape.max_seq_len}\n"
          f"text      {text}\n"
          f"training  {plan.steps:,} steps of {base.total_batch_size:,} tokens = {tokens / 1e6:,.1f}M tokens\n"
          f"then      {describe_chat_stages(plan)}\n"
          f"memory    {memory}\n"
          f"time      {time_line}\n"
          f"disk      {plan.disk / 1e9:.1f} GB in {base_dir()}\n", flush=True)


def describe_chat_stages(plan: RunPlan) -> str:
    """Return in words what comes after the base model."""
    stages = chat_stages(plan)
    if not plan.chat:
        return f"no chat stages: {plan.why_no_chat}"
    about = " (who it is, sums and spelling alone)" if plan.chat == "basics" else ""
    return ", ".join(stage.noun for stage in stages) + f"{about}, each graded; the report"


def print_commands(plan: RunPlan) -> None:
    """Print all commands of the run, one a line, as they are typed in the virtual environment."""
    print("commands  in order; those that are done are skipped\n")
    if name := os.environ.get("WANDB_RUN_GROUP"):
        print(f"export WANDB_RUN_GROUP={shlex.quote(name)}")
    print("source .venv/bin/activate")
    wait = False  # for a command in the background
    for command in commands(plan):
        print(command.shell())
        wait = wait or command.beside
        if wait and command.awaits:
            print("wait")
            wait = False


def run_commands(plan: RunPlan, place: Place | None = None) -> None:
    """Run all commands of the run that are not done. place: of this machine among several, which run them together.

    Raises:
        UserError: at the first that fails. SystemExit: Ctrl-C, SIGTERM or SIGHUP came, and all have ended.
    """
    listed = commands(plan)
    words, count = [command.shell() for command in listed], max(1, len(plan.machine.gpus))
    with Owner() as owner:
        if place is not None and place.node > 0:
            follow(owner, place, count, words, lambda number, group: start_local(owner, plan, listed[number], group),
                   again=max_restarts() > 0)
            return
        with Leader(place, count, words) if place is not None else nullcontext() as leader:
            background: Job | None = None
            for number, command in enumerate(listed):
                print_line(f"\n== {command.title} ({time.strftime('%H:%M:%S')})")
                alone = leader is None or command.module == REPORT
                if not alone and command.module in MAKES_TEXT:
                    leader.gather(owner)
                    alone = leader.all_share
                begin = None if alone else partial(start_on_nodes, owner, leader, plan, number, command)
                if is_done(plan, command) and (alone or command.grades):
                    print_line("done before")
                elif command.beside:
                    background = begin() if begin is not None else owner.start(command.title, command.argv())
                    continue
                else:
                    execute(owner, command, *([begin] if begin is not None else []))
                    if command.grades:
                        remember(plan, command)
                if background is not None and command.awaits:
                    if owner.wait(background):
                        print_line("note: not all text could be fetched; the base model has been trained without the "
                                   "rest")
                    background = None


def start_on_nodes(owner: Owner, leader: Leader, plan: RunPlan, number: int, command: Command) -> Job | None:
    """Start a command on all machines: as ranks of one job where it trains or evaluates, else on each by itself."""
    return leader.start(owner, number, lambda group: start_local(owner, plan, command, group), beside=command.beside,
                        together=command.module not in MAKES_TEXT)


def start_local(owner: Owner, plan: RunPlan, command: Command, group: Group | None) -> Job | None:
    """Start this machine's part of a command that several machines run. None where nothing is to be done."""
    if group is not None:
        return owner.start(command.title, [sys.executable, "-m", command.module, *command.flags],
                           ranks=max(1, len(plan.machine.gpus)), group=group)
    return None if is_done(plan, command) else owner.start(command.title, command.argv())


def execute(owner: Owner, command: Command, begin: Callable[[], Job] | None = None) -> None:
    """Run a command in processes of its own, and again where it fails by accident. begin: starts it where that is not
    this machine's business alone. Raises UserError where it fails, and what `Owner.wait` raises."""
    job = persist(owner, begin or (lambda: owner.start(command.title, command.argv())), max_restarts())
    code = job.code
    if code:
        mend = "" if code in (130, 143) else "mend what it says, then "  # stopped by itself: nothing to mend
        why = f" ({job.reason.rstrip('.')})" if job.reason else ""
        raise UserError(f"{command.module} ended with exit code {code}{why}; {mend}`bash speedrun.sh` resumes from "
                        "here.")


def max_restarts() -> int:
    """Return how often a command is started again. Raises UserError where SPEEDRUN_MAX_RESTARTS is none."""
    return settings().max_restarts


def is_done(plan: RunPlan, command: Command) -> bool:
    """Return whether a command need not run. Those that train or make text know themselves what is done."""
    if command.grades:
        key = checkpoint_key(plan, command.grades)
        return key is not None and _gradings().get(STAGES[command.grades].graded_by) == key
    if command.module == "scripts.tok_train":
        return have_tokenizer(plan)
    if command.module == "dev.gen_identity":
        return (base_dir() / IDENTITY).exists()
    return plan.source in HUB_TEXTS and command.module == "nanochat.dataset" and have_shards(plan.shards)


def remember(plan: RunPlan, command: Command) -> None:
    """Note in speedrun.json which checkpoint this command graded."""
    done = _gradings() | {STAGES[command.grades].graded_by: checkpoint_key(plan, command.grades)}
    with atomic_write(_gradings_path(), "w") as file:
        json.dump(done, file)


def _gradings_path() -> Path:
    return base_dir() / "speedrun.json"


def _gradings() -> dict[str, list]:
    """Return what `remember` noted: of each evaluation's log, the key of the checkpoint."""
    path = _gradings_path()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def checkpoint_key(plan: RunPlan, source: str) -> list | None:
    """Return what tells the newest whole model of a stage from others: tag, step, tokenizer, time of writing.

    None where there is none."""
    folder = base_dir() / STAGES[source].folder / plan.tag
    step = latest_step(folder, optimizer=False)
    return None if step is None else [plan.tag, step, RustBPETokenizer.from_directory(tokenizer_dir()).fingerprint(),
            (folder / f"meta_{step:06d}.json").stat().st_mtime_ns]


def have_shards(count: int) -> bool:
    """Return whether this many training shards are there."""
    try:
        return len(shard_paths("train")) >= count
    except UserError:
        return False


def have_tokenizer(plan: RunPlan) -> bool:
    """Return whether this run's tokenizer is there. Raises UserError if there is one of another size or text."""
    meta_path = tokenizer_dir() / "meta.json"
    if not meta_path.exists():
        return False
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    try:
        whole = RustBPETokenizer.from_directory(tokenizer_dir()).fingerprint() == meta.get("fingerprint")
    except UserError:
        return False
    if not whole:
        return False
    made_from, wanted = (meta.get("source") or {}).get("source"), plan.recipe.tokenizer.vocab_size
    if meta.get("vocab_size_asked") != wanted or made_from != plan.source:
        raise UserError(f"{tokenizer_dir()} holds a tokenizer of {meta.get('vocab_size_asked')} tokens from "
                        f"{made_from}, this run needs {wanted} from {plan.source}. Keep both: "
                        f"NANOCHAT_BASE_DIR={base_dir()}-{plan.profile} bash speedrun.sh")
    return True


def bytes_used() -> int:
    """Return the size of all files in the base folder."""
    return sum(path.stat().st_size for path in base_dir().rglob("*") if path.is_file())


def conclude(plan: RunPlan, seconds: float) -> None:
    """Print what was made, where, how good it is, and what to type next."""
    rows = read_log(log_path("base_eval", plan.tag))
    loss = next((row for row in reversed(rows) if row["kind"] == "loss"), {})
    world = next((row for row in reversed(rows) if row["kind"] == "small_world"), None)
    made = "a chat model" if plan.chat else "a base model"
    print(f"\n== done in {clock(seconds)}\n"
          f"made      {made} of depth {plan.depth}; {bytes_used() / 1e9:.2f} GB in {base_dir()}")
    if loss:
        print(f"quality   {loss['val_bpb']:.4f} bits per byte on validation text, "
              f"{loss['train_bpb']:.4f} on training text")
    if world and plan.source == "small-world":
        print(f"          {world['world']:.0%} of the small world's facts, asked in phrasings it never saw them in "
              f"(untrained {world['untrained']:.0%}, chance {world['chance']:.0%})")
    stages = chat_stages(plan)
    for stage in stages:
        rows = read_log(log_path(stage.graded_by, plan.tag))
        graded = [row["tasks"] for row in rows if row["kind"] == "chatcore"]
        if graded:
            results = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in graded[-1].items())
            print(f"{stage.name:9s} {results}")
    for stage in (STAGES["base"], *stages):
        rows = read_log(log_path(stage.name, plan.tag))
        verdict = next((row for row in reversed(rows) if row["kind"] == "verdict"), None)
        if verdict:
            loud = "" if verdict["word"] == "better" else " <-- WARNING" if verdict["word"] != "unknown" else ""
            print(f"verdict   {stage.noun}: {verdict['word']}: {verdict['text']}{loud}")
    print(f"report    {base_dir() / 'report' / 'report.md'}, copied to ./report.md")
    if stages:
        print(f"next      talk to it: .venv/bin/python -m scripts.chat_web -i {stages[-1].name} (in a browser), or "
              f"-m scripts.chat_cli -i {stages[-1].name}")
    else:
        prompt = facts()[0].prompt if plan.source == "small-world" else "Once upon a time"
        print(f"next      .venv/bin/python -m scripts.complete -p {shlex.quote(prompt)}")
    if plan.profile == "small":
        print('          train on your own text: NANOCHAT_BASE_DIR=~/mine SPEEDRUN_TEXT="PATH ..." bash speedrun.sh')


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages that are not done. Raises UserError for what the user can mend."""
    flags = parse(Flags, argv, __doc__)
    if os.environ.get("WANDB_RUN"):  # wandb reads this name: the runs of all stages are one group
        os.environ.setdefault("WANDB_RUN_GROUP", os.environ["WANDB_RUN"])
    began = time.time() - flags.setup_seconds
    max_restarts(), hang_seconds(), place_of_environment()  # raise for settings that are wrong
    plan = make_plan(find_machine())
    show_choices(plan)
    announce(plan)
    check_plan(plan)
    check_wandb(os.environ.get("WANDB_RUN", ""))
    have_tokenizer(plan)
    need_disk(base_dir(), max(0, int(plan.disk - bytes_used())), f"the {plan.profile} run")
    if plan.source != "small-world" and not plan.machine.gpus and plan.profile != "small":
        print(f"note: {plan.profile} is made for GPUs; on this machine it takes far too long\n")
    if flags.dry_run:
        print_commands(plan)
        return
    place = place_of_environment()
    way_out = "Wait until it ends, or stop it with {kill}; another NANOCHAT_BASE_DIR lets two run side by side."
    name = f"speedrun-node{place.node}.lock" if place is not None and place.node else "speedrun.lock"
    file = lock(base_dir() / "locks" / name, f"{base_dir()} is in use by a speedrun", way_out)
    with file or nullcontext():
        try:
            run_commands(plan, place)
        except SystemExit:
            print_line("\nstopped; `bash speedrun.sh` resumes from here.")
            raise
    if place is None or place.node == 0:
        conclude(plan, time.time() - began)


if __name__ == "__main__":
    run_main(main)
