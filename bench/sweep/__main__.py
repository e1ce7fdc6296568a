"""Compare ways to train a model: each arm with each seed, on the same text, by the project's own trainer.

    python -m bench.sweep --text books/ --vocab=4096 --depth=4 --steps=550 --batch=2048 --seq-len=256 \\
        --seeds=1,2,3 --out=sweep_d4 "published" "modern --reference-batch=0" "attention: published --layer-pattern=A"

An arm is a text: a recipe, then flags of scripts.base_train (`python -m scripts.base_train --help` lists them), and
before them a name and a colon, if wanted. What is given to the sweep (--depth, --steps, --batch, --seq-len) is given to
each arm, which may override it (`--depth=5`, `--num-iterations=600`). All arms are checked before anything runs;
--dry-run ends there.

Text: --text imports files as `python -m nanochat.dataset import` does (a line --doc-separator ends a document);
--data takes a folder of shards that is there. Later calls with the same --out need neither. A tokenizer of --vocab
tokens is trained on it once. All arms read the same documents. A seed moves the initial weights and the order of the
documents, the same for all arms. The training text must be so long that no document is seen twice; --repeat allows it.

Each run is a process of its own; --jobs of them are at work at a time: on a CPU one a core, with one thread each; on
GPUs one a GPU. The runs of a seed follow one another, so that a pair runs side by side and noise hits both alike.

What is the same for all arms is what --equal says:
- tokens: the number of steps, unless an arm says its own.
- flops: an arm has as many steps as come nearest to the FLOPs of the first arm's run, by the FLOPs of a token that
  base_train prints, which count the head and attention.
- time: an arm has as many steps as fit the first arm's training time. Each arm first trains 16 steps, three times, side
  by side with the others as later; the median of the last twelve steps, and of the three, is the time of a step.

What is compared, always with the first arm and the same seed:
- the held-out bits per byte, after training, on --held-out tokens that no arm was trained on, as many of each document.
  Its error over documents says how exact one pair is; that over seeds says what another pair would give, and decides:
  "kept" is below -2 standard errors over seeds, "harmful" above +2, else "not kept".
- the training loss over the last part of the run (--last), on identical batches that both saw for the first time, with
  its error over steps: very exact, and blind to the noise of seeds. Only where the arms have the same steps.
- recall: copying random tokens and looking up random pairs in the context, which bits per byte hardly show.
- tokens a second, FLOPs, peak memory.

--depths=4,6,8 is a miniseries: all arms at each depth. --steps is then that of the first depth; deeper models train on
more tokens, in proportion to the parameters of matrices and head of the first arm; or --steps names one number a depth.
A straight line through log bits per byte against log FLOPs is fitted for each arm. The report gives the difference at
each depth, and nothing outside what was measured.

Files, in the folder --out: report.md, results.json and plots (.svg), written anew after each run; runs/ with a result,
a spec and the output of each; logs/ of base_train; base_data/ and tokenizer/. Runs that are done are kept, and found
again by a digest of what they are: the same command goes on where it was stopped, and further arms or seeds only cost
their own time. A run that is stopped (Ctrl-C, SIGTERM) saves a checkpoint and goes on from it; without --keep-models
the checkpoint is removed when the run is done. --hours ends a long sweep between two runs.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from bench.measure import command_line, median, provenance
from bench.sweep.arms import HORIZON, Arm, read_arms, with_equal_flops, with_steps
from bench.sweep.report import write_report
from bench.sweep.runs import Run, do_runs, not_done, result_of, run_of
from bench.sweep.text import (
    check_unseen,
    fingerprint_of,
    has_tokenizer,
    held_out,
    provide_shards,
    tokenizer_of,
)
from nanochat.cli import COUNT, DEPTH, FROM_ZERO, ROW_TOKENS, Range, flag, parser_of, run_main
from nanochat.distributed import device_of
from nanochat.errors import UserError
from nanochat.files import lock_folder
from nanochat.gpt import meta_model
from nanochat.launcher import Owner
from nanochat.logs import available_cores, print_line
from nanochat.run.horizon import scaling_parameters

ROOT = Path(__file__).resolve().parent.parent.parent
TIMING_STEPS, TIMING_ROUNDS = 16, 3

Arms = dict[int, list[Arm]]  # by depth


@dataclass
class Config:
    """Flags of bench.sweep."""

    out: str = flag("", "folder of the sweep; it is made")
    data: str = flag("", "folder of shards, as nanochat.dataset makes them")
    doc_separator: str = flag("<|doc|>", "line that ends a document in .txt files of --text")
    val_fraction: float = flag(0.05, "share of the documents of --text to hold out", within=Range(above=0, below=1))
    vocab: int = flag(4096, "tokens of the tokenizer", within=Range(265, 1 << 24))
    depth: int = flag(4, "layers; sets width too", within=DEPTH)
    depths: str = flag("", "several depths instead, with commas between: a miniseries")
    steps: str = flag("550", "optimizer steps of a run; of several depths that of the first, or one a depth, with "
                             "commas between")
    batch: int = flag(2048, "tokens in an optimizer step", within=COUNT)
    seq_len: int = flag(256, "tokens in a row", within=ROW_TOKENS)
    equal: Literal["tokens", "flops", "time"] = flag("tokens", "what all arms have the same of")
    seeds: str = flag("1,2,3", "of weights and order of the documents, with commas between")
    held_out: int = flag(1 << 20, "held-out tokens that each run is measured on", within=COUNT)
    last: float = flag(0.2, "part of the run at its end whose training loss is compared", within=Range(above=0, high=1))
    jobs: int = flag(0, "runs at a time; 0 = one a core, or one a GPU", within=FROM_ZERO)
    hours: float = flag(0.0, "after which no run is started any more; 0 = no limit", within=FROM_ZERO)
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    keep_models: bool = flag(False, "keep the last checkpoint of each run, in base_checkpoints/")
    repeat: bool = flag(False, "allow that the text is shorter than a run, and is read again")
    dry_run: bool = flag(False, "check the arms, print what would be run, and end")


def numbers(name: str, text: str, least: int) -> list[int]:
    """Return the different whole numbers of a flag. Raises UserError where the text does not name some."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least or len(set(found)) < len(found) and name != "steps":
        different = "different " * (name != "steps")
        raise UserError(f"--{name} is {text!r}: it must be {different}whole numbers from {least} on, with commas "
                        "between, as in 1,2,3")
    return found


