"""What mid_train, chat_sft and chat_rl have in common: their flags, the model they start from, checkpoints, going on after a stop."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat.checkpoint import checkpoint_dir, latest_step, load_checkpoint, load_model, save_checkpoint
from nanochat.cli import flag
from nanochat.distributed import Ranks, barrier, broadcast_object, compute_dtype, gather_objects
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.files import base_dir, free_name
from nanochat.logs import RunLog
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.stages import STAGES
from nanochat.training import clock


@dataclass
class StageConfig:
    """Flags of every stage after the base model."""

    run: str = flag("dummy", "name of the wandb run; dummy means no wandb")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    model_tag: str = flag("", "which model to start from; unset takes the only or the deepest one. The result has the same name")
    model_step: int = flag(-1, "which of its checkpoints; -1 is the last")
    data: Literal["auto", "hub", "small-world"] = flag("auto", "what to train on: the published mixture, or conversations about the "
                                                       "built-in small world; auto is what goes with the base model")
    conversations: str = flag("", "further conversations, your own: .jsonl files, with commas between")
    num_iterations: int = flag(-1, "optimizer steps; -1 = num_epochs of the data")
    embedding_lr: float = flag(0.2, "rate of the embedding (AdamW)")
    unembedding_lr: float = flag(0.004, "rate of the head (AdamW)")
    matrix_lr: float = flag(0.02, "rate of the matrices (Muon) and of the convolution taps (AdamW)")
    init_lr_frac: float = flag(1.0, "what all rates are multiplied with")
    weight_decay: float = flag(0.0, "decay of embedding, head and taps")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 = no limit")
    save_every: int = flag(-1, "steps from one checkpoint to the next; -1 = at the end only")
    keep: int = flag(2, "periodical checkpoints to keep; the last one always stays")
    seed: int = flag(0, "of the order of the conversations, and of what is sampled")
    fresh: bool = flag(False, "start anew where a run of the same tag stands; that one is moved aside, not deleted")


def move_aside(folder: Path) -> None:
    """Give the folder of an earlier run a name with the time, if there is one, and say so."""
    if folder.exists():
        aside = free_name(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        folder.rename(aside)
        print(f"the run in {folder} was moved to {aside}")


def tell_changes(before: dict[str, Any], config: Any, names: Sequence[str], folder: Path) -> None:
    """Print which of these settings are others than those the run in `folder` was saved with (its user_config)."""
    changed = [f"{name} {before[name]} → {getattr(config, name)}" for name in names
               if name in before and hasattr(config, name) and before[name] != getattr(config, name)]
    if changed:
        print(f"note: going on with other settings than the run in {folder} began with: {', '.join(changed)}")


class Stage:
    """A run of one stage: model, tokenizer and optimizer, from the stage before or from where this one was stopped.

    start: optimizer steps done. data: "hub" or "small-world", world: the small world's seed. meta: of the checkpoint that was loaded.
    max_seq_len: tokens in a row, the model's own unless a flag says another.
    """

    def __init__(self, name: str, source: str, config: Any, ranks: Ranks):
        self.name, self.config, self.ranks = name, config, ranks
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        source_folder = checkpoint_dir(source, config.model_tag or None)
        self.tag = source_folder.name
        self.folder = base_dir() / STAGES[name].folder / self.tag
        if config.fresh and ranks.is_main:
            move_aside(self.folder)
        self.start = broadcast_object(latest_step(self.folder) or 0 if ranks.is_main else 0, ranks)
        step = None if config.model_step < 0 else config.model_step
        self.model, self.tokenizer, self.meta = (
            load_model(name, ranks.device, model_tag=self.tag, step=self.start) if self.start
            else load_model(source, ranks.device, model_tag=self.tag, step=step))
        self._begun_from = self._beginning(source, source_folder, step)
        about = self.meta.get("data") or {}
        self.world = about.get("seed", 0)
        self.data = config.data if config.data != "auto" else "small-world" if about.get("source") == "small-world" else "hub"
        self.extra = [Path(part).expanduser() for part in config.conversations.split(",") if part]
        self.dtype = compute_dtype(ranks.device)
        self.model.compute_dtype = self.dtype
        asked = getattr(config, "max_seq_len", -1)
        self.max_seq_len = asked if asked > 0 else self.model.config.sequence_len
        self.began = time.time()

    def _beginning(self, source: str, folder: Path, step: int | None) -> dict[str, Any]:
        """What this run begins or began from. Raises UserError where that is no longer what stands there."""
        now = self.meta if not self.start else load_checkpoint(folder, step).meta
        files = now.get("files") or {}
        here = {"stage": source, "step": now["step"],
                "weights": next((said["sha256"] for name, said in files.items() if name.startswith("model_")), None)}
        if self.start and self.meta.get("from", here) != here:
            raise UserError(f"{self.folder} was trained from another model than {folder} holds now (step {self.meta['from'].get('step')} "
                            f"then, {here['step']} now, or other weights of that step). --fresh moves it aside and trains anew.")
        return here

    def finished(self, num_iterations: int) -> bool:
        """Is it trained already? Says so. Call it when the number of steps is known."""
        self.num_iterations = num_iterations
        if self.start < num_iterations:
            return False
        if self.ranks.is_main:
            print(f"{self.folder} is trained: step {self.start} of {num_iterations}. Nothing to do; --fresh trains it anew.")
        return True

    def make_optimizer(self) -> None:
        """The optimizer, with its state where the run goes on. Raises UserError where that is gone."""
        config, part = self.config, self.config.init_lr_frac
        self.optimizer = MuonAdamW(parameter_groups(
            self.model, matrix_lr=part * config.matrix_lr, embedding_lr=part * config.embedding_lr, conv_lr=part * config.matrix_lr,
            unembedding_lr=part * config.unembedding_lr, weight_decay=config.weight_decay), self.ranks)
        if self.start:
            found = load_checkpoint(self.folder, self.start, optimizer=True)
            if found.optimizer_state is None:
                raise UserError(f"{self.folder} cannot be trained on: {found.no_optimizer}. --fresh moves it aside and trains anew.")
            self.optimizer.load_state_dict(found.optimizer_state)
            if self.ranks.is_main:
                tell_changes(found.meta.get("user_config", {}), config, STAGES[self.name].settings, self.folder)

    def introduce(self, log: RunLog, num_iterations: int, what: str, **about: Any) -> None:
        """Say what is about to happen, and record it."""
        parameters = sum(p.numel() for p in self.model.parameters())
        log.say(f"{self.meta['loaded']}: {parameters:,} parameters")
        log.say(f"{num_iterations:,} steps of {what}; {self.ranks.world_size} process{'es' if self.ranks.world_size > 1 else ''} on "
                f"{self.ranks.device.type}, {str(self.dtype).removeprefix('torch.')}")
        if self.start:
            log.say(f"going on from step {self.start}")
        log.record("model", parameters=parameters, num_iterations=num_iterations, world_size=self.ranks.world_size, dtype=str(self.dtype),
                   model_config=self.model.config.to_dict(), start=self.start, data=self.data, **about)

    def sample(self, log: RunLog, step: int, task: Any, count: int = 4, max_tokens: int = 160) -> None:
        """Say and record how the model answers the first few conversations of a task; rank 0 alone does it."""
        if not self.ranks.is_main:
            return
        engine, texts = Engine(self.model, self.tokenizer, graphs=False), []
        for i in range(min(count, len(task))):
            prompt = self.tokenizer.render_for_completion(task[i])
            rows, _ = engine.generate_batch(prompt, max_tokens=max_tokens, temperature=0)
            texts.append(self.tokenizer.decode(rows[0]).replace("\n", " ⏎ "))
        for text in texts:
            log.say(f"  {text}")
        log.record("samples", step=step, texts=texts)

    def save(self, log: RunLog, step: int, keep: int | None = None, loader: Any = None, **results: Any) -> None:
        """Write a checkpoint; collective, rank 0 writes. loader: this rank's position in the data, where the step does not say it."""
        optimizer_state = self.optimizer.state_dict()
        loaders = gather_objects(loader, self.ranks)
        if self.ranks.is_main:
            save_checkpoint(self.folder, step, self.model.state_dict(), {
                **results, "model_config": self.model.config.to_dict(), "user_config": asdict(self.config),
                "device_batch_size": self.config.device_batch_size, "max_seq_len": self.max_seq_len,
                "num_iterations": self.num_iterations, "tokenizer": self.tokenizer.fingerprint(), "world_size": self.ranks.world_size,
                "data": self.meta.get("data"), "from": self._begun_from, **({"loader": loaders} if loader is not None else {}),
            }, optimizer_state, keep=keep)
            log.say(f"step {step:05d} | saved {self.folder}")
            log.record("checkpoint", step=step, folder=str(self.folder))
        barrier(self.ranks)

    def finish(self, log: RunLog, step: int, text: str, **results: Any) -> None:
        """Say and record that it is done."""
        memory = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None
        seconds = time.time() - self.began
        log.record("done", step=step, seconds=seconds, peak_memory=memory, **results)
        log.say(f"done in {clock(seconds)}: {text}" + (f", peak memory {memory / 1e9:.1f} GB" if memory else "")
                + f". The model is in {self.folder}")
