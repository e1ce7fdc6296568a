"""Compare ways to train a model: each arm with each seed, on the same text, by the project's own trainer.

    python -m bench.sweep --text books/ --vocab=4096 --depth=4 --steps=550 --batch=2048 --seq-len=256 \\
        --seeds=1,2,3 --out=sweep_d4 "published" "published --n-kernel=4" "attention: published --layer-pattern=A"

An arm is a text: a recipe, then flags of scripts.base_train (`python -m scripts.base_train --help` lists them), and
before them a name and a colon, if wanted. What is given to the sweep (--depth, --steps, --batch, --seq-len) is given to
each arm, which may override it (`--depth=5`, `--num-iterations=600`). All arms are checked before anything runs.

Text: --text imports files as `python -m nanochat.dataset import` does (a line --doc-separator ends a document);
--data takes a folder of shards that is there. A tokenizer of --vocab tokens is trained on it once. All arms read the
same documents. A seed moves the initial weights and the order of the documents, the same for all arms. The training
text must be so long that no document is seen twice; --repeat allows it.

Each run is a process of its own; --jobs of them are at work at a time: on a CPU one a core, with one thread each; on
GPUs one a GPU. The runs of a seed follow one another, so that a pair runs side by side and noise hits both alike.

What is compared, always with the first arm and the same seed:
- the held-out bits per byte, after training, on --held-out tokens that no arm was trained on, as many of each document.
  Its error over documents says how exact one pair is; that over seeds says what another pair would give, and decides:
  "kept" is below −2 standard errors over seeds, "harmful" above +2, else "not kept".
- the training loss over the last part of the run (--last), on identical batches that both saw for the first time, with
  its error over steps: very exact, and blind to the noise of seeds.
- tokens a second, FLOPs, peak memory.

Files, in the folder --out: report.md and results.json, written anew after each run; runs/ with a result, a spec and
the output of each; logs/ of base_train; base_data/ and tokenizer/. Runs that are done are kept, and found again by a
digest of what they are: the same command goes on where it was stopped, and further arms or seeds only cost their own
time. A run that is stopped (Ctrl-C, SIGTERM) saves a checkpoint and goes on from it; without --keep-models the
checkpoint is removed when the run is done. --hours ends a long sweep between two runs.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.measure import command_line, provenance
from bench.sweep.arms import Arm, read_arms
from bench.sweep.report import write_report
from bench.sweep.runs import Run, do_runs, result_of, run_of
from bench.sweep.text import (
    check_unseen,
    fingerprint_of,
    has_tokenizer,
    held_out,
    provide_shards,
    tokenizer_of,
)
from nanochat.cli import COUNT, DEPTH, FROM_ZERO, ROW_TOKENS, Range, flag, parser_of, run_main
from nanochat.errors import UserError
from nanochat.files import lock_folder
from nanochat.launcher import Owner
from nanochat.logs import print_line

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Config:
    """Flags of bench.sweep."""

    out: str = flag("", "folder of the sweep; it is made")
    data: str = flag("", "folder of shards, as nanochat.dataset makes them")
    doc_separator: str = flag("<|doc|>", "line that ends a document in .txt files of --text")
    val_fraction: float = flag(0.05, "share of the documents of --text to hold out", within=Range(above=0, below=1))
    vocab: int = flag(4096, "tokens of the tokenizer", within=Range(265, 1 << 24))
    depth: int = flag(4, "layers; sets width too", within=DEPTH)
    steps: int = flag(550, "optimizer steps of a run", within=COUNT)
    batch: int = flag(2048, "tokens in an optimizer step", within=COUNT)
    seq_len: int = flag(256, "tokens in a row", within=ROW_TOKENS)
    seeds: str = flag("1,2,3", "of weights and order of the documents, with commas between")
    held_out: int = flag(1 << 20, "held-out tokens that each run is measured on", within=COUNT)
    last: float = flag(0.2, "part of the run at its end whose training loss is compared", within=Range(above=0, high=1))
    jobs: int = flag(0, "runs at a time; 0 = one a core, or one a GPU", within=FROM_ZERO)
    hours: float = flag(0.0, "after which no run is started any more; 0 = no limit", within=FROM_ZERO)
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    keep_models: bool = flag(False, "keep the last checkpoint of each run, in base_checkpoints/")
    repeat: bool = flag(False, "allow that the text is shorter than a run, and is read again")
    dry_run: bool = flag(False, "check the arms, print what would be run, and end")


def seeds_of(text: str) -> list[int]:
    """Return the seeds. Raises UserError where the text does not name some, each once."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds is {text!r}: it must be different whole numbers with commas between, as in 1,2,3")
    return seeds


