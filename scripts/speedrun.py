"""All stages in order: text, tokenizer, base model, mid-training, fine-tuning, reinforcement learning, gradings, the report.
`bash speedrun.sh` sets up and runs this.

    python -m scripts.speedrun

It looks at the machine, says what it will do, how long it takes and how much disk, and does it. A stage that is done is skipped, so that
the same command goes on after an interruption. Settings, all optional, from the environment:

    SPEEDRUN_PROFILE=small|d20|d26|d32    what to train: small is a model for a CPU on the built-in small world; the others are the
                                          published recipe at three sizes, for GPUs. Left out: d20 with a GPU, else small.
    SPEEDRUN_TEXT="PATH ..."              your own .txt, .md, .jsonl, .parquet files or folders to train on
    SPEEDRUN_GPUS=N                       GPUs to use; left out: all
    SPEEDRUN_DEVICE_BATCH=N               rows a GPU takes at a time; left out: what fits its memory
    SPEEDRUN_STEPS=N                      optimizer steps of the base model; left out: the profile's
    SPEEDRUN_SHARDS=N                     FineWeb-Edu shards to fetch; left out: what the steps need
    SPEEDRUN_RL=1|0                       reinforcement learning too, or not; left out: with small alone
    NANOCHAT_TASK_DATA=FOLDER             a mirror of the data sets of the chat stages, for machines without network (tasks/hub.py)
    WANDB_RUN=NAME                        log to wandb under this name
    NANOCHAT_BASE_DIR=FOLDER              where everything is kept; ~/.cache/nanochat
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from nanochat.checkpoint import latest_step
from nanochat.cli import flag, parse, run_main
from nanochat.dataset import shard_paths
from nanochat.dataset.shards import data_dir, read_source
from nanochat.distributed import compute_dtype, peak_flops
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, need_disk
from nanochat.gpt import GPT, GPTConfig
from nanochat.logs import read_log
from nanochat.small_world import facts
from nanochat.stages import CHAT_STAGES, STAGES, Stage
from nanochat.tokenizer import RustBPETokenizer, tokenizer_dir
from nanochat.training import clock
from tasks.recipes import IDENTITY

CHARS_PER_TOKEN = 4.8        # of FineWeb-Edu with 65,536 tokens
SHARD_CHARS, SHARD_BYTES = 250e6, 100e6
EXPECTED_MFU = 0.5
MEMORY_OF_32_ROWS = {20: 70e9, 26: 130e9, 32: 210e9}  # bytes on a GPU at 32 rows of 2048, by depth: estimated, not measured yet


@dataclass(frozen=True)
class Profile:
    """What to train. vocab_size, max_seq_len and total_batch_size in tokens; steps None means 20 tokens a parameter."""

    name: str
    depth: int
    vocab_size: int
    max_seq_len: int
    total_batch_size: int
    steps: int | None = None
    docs: int = 0                     # of the small world, where that is the text
    rl: bool = False                  # is reinforcement learning a part of it?
    flags: tuple[str, ...] = ()       # of base_train, beyond those above
    chat: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the scripts after it, by name


PROFILES = {profile.name: profile for profile in (
    Profile("small", 4, 2048, 256, 2048, steps=500, docs=20_000,  # many small steps: facts are learnt by the step more than by the token
            flags=("--eval-every=125", "--eval-tokens=65536", "--sample-every=-1", "--save-every=125", "--warmdown-ratio=0.3"), rl=True,
            chat={
                "gen_identity": ("--short", "--count=300"),
                "mid_train": ("--num-iterations=200", "--total-batch-size=2048", "--eval-every=50", "--eval-tokens=20000",
                              "--save-every=50"),
                "chat_sft": ("--num-iterations=100", "--device-batch-size=16", "--init-lr-frac=0.3", "--eval-every=25", "--eval-steps=4",
                             "--eval-metrics-every=-1", "--save-every=50"),
                "chat_rl": ("--num-iterations=25", "--examples-per-step=32", "--init-lr-frac=0.1", "--device-batch-size=64",
                            "--rollout-batch-size=256", "--max-new-tokens=48", "--eval-every=-1", "--eval-examples=200", "--save-every=10"),
                "chat_eval": ("--max-new-tokens=128",),
            }),
    Profile("d20", 20, 65536, 2048, 524288),
    Profile("d26", 26, 65536, 2048, 524288),
    Profile("d32", 32, 65536, 2048, 524288),
)}


@dataclass
class Flags:
    """Flags of speedrun; the settings come from the environment."""

    setup_seconds: float = flag(0.0, "seconds the set-up took, for the total that is printed")
    dry_run: bool = flag(False, "say what would be done, and do nothing")


@dataclass
class Machine:
    """What there is to train on."""

    gpus: list[str]
    gpu_memory: int                   # bytes of the smallest
    cores: int
    name: str = field(default_factory=platform.machine)

    def describe(self) -> str:
        if self.gpus:
            kinds = ", ".join(f"{self.gpus.count(kind)} × {kind}" for kind in sorted(set(self.gpus)))
            return f"{kinds} with {self.gpu_memory / 1e9:.0f} GB each, {self.cores} CPU cores"
        return f"no GPU, {self.cores} CPU cores ({self.name})"


def find_machine() -> Machine:
    """Look at this machine; SPEEDRUN_GPUS limits the GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = _number("SPEEDRUN_GPUS", count)
    if wanted > count:
        raise UserError(f"SPEEDRUN_GPUS is {wanted}, but this machine shows {count} GPU{'s' if count != 1 else ''}.")
    devices = [torch.cuda.get_device_properties(i) for i in range(wanted)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine([d.name for d in devices], min((d.total_memory for d in devices), default=0), cores)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1 and name != "SPEEDRUN_GPUS":
        raise UserError(f"{name} is {text!r}: it must be a whole number above 0.")
    return int(text)


def hub_reachable() -> bool:
    """Does the Hugging Face hub (or HF_ENDPOINT) answer within a few seconds?"""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


@dataclass
class Plan:
    """What will be done: the profile, the text, and what follows from them."""

    profile: Profile
    machine: Machine
    source: str                       # "small-world", "import" or "fineweb-edu"
    text: list[str]
    steps: int
    device_batch: int
    shards: int
    seconds: float | None             # of base training; None where it cannot be told
    disk: float                       # bytes
    chat: str                         # what the chat stages learn from: "small-world", "hub", or "" where there are none
    why_no_chat: str = ""

    @property
    def tag(self) -> str:
        return f"d{self.profile.depth}"


def make_plan(machine: Machine) -> Plan:
    """Choose profile, text, batch and shards for this machine and the environment. Raises UserError where no choice is left."""
    name = os.environ.get("SPEEDRUN_PROFILE") or ("d20" if machine.gpus else "small")
    if name not in PROFILES:
        raise UserError(f"SPEEDRUN_PROFILE is {name!r}: it must be one of {', '.join(PROFILES)}.")
    profile = PROFILES[name]
    text = shlex.split(os.environ.get("SPEEDRUN_TEXT", ""))
    there = read_source(data_dir()).get("source") if data_dir().is_dir() else None
    source = "import" if text else "small-world" if name == "small" else "fineweb-edu"
    if source == "fineweb-edu" and there != "fineweb-edu" and not hub_reachable():
        raise UserError(
            f"the Hugging Face hub cannot be reached, so FineWeb-Edu cannot be fetched for {name}. Train on your own text instead: "
            "SPEEDRUN_TEXT=\"PATH ...\" bash speedrun.sh; or on the built-in small world: SPEEDRUN_PROFILE=small bash speedrun.sh")
    if there and there != source:
        raise UserError(f"{data_dir()} holds text of another kind ({there}) than this run would train on ({source}). Keep both: "
                        f"NANOCHAT_BASE_DIR={base_dir()}-{name} bash speedrun.sh")
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(profile.depth, vocab_size=profile.vocab_size, sequence_len=profile.max_seq_len))
    parameters = sum(p.numel() for p in model.parameters())
    steps = _number("SPEEDRUN_STEPS", profile.steps or 20 * parameters // profile.total_batch_size)
    tokens = steps * profile.total_batch_size
    shards = _number("SPEEDRUN_SHARDS", math.ceil(1.03 * tokens * CHARS_PER_TOKEN / SHARD_CHARS))
    device_batch = _number("SPEEDRUN_DEVICE_BATCH", batch_for(profile, machine))
    device = "cuda" if machine.gpus else "cpu"
    peak = peak_flops(device, compute_dtype(device))
    seconds = None
    if peak is not None:
        seconds = tokens * model.flops_per_token() / (peak * EXPECTED_MFU * max(1, len(machine.gpus)))
    disk = 16 * parameters * 6 + (shards * SHARD_BYTES if source == "fineweb-edu" else 200e6)
    chat, why = "small-world" if source == "small-world" else "hub", ""
    if chat == "hub" and name == "small":
        chat, why = "", "the published conversations are too many for this profile"
    elif chat == "hub" and not os.environ.get("NANOCHAT_TASK_DATA") and not hub_reachable():
        chat, why = "", "the Hugging Face hub cannot be reached, and NANOCHAT_TASK_DATA names no mirror of its data sets"
    return Plan(profile, machine, source, text, steps, device_batch, shards, seconds, disk, chat, why)


def batch_for(profile: Profile, machine: Machine) -> int:
    """Rows a device takes at a time: on GPUs the largest power of two, up to 32, that fits the memory."""
    if profile.depth not in MEMORY_OF_32_ROWS or not machine.gpus:
        return 8 if profile.name == "small" else 1
    rows = 32 * machine.gpu_memory / MEMORY_OF_32_ROWS[profile.depth]
    return max(1, min(32, 1 << int(math.log2(max(rows, 1)))))


def announce(plan: Plan) -> None:
    """Say what will be done."""
    profile, tokens = plan.profile, plan.steps * plan.profile.total_batch_size
    text = {"small-world": "the built-in small world: made here, no network",
            "import": "your own text: " + " ".join(plan.text),
            "fineweb-edu": f"FineWeb-Edu from the Hugging Face hub, {plan.shards} shards"}[plan.source]
    took = "unknown for this device" if plan.seconds is None else f"about {clock(plan.seconds)}"
    print(f"machine   {plan.machine.describe()}\n"
          f"profile   {profile.name}: a hybrid of depth {profile.depth}, vocabulary {profile.vocab_size:,}, rows of {profile.max_seq_len}\n"
          f"text      {text}\n"
          f"training  {plan.steps:,} steps of {profile.total_batch_size:,} tokens = {tokens / 1e6:,.1f}M tokens\n"
          f"then      {chat_stages(plan)}\n"
          f"time      {took} for training, beside fetching and evaluation\n"
          f"disk      {plan.disk / 1e9:.1f} GB in {base_dir()}\n", flush=True)


def with_rl(plan: Plan) -> bool:
    """Is reinforcement learning wanted?"""
    wish = os.environ.get("SPEEDRUN_RL", "")
    if wish not in ("", "0", "1"):
        raise UserError(f"SPEEDRUN_RL is {wish!r}: it must be 1 or 0.")
    return wish == "1" if wish else plan.profile.rl


def chat_stages(plan: Plan) -> str:
    """What comes after the base model, in words."""
    if not plan.chat:
        return f"no chat stages: {plan.why_no_chat}"
    return ", ".join(stage.noun for stage in wanted_stages(plan)) + ", each graded; the report"


def wanted_stages(plan: Plan) -> list[Stage]:
    """The stages after the base model that this run trains; none where there is nothing to train them on."""
    return [stage for stage in CHAT_STAGES if plan.chat and (stage.name != "rl" or with_rl(plan))]


def stage(name: str) -> None:
    print(f"\n== {name} ({time.strftime('%H:%M:%S')})", flush=True)


def python(*command: str, gpus: int = 0) -> None:
    """Run a module in a process of its own, under torchrun where there are several GPUs. Ends this run where that fails."""
    start = [sys.executable, "-m"]
    if gpus > 1:
        command = ("torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "-m", command[0], "--", *command[1:])
    done = subprocess.run([*start, *command])
    if done.returncode:
        mend = "" if done.returncode in (130, 143) else "mend what it says, then "
        raise UserError(f"{command[0]} ended with exit code {done.returncode}; {mend}`bash speedrun.sh` goes on from here.")


def have_text(plan: Plan) -> bool:
    """Is the text there, all of it?"""
    try:
        return len(shard_paths("train")) >= (plan.shards if plan.source == "fineweb-edu" else 1)
    except UserError:
        return False


def get_text(plan: Plan) -> subprocess.Popen | None:
    """Make or fetch what is needed to begin; the rest of FineWeb-Edu comes in the background, in the process that is returned."""
    if plan.source == "import":
        python("nanochat.dataset", "import", *plan.text)
    elif plan.source == "small-world":
        python("nanochat.dataset", "small-world", f"--docs={plan.profile.docs}")
    elif not have_text(plan):
        first = min(plan.shards, 8)  # the tokenizer's 2 billion characters
        python("nanochat.dataset", "-n", str(first))
        if plan.shards > first:
            return subprocess.Popen([sys.executable, "-m", "nanochat.dataset", "-n", str(plan.shards)])
    return None


def have_tokenizer(plan: Plan) -> bool:
    """Is the tokenizer there, trained on this text and of this size? Raises UserError where another one stands there."""
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
    made_from = (meta.get("source") or {}).get("source")
    if meta.get("vocab_size_asked") != plan.profile.vocab_size or made_from != plan.source:
        raise UserError(f"{tokenizer_dir()} holds a tokenizer of {meta.get('vocab_size_asked')} tokens from {made_from}, this run needs "
                        f"{plan.profile.vocab_size} from {plan.source}. Keep both: NANOCHAT_BASE_DIR={base_dir()}-{plan.profile.name} "
                        "bash speedrun.sh")
    return True


def train_base(plan: Plan) -> None:
    """Train the base model, or go on with it, or find it done: base_train knows."""
    profile = plan.profile
    flags = [f"--depth={profile.depth}", f"--max-seq-len={profile.max_seq_len}", f"--total-batch-size={profile.total_batch_size}",
             f"--num-iterations={plan.steps}", f"--run={os.environ.get('WANDB_RUN') or 'dummy'}", *profile.flags,
             f"--device-batch-size={plan.device_batch}"]
    python("scripts.base_train", *flags, gpus=len(plan.machine.gpus))


def once(name: str, key: list, work: Callable[[], object]) -> None:
    """Do what leaves no checkpoint behind, unless it was done with this very key; what was done is kept in speedrun.json."""
    marker = base_dir() / "speedrun.json"
    done = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    if done.get(name) == key:
        print("done before")
        return
    work()
    with atomic_write(marker, "w") as file:
        json.dump(done | {name: key}, file)


def model_key(plan: Plan, source: str) -> list:
    """What tells one checkpoint from another: step, tokenizer, when it was written."""
    folder = base_dir() / STAGES[source].folder / plan.tag
    step = latest_step(folder)
    return [plan.tag, step, RustBPETokenizer.from_directory(tokenizer_dir()).fingerprint(),
            (folder / f"meta_{step:06d}.json").stat().st_mtime_ns]


def evaluate_base(plan: Plan) -> None:
    """Evaluate the base model, unless this checkpoint was."""
    tokens = 65536 if plan.profile.name == "small" else 20 * 524288
    once("base_eval", model_key(plan, "base"), lambda: python(
        "scripts.base_eval", f"--model-tag={plan.tag}", f"--device-batch-size={plan.device_batch}", f"--split-tokens={tokens}",
        gpus=len(plan.machine.gpus)))


def train_chat(plan: Plan) -> None:
    """The stages after the base model, each graded."""
    flags, gpus = plan.profile.chat, len(plan.machine.gpus)
    common = (f"--model-tag={plan.tag}", f"--data={plan.chat}", f"--run={os.environ.get('WANDB_RUN') or 'dummy'}")
    if not (base_dir() / IDENTITY).exists():
        stage("who it is")
        python("dev.gen_identity", *flags.get("gen_identity", ()))
    for trained in wanted_stages(plan):
        stage(trained.noun)
        own = (f"--device-batch-size={plan.device_batch}",) if trained.name == "mid" else ()  # it packs rows as the base model does
        python(trained.script, *common, *own, *flags.get(trained.script.removeprefix("scripts."), ()), gpus=gpus)
        stage(f"grading after {trained.noun}")
        once(trained.graded_by, model_key(plan, trained.name), lambda trained=trained: python(
            "scripts.chat_eval", f"--source={trained.name}", f"--model-tag={plan.tag}", f"--data={plan.chat}",
            *flags.get("chat_eval", ()), gpus=gpus))


def conclude(plan: Plan, seconds: float) -> None:
    """Say what was made, where, how good it is, and what to type next."""
    rows = read_log(base_dir() / "logs" / f"base_eval_{plan.tag}.jsonl")
    loss = next((row for row in reversed(rows) if row["kind"] == "loss"), {})
    world = next((row for row in reversed(rows) if row["kind"] == "small_world"), None)
    size = sum(path.stat().st_size for path in base_dir().rglob("*") if path.is_file())
    print(f"\n== done in {clock(seconds)}\n"
          f"made      {'a chat model' if plan.chat else 'a base model'} of depth {plan.profile.depth}; {size / 1e9:.2f} GB in {base_dir()}")
    if loss:
        print(f"quality   {loss['val_bpb']:.4f} bits per byte on validation text, {loss['train_bpb']:.4f} on training text")
    if world and plan.source == "small-world":
        print(f"          {world['world']:.0%} of the small world's facts, asked in phrasings it never saw them in "
              f"(untrained {world['untrained']:.0%}, chance {world['chance']:.0%})")
    stages = [stage.name for stage in wanted_stages(plan)]
    for source in stages:
        graded = [row for row in read_log(base_dir() / "logs" / f"chat_eval_{source}_{plan.tag}.jsonl") if row["kind"] == "chatcore"]
        if graded:
            print(f"{source:9s} " + ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in graded[-1]["tasks"].items()))
    prompt = facts()[0].prompt if plan.source == "small-world" else "Once upon a time"
    print(f"report    {base_dir() / 'report' / 'report.md'}, copied to ./report.md")
    if stages:
        print(f"next      talk to it: .venv/bin/python -m scripts.chat_web -i {stages[-1]} (in a browser), or "
              f"-m scripts.chat_cli -i {stages[-1]}")
    else:
        print(f"next      .venv/bin/python -m scripts.complete -p {shlex.quote(prompt)}")
    if plan.profile.name == "small":
        print("          train on your own text: NANOCHAT_BASE_DIR=~/mine SPEEDRUN_TEXT=\"PATH ...\" bash speedrun.sh")


def main(argv: Sequence[str] | None = None) -> None:
    """Do all stages that are not done. Raises UserError for what the user can mend."""
    flags = parse(Flags, argv, __doc__)
    began = time.time() - flags.setup_seconds
    plan = make_plan(find_machine())
    announce(plan)
    used = sum(path.stat().st_size for path in base_dir().rglob("*") if path.is_file())
    need_disk(base_dir(), max(0, int(plan.disk - used)), f"the {plan.profile.name} run")
    if plan.source != "small-world" and not plan.machine.gpus and plan.profile.name != "small":
        print(f"note: {plan.profile.name} is made for GPUs; on this machine it takes far too long\n")
    if flags.dry_run:
        return
    stage("text")
    fetching = get_text(plan)
    try:
        stage("tokenizer")
        if have_tokenizer(plan):
            print("done before")
        else:
            python("scripts.tok_train", f"--vocab-size={plan.profile.vocab_size}")
        if fetching is not None:
            stage("rest of the text")
            if fetching.wait():
                raise UserError("not all text could be fetched; `bash speedrun.sh` goes on from here.")
    finally:
        if fetching is not None and fetching.poll() is None:
            fetching.terminate()
            fetching.wait()
    stage("base model")
    train_base(plan)
    stage("evaluation of the base model")
    evaluate_base(plan)
    if plan.chat:
        train_chat(plan)
    stage("report")
    python("nanochat.report", "generate")
    conclude(plan, time.time() - began)


if __name__ == "__main__":
    run_main(main)