def places(config: Config, device_type: str) -> tuple[int, int]:
    """Return how many runs are at work at a time, and how many threads each has."""
    cores = available_cores()
    most = torch.cuda.device_count() if device_type == "cuda" else 1 if device_type == "mps" else cores
    if device_type == "cuda" and config.jobs > most:
        raise UserError(f"--jobs={config.jobs}, and there are {most} GPUs: one run takes a GPU")
    jobs = config.jobs or most
    return jobs, max(1, cores // jobs)


def train_tokenizer(out: Path, vocab: int) -> None:
    """Train the sweep's tokenizer, in a process of its own. Raises UserError if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "scripts.tok_train", f"--vocab-size={vocab}", "--doc-cap=0"],
                          env={**os.environ, "NANOCHAT_BASE_DIR": str(out), "PYTHONPATH": path})
    if done.returncode:
        raise UserError(f"scripts.tok_train ended with exit code {done.returncode}; its output is above")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep. Raises UserError for wrong flags or arms, for too little text, and if a run failed."""
    parser = parser_of(Config, __doc__ or "")
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH",
                        help="files and folders of text to import; another flag must stand between them and the arms")
    parser.add_argument("arms", nargs="+", metavar="ARM", help="a recipe and flags of base_train, in one word")
    words = [f"{word}=1" if word in ("--keep-models", "--repeat", "--dry-run") else word  # an arm may stand behind
             for word in (sys.argv[1:] if argv is None else argv)]
    flags = vars(parser.parse_args(words))
    text, said = flags.pop("text"), flags.pop("arms")
    config = Config(**flags)
    if not config.out:
        raise UserError("--out=FOLDER must be given: where the sweep keeps its runs and its report")
    seeds, device_type = numbers("seeds", config.seeds, 0), device_of(config.device_type).type
    jobs, threads = places(config, device_type)
    arms = arms_of(config, said)
    out = Path(config.out).expanduser().resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    with lock_folder(out, f"{out} is in use by a sweep", "Wait until it ends, or stop it with {kill}; another --out "
                                                         "can be used beside it."), Owner() as owner:
        about = {**provenance(command_line("bench.sweep", argv)), "config": asdict(config)}
        text_is = prepare(config, text, out)
        work = partial(do_runs, owner, out=out, jobs=jobs, device_type=device_type, threads=threads, say=print_line,
                       hours=config.hours)
        if config.equal == "time" and not config.dry_run:
            arms = with_equal_time(arms, seeds[0], text_is, out, partial(work, keep_models=False))
        if not config.repeat:
            longest = max(arm.base.tokens for each in arms.values() for arm in each)
            check_unseen(out / "base_data", tokenizer_of(out), longest, out / "training_text.json")
        runs = [run_of(arm, depth, seed, text_is) for depth, each in arms.items() for seed in seeds for arm in each]
        if config.dry_run:
            return say_what_would_be_run(arms, runs, out, jobs)

        def report() -> str:
            results = {depth: {(run.arm.name, run.seed): found for run in runs if run.depth == depth
                               and (found := result_of(run, out))} for depth in arms}
            state = f"{sum(map(len, results.values()))} of {len(runs)} runs are done."
            return write_report(out, results, arms, seeds, about, state, config.last, print_line)

        todo = not_done(runs, out)
        print_line(f"{len(runs)} runs: {len(said)} arms × {len(seeds)} seeds × {len(arms)} depths; {len(todo)} are to "
                   f"be done, {jobs} at a time, {threads} threads each, on {device_type}")
        failed = work(todo, keep_models=config.keep_models, finished=report, done=len(runs) - len(todo))
        print_line("\n" + report())
        print_line(f"report: {out / 'report.md'}")
        if failed:
            raise UserError(f"{len(failed)} runs failed: {'; '.join(run.title for run in failed)}")