def best_device(asked: str) -> str:
    """Return the device type that runs take."""
    return asked or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def places(config: Config, device_type: str) -> tuple[int, int]:
    """Return how many runs are at work at a time, and how many threads each has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH", help="files and folders of text to import")
    parser.add_argument("arms", nargs="+", metavar="ARM", help="a recipe and flags of base_train, in one word")
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    text, said = flags.pop("text"), flags.pop("arms")
    config = Config(**flags)
    if not config.out:
        raise UserError("--out=FOLDER must be given: where the sweep keeps its runs and its report")
    seeds, device_type = seeds_of(config.seeds), best_device(config.device_type)
    jobs, threads = places(config, device_type)
    common = [f"--depth={config.depth}", f"--max-seq-len={config.seq_len}", f"--total-batch-size={config.batch}",
              f"--num-iterations={config.steps}"]
    arms = read_arms(said, common, config.vocab)
    out = Path(config.out).expanduser().resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    with lock_folder(out, f"{out} is in use by a sweep", "Wait until it ends, or stop it with {kill}; another --out "
                                                         "can be used beside it."), Owner() as owner:
        about = provenance(command_line("bench.sweep", argv))
        runs = prepare(config, text, arms, seeds, out)
        if config.dry_run:
            return say_what_would_be_run(arms, runs, out, jobs)

        def report() -> str:
            results = {(run.arm.name, run.seed): found for run in runs if (found := result_of(run, out))}
            state = f"{len(results)} of {len(runs)} runs are done."
            return write_report(out, results, [(arm.name, arm.text, arm.flags) for arm in arms], seeds,
                                {**about, "config": asdict(config)}, state, config.last)

        todo = [run for run in runs if result_of(run, out) is None]
        print_line(f"{len(runs)} runs: {len(arms)} arms × {len(seeds)} seeds; {len(runs) - len(todo)} are done, "
                   f"{jobs} at a time, {threads} threads each, on {device_type}")
        report()
        failed = do_runs(owner, todo, out, jobs=jobs, device_type=device_type, threads=threads,
                         keep_models=config.keep_models, hours=config.hours, finished=report, say=print_line,
                         done=len(runs) - len(todo))
        print_line("\n" + report())
        print_line(f"report: {out / 'report.md'}")
        if failed:
            raise UserError(f"{len(failed)} runs failed: " + ", ".join(f"{run.arm.name} seed {run.seed}"
                                                                       for run in failed))


def prepare(config: Config, text: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Run]:
    """Provide text, tokenizer and held-out tokens; return the runs. The runs of a seed follow one another."""
    folder = provide_shards(out, config.data, text, config.doc_separator, config.val_fraction)
    if not has_tokenizer(out, folder, config.vocab):
        train_tokenizer(out, config.vocab)
    tokenizer = tokenizer_of(out)
    if tokenizer.get_vocab_size() != config.vocab:  # a short text has too few pairs
        raise UserError(f"the text makes a tokenizer of {tokenizer.get_vocab_size():,} tokens only: use "
                        f"--vocab={tokenizer.get_vocab_size()} and another --out, or more text")
    if not config.repeat:
        longest = max(arm.base.tokens for arm in arms)
        check_unseen(folder, tokenizer, longest, out / "training_text.json")
    held_out(folder, tokenizer, config.held_out, out / "heldout.npz")
    text_is = f"{fingerprint_of(folder)} {tokenizer.fingerprint()} {config.held_out}"
    return [run_of(arm, seed, text_is) for seed in seeds for arm in arms]


def say_what_would_be_run(arms: Sequence[Arm], runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Print the arms, and how many runs are left."""
    for arm in arms:
        print_line(f"{arm.name}: {arm.base.parameters:,} parameters, layers {arm.base.shape.pattern()}, "
                   f"{arm.base.num_iterations:,} steps, {arm.base.tokens:,} tokens, {arm.flops:.2e} FLOPs")
    left = sum(result_of(run, out) is None for run in runs)
    print_line(f"{len(runs)} runs, {left} of them not done, {jobs} at a time")


if __name__ == "__main__":
    run_main(main)
