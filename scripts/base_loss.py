"""Evaluate a base model: bits per byte of training and validation text, and greedy continuations of documents.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag=d20
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from nanochat.checks import NOTHING_CHANGED, check_tag, dry_run_flag, need_writable
from nanochat.cli import COUNT, ROWS, STEP_OR_LAST, flag, parse, run_main
from nanochat.dataloader import TextSource
from nanochat.dataset import data_dir, iter_documents
from nanochat.distributed import Ranks, joined_ranks
from nanochat.engine import Engine
from nanochat.evaluation.loss import EvalRows, evaluate_bpb
from nanochat.files import base_dir
from nanochat.loading import load_for_decoding
from nanochat.logs import RunLog
from nanochat.recipe import published


@dataclass
class Config:
    """Flags of base_loss."""

    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    device_batch_size: int = flag(published.base_eval.device_batch_size, "sequences in a batch of one device",
                                  within=ROWS)
    split_tokens: int = flag(published.base_eval.split_tokens, "tokens of each split that are evaluated", within=COUNT)
    model_tag: str = flag("", "which model under base_checkpoints; unset takes the only or the deepest one")
    model_step: int = flag(-1, "which of its checkpoints; -1 is the last", within=STEP_OR_LAST)
    data_dir: str = flag("", "folder of shards; unset is base_data")
    quantize: Literal["none", "int8"] = flag("none", "int8: evaluate the model with 8-bit weights")
    dry_run: bool = dry_run_flag()

    def check(self) -> None:
        """Raise UserError for a tag that is none."""
        check_tag(self.model_tag)


def beginnings(tokenizer, folder: Path, count: int = 4, words: int = 6) -> list[str]:
    """Return the first words of some validation documents: prompts of the kind of text the model was trained on."""
    texts = (" ".join(text.split()[:words]) for text in islice(iter_documents("val", folder), 10 * count))
    return [text for text in texts if text][:count]


def samples(model, tokenizer, prompts: list[str], max_tokens: int = 48) -> list[str]:
    """Return each prompt with its greedy continuation, on one line."""
    engine = Engine(model, tokenizer, graphs=False)
    texts = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
        rows, _ = engine.generate_batch(ids, max_tokens=max_tokens, temperature=0)
        texts.append(f"{prompt} >>> {tokenizer.decode(rows[0][len(ids):]).strip()}".replace("\n", " ⏎ "))
    return texts


def bits_per_byte(model, tokenizer, config: Config, folder: Path, ranks: Ranks, log: RunLog) -> dict[str, float]:
    """Print and return the bits per byte of each split, "train" and "val". Collective."""
    token_bytes = tokenizer.token_bytes().to(ranks.device)
    bpb = {}
    for split in ("train", "val"):
        batches = EvalRows(TextSource(tokenizer, split, folder), config.device_batch_size, model.config.sequence_len,
                           config.split_tokens, ranks=ranks)
        bpb[split] = evaluate_bpb(model, batches, token_bytes, ranks)
        log.say(f"{split} bpb {bpb[split]:.4f}")
    return bpb


def evaluate(model, tokenizer, config: Config, ranks: Ranks, log: RunLog, parts: Sequence[str] = ("bpb", "sample")
             ) -> None:
    """Print and record the bits per byte of both splits ("bpb") and continuations of documents ("sample")."""
    folder = text_folder(config)
    bpb = bits_per_byte(model, tokenizer, config, folder, ranks, log) if "bpb" in parts else {}
    texts = samples(model, tokenizer, beginnings(tokenizer, folder)) if "sample" in parts and ranks.is_main else []
    for text in texts:
        log.say(f"  {text}")
    log.record("loss", **{f"{split}_bpb": value for split, value in bpb.items()}, samples=texts)


def look_at_text(tokenizer, config: Config) -> list[str]:
    """Return what would be read, in words. Raises UserError where there is no text of a split."""
    folder = text_folder(config)
    for split in ("train", "val"):
        TextSource(tokenizer, split, folder)
    return [f"bits per byte of {config.split_tokens:,} tokens of each split of {folder}, and samples"]


def text_folder(config: Config) -> Path:
    """Return the folder of the text that is evaluated."""
    return Path(config.data_dir).expanduser() if config.data_dir else data_dir()


def run(config: Config, stage: str, then: Callable[..., object], look: Callable[..., list[str]]) -> None:
    """Load the model, look at all that is needed, and call then(model, tokenizer, meta, ranks, log) on all ranks.

    Args:
        stage: name of the log.
        look: called as look(tokenizer, meta, ranks), it raises UserError for what is missing, and returns what will be
            done in words; a dry run ends with these.
    """
    need_writable(base_dir() / "logs")
    with joined_ranks(config.device_type) as ranks:
        model, tokenizer, meta = load_for_decoding("base", ranks.device, model_tag=config.model_tag or None,
                                                   step=None if config.model_step < 0 else config.model_step,
                                                   quantize=config.quantize, ranks=ranks)
        lines = look(tokenizer, meta, ranks)
        if config.dry_run:
            if ranks.is_main:
                print("\n".join([f"{meta['loaded']}: evaluated would be", *lines,
                                 NOTHING_CHANGED]))
            return
        with RunLog(stage, Path(meta["folder"]).name, asdict(config), enabled=ranks.is_main) as log:
            log.say(meta["loaded"])
            then(model, tokenizer, meta, ranks, log)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the flags say. Raises UserError for a mistake of the user."""
    config = parse(Config, argv, __doc__)
    run(config, "base_loss",
        lambda model, tokenizer, meta, ranks, log: evaluate(model, tokenizer, config, ranks, log),
        lambda tokenizer, meta, ranks: look_at_text(tokenizer, config))


if __name__ == "__main__":
    run_main(main)
