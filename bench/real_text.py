"""Train a hybrid and an all-attention model on your own text with the same budget, and compare them.

    python -m bench.real_text --text books/ --minutes=15
    python -m bench.real_text --text books/ --match=time --depth=6 --vocab-size=8192

Imports the text, trains a tokenizer, times a few steps of each model, then trains both with scripts.base_train. All
files go to a separate base folder, so that none of yours is changed. With --match=tokens, both models do the number of
steps that the hybrid does in the time. With --match=time, each does as many as it can. Prints a markdown block.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.measure import command_line, json_flag, median, provenance, provenance_line, si, table, write_results
from nanochat.cli import COUNT, DEPTH, FROM_ZERO, POSITIVE, ROW_TOKENS, ROWS, Range, flag, parser_of, run_main
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.gpt import GPTConfig
from nanochat.logs import read_log
from nanochat.training import clock

ROOT = Path(__file__).resolve().parent.parent
TIMING_STEPS, TIMING_SKIPPED = 12, 4
MODELS = {"hybrid": "", "attention": "A"}


@dataclass
class Config:
    """Flags of bench.real_text."""

    minutes: float = flag(15.0, "training time of the hybrid, in minutes", within=POSITIVE)
    match: Literal["tokens", "time"] = flag("tokens", "what is the same for both models")
    depth: int = flag(4, "layers; sets width too", within=DEPTH)
    vocab_size: int = flag(8192, "tokens of the tokenizer", within=Range(265, 1 << 24))
    max_seq_len: int = flag(256, "tokens in a row", within=ROW_TOKENS)
    device_batch_size: int = flag(16, "rows of a micro-batch on each device", within=ROWS)
    total_batch_size: int = flag(8192, "tokens in an optimizer step", within=COUNT)
    eval_tokens: int = flag(500_000, "tokens to validate on at the end", within=COUNT)
    steps: int = flag(0, "optimizer steps of both, instead of --minutes; 0 = unset", within=FROM_ZERO)
    doc_separator: str = flag("<|doc|>", "line that ends a document in .txt files")
    base_dir: str = flag("", "base folder to work in; unset is bench_real_text in the usual one")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best available")
    json: str = json_flag()


def run(base: Path, module: str, *args: str) -> None:
    """Run a module of this project with another base folder and show its output. Raises UserError if it fails."""
    print(f"+ python -m {module} {' '.join(args)}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, env=env)
    if done.returncode:
        raise UserError(f"{module} ended with exit code {done.returncode}; its output is above")


def train(base: Path, name: str, steps: int, config: Config, timing: bool = False) -> list[dict[str, Any]]:
    """Train one model from new weights.

    Args:
        base: the base folder.
        name: key of MODELS.
        steps: optimizer steps.
        config: the flags.
        timing: a short run to time the steps, almost without validation.

    Returns:
        The log records of the run.
    """
    tag = f"{name}_d{config.depth}" + ("_timing" if timing else "")
    run(base, "scripts.base_train", f"--depth={config.depth}", f"--max-seq-len={config.max_seq_len}",
        f"--model-tag={tag}", "--fresh", f"--device-batch-size={config.device_batch_size}",
        f"--total-batch-size={config.total_batch_size}", f"--num-iterations={steps}",
        f"--eval-tokens={1 if timing else config.eval_tokens}", "--eval-every=-1", "--sample-every=-1",
        "--save-every=-1", f"--layer-pattern={MODELS[name]}", f"--device-type={config.device_type}")
    rows = read_log(base / "logs" / f"base_{tag}.jsonl")
    start = max(i for i, row in enumerate(rows) if row["kind"] == "start")  # the log may hold earlier runs
    return rows[start:]


def step_seconds(base: Path, name: str, config: Config) -> float:
    """Return the seconds of one step of a model, from a short run without its first steps."""
    rows = train(base, name, TIMING_STEPS, config, timing=True)
    shutil.rmtree(base / "base_checkpoints" / f"{name}_d{config.depth}_timing")
    return median([row["seconds"] for row in rows if row["kind"] == "train"][TIMING_SKIPPED:])


def outcome(name: str, config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run from its log records."""
    last = {row["kind"]: row for row in rows}
    steps = [row for row in rows if row["kind"] == "train"]
    model, warm = last["model"], steps[1:] or steps  # the first step includes the warm-up
    speed = config.total_batch_size * len(warm) / sum(row["seconds"] for row in warm)
    return {"model": name, "layers": GPTConfig(**model["model_config"]).pattern(), "parameters": model["parameters"],
            "dtype": model["dtype"], "steps": len(steps), "tokens": steps[-1]["tokens"],
            "seconds": sum(row["seconds"] for row in steps), "tokens_per_second": speed,
            "loss": steps[-1]["smooth_loss"], "bpb": last["val"]["bpb"], "samples": last["samples"]["texts"]}


def block(config: Config, about: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Return the markdown for both runs. `about` describes the machine, `found` has the figures of each run."""
    rows = [[f"{row['model']} {row['layers']}", f"{row['parameters']:,}", f"{row['steps']:,}", si(row["tokens"]),
             clock(row["seconds"]), si(row["tokens_per_second"]), f"{row['loss']:.4f}", f"{row['bpb']:.4f}"]
            for row in found]
    text = (f"Real text, d{config.depth}, vocabulary {config.vocab_size:,}, rows of {config.max_seq_len}, "
            f"{config.total_batch_size:,} tokens a step, {found[0]['dtype'].removeprefix('torch.')}, "
            f"same {'tokens' if config.steps else config.match}.\n{provenance_line(about)}\n\n"
            + table(["model", "parameters", "steps", "tokens", "time", "tok/s", "train loss", "val bpb"], rows))
    for row in found:
        text += f"\n\n{row['model']} continues:\n\n" + "\n".join(f"> {sample}  " for sample in row["samples"])
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Train both models as the flags say, and print the comparison. Raises UserError for wrong flags or text."""
    parser = parser_of(Config, __doc__ or "")
    parser.add_argument("--text", nargs="+", required=True, metavar="PATH",
                        help="folders or files of text, as `nanochat.dataset import` takes them")
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    text = [str(Path(path).expanduser().resolve()) for path in flags.pop("text")]
    config = Config(**flags)
    if config.steps < 1 and config.minutes <= 0:
        raise UserError(f"--minutes must be above 0, not {config.minutes}")
    base = Path(config.base_dir).expanduser().resolve() if config.base_dir else base_dir() / "bench_real_text"
    base.mkdir(parents=True, exist_ok=True)
    about = provenance(command_line("bench.real_text", argv))
    run(base, "nanochat.dataset", "import", *text, f"--doc-separator={config.doc_separator}")
    run(base, "scripts.tok_train", f"--vocab-size={config.vocab_size}", "--doc-cap=0")
    steps = dict.fromkeys(MODELS, config.steps)
    if config.steps < 1:
        timed = MODELS if config.match == "time" else ["hybrid"]
        seconds = {name: step_seconds(base, name, config) for name in timed}
        steps = {name: max(1, round(60 * config.minutes / seconds.get(name, seconds["hybrid"]))) for name in MODELS}
    found = [outcome(name, config, train(base, name, steps[name], config)) for name in MODELS]
    print("\n" + block(config, about, found), flush=True)
    write_results(config.json, about, config, found, text=text)


if __name__ == "__main__":
    run_main(main)
