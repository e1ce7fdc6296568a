"""Write tests/golden/train_d2.txt: the losses of 50 training steps of a small hybrid, for tests/test_golden_curve.py.

    python -m tests.golden.make

The real scripts make them, in this process: the small world's text, a tokenizer for it, and scripts.base_train with
depth 2 (one SLC2 layer, one attention layer) in float32 on one thread. Write the file again only where a change of the
numbers is meant, and say so in the commit.
"""

import os
import tempfile
from pathlib import Path

import torch

from nanochat.logs import read_log
from tests.helpers import small_text_and_tokenizer

CURVE = Path(__file__).with_name("train_d2.txt")
STEPS = 50
TRAIN = ["--depth=2", "--max-seq-len=64", "--device-batch-size=4", "--total-batch-size=512",
         f"--num-iterations={STEPS}", "--eval-every=-1", "--eval-tokens=500", "--save-every=-1", "--sample-every=-1",
         "--device-type=cpu", "--compile=no"]


def instruction_set() -> str:
    """Return the vector instructions that torch and our crate use here: they decide the order of float32 sums."""
    try:
        from cpukernels import runs_on
    except ImportError:
        return f"torch {torch.backends.cpu.get_cpu_capability()}, no cpukernels"
    return f"torch {torch.backends.cpu.get_cpu_capability()}, cpukernels {runs_on()[0]}"


def train() -> list[float]:
    """Train on the text and tokenizer in $NANOCHAT_BASE_DIR. Returns the loss of each step, in nats a token."""
    from nanochat.files import base_dir
    from scripts import base_train
    threads, dtype = torch.get_num_threads(), os.environ.get("NANOCHAT_DTYPE")
    os.environ["NANOCHAT_DTYPE"] = "float32"
    torch.set_num_threads(1)
    try:
        base_train.main([*TRAIN, "--model-tag=golden"])
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("NANOCHAT_DTYPE") if dtype is None else os.environ.update(NANOCHAT_DTYPE=dtype)
    return [row["loss"] for row in read_log(base_dir() / "logs" / "base_golden.jsonl") if row["kind"] == "train"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        small_text_and_tokenizer()
        losses = train()
    header = f"# made by: python -m tests.golden.make | on: {instruction_set()}"
    CURVE.write_text("\n".join([header, *(f"{loss:.9f}" for loss in losses)]) + "\n", encoding="utf-8")
    print(f"{CURVE}: {len(losses)} losses, from {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