def arms_of(config: Config, said: Sequence[str]) -> Arms:
    """Return the arms of each depth, with --equal=flops each with its steps. Raises UserError for wrong ones."""
    depths = numbers("depths", config.depths, 1) if config.depths else [config.depth]
    steps = numbers("steps", config.steps, 1)
    reserved = {}
    if len(depths) > 1:
        reserved["depth"] = "--depths sets that"
    if len(depths) > 1 or config.equal != "tokens":
        reserved |= dict.fromkeys(HORIZON, "the number of steps follows from --equal and --depths")
    arms, sizes = {}, []
    for place, depth in enumerate(depths):
        common = [f"--depth={depth}", f"--max-seq-len={config.seq_len}", f"--total-batch-size={config.batch}",
                  f"--num-iterations={steps[place % len(steps)]}"]
        arms[depth] = read_arms(said, common, config.vocab, reserved)
        sizes.append(scaling_parameters(meta_model(arms[depth][0].base.shape)))
    if len(steps) == 1 < len(depths):
        arms = {depth: [with_steps(arm, round(steps[0] * size / sizes[0])) for arm in each]
                for (depth, each), size in zip(arms.items(), sizes)}
    elif len(steps) != len(depths):
        raise UserError(f"--steps names {len(steps)} numbers for {len(depths)} depths: give one, or one a depth")
    if config.equal == "flops":
        arms = {depth: with_equal_flops(each) for depth, each in arms.items()}
    return arms


def with_equal_time(arms: Arms, seed: int, text_is: str, out: Path, work: Callable[..., list[Run]]) -> Arms:
    """Return the arms, each with as many steps as fit the training time of the first arm, by a few timed steps.

    work: does runs and returns those that failed. Raises UserError where one did.
    """
    timed = {depth: [[run_of(with_steps(arm, TIMING_STEPS), depth, seed, text_is, timing=number + 1) for arm in each]
                     for number in range(TIMING_ROUNDS)] for depth, each in arms.items()}
    todo = not_done([run for rounds in timed.values() for each in rounds for run in each], out)
    if failed := work(todo, finished=lambda: None):
        raise UserError(f"{failed[0].title} failed, so that its steps have no time")
    if not all(result_of(run, out) for rounds in timed.values() for each in rounds for run in each):
        raise UserError("--hours are over before the steps are timed")
    found = {}
    for depth, each in arms.items():
        seconds = [median(result_of(run, out)["step_seconds"] for run in of_arm) for of_arm in zip(*timed[depth])]
        whole = each[0].base.num_iterations * seconds[0]
        found[depth] = [arm if arm is each[0] else with_steps(arm, round(whole / own))
                        for arm, own in zip(each, seconds)]
        print_line(f"d{depth}: " + ", ".join(f"{arm.name} {own:.3f} s a step, {arm.base.num_iterations:,} steps"
                                             for arm, own in zip(found[depth], seconds)))
    return found


def prepare(config: Config, text: Sequence[str], out: Path) -> str:
    """Provide text, tokenizer and held-out tokens. Return what tells them from others."""
    folder = provide_shards(out, config.data, text, config.doc_separator, config.val_fraction)
    if not has_tokenizer(out, config.vocab):
        train_tokenizer(out, config.vocab)
    tokenizer = tokenizer_of(out)
    if tokenizer.get_vocab_size() != config.vocab:  # a short text has too few pairs
        raise UserError(f"the text makes a tokenizer of {tokenizer.get_vocab_size():,} tokens only: use "
                        f"--vocab={tokenizer.get_vocab_size()} and another --out, or more text")
    held_out(folder, tokenizer, config.held_out, out / "heldout.npz")
    return f"{fingerprint_of(folder)} {tokenizer.fingerprint()} {config.held_out}"


def say_what_would_be_run(arms: Arms, runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Print the arms, and how many runs are left."""
    for depth, each in arms.items():
        for arm in each:
            base = arm.base
            print_line(f"d{depth} {arm.name}: {base.parameters:,} parameters, layers {base.shape.pattern()}, "
                       f"{base.num_iterations:,} steps, {base.tokens:,} tokens, {arm.flops:.2e} FLOPs")
    print_line(f"{len(runs)} runs, {len(not_done(runs, out))} of them not done, {jobs} at a time")


if __name__ == "__main__":
    run_main(main)
