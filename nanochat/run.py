"""A run of any stage: what it starts from, what it does between its optimizer steps, and how it ends.

    origin = start_from_checkpoint(STAGES["mid"], "base", config, ranks)      # or the run's own checkpoint, to resume
    if is_trained(origin, num_iterations, ranks): return
    with loader, open_run(origin, config, ranks, num_iterations=num_iterations, loader=loader) as run:
        run.introduce(["200 steps of 2,048 tokens"])
        run.train(batches, plan, [PeriodicAction(config.eval_every, evaluate, at_zero=True)])
        run.finish("validation bpb 0.8")

The same command resumes a run where it stopped, bit for bit. Ctrl-C and SIGTERM save first. Checkpoints are written
beside training (nanochat/saving.py).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import torch

from nanochat.checkpoint import latest_step, load_checkpoint, load_on_ranks
from nanochat.cli import flag, parse
from nanochat.dataloader import PackedLoader, reshard
from nanochat.distributed import (
    Ranks,
    barrier,
    dtype_of_run,
    gather_objects,
    joined_ranks,
    on_main,
    peak_flops,
    precision_note,
)
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.evaluation.loss import evaluate_bpb
from nanochat.files import base_dir, free_name, lock
from nanochat.gpt import GPT
from nanochat.guard import CHECK_EVERY, GUARD, Guard, finite
from nanochat.kernels.choose import Choice, Wish, apply_wish, choose, parse_wish, wish_of_environment
from nanochat.kernels.dispatch import TrainingShape, has_triton
from nanochat.loading import checkpoint_dir, load_model
from nanochat.logs import RunLog
from nanochat.memory import RECOMPUTE_HELP, explained_out_of_memory, fit_batch
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import Recompute, override, published
from nanochat.saving import BackgroundSaver
from nanochat.stages import Stage
from nanochat.training import TrainingPlan, clock, run_steps, train

C = TypeVar("C")
REDUCE_DTYPE = "what several processes send gradients in; bfloat16 is half the bytes, and is summed in float32"


def kernels_flag() -> Any:
    """Return the field of the flag --kernels."""
    return flag("auto", "implementations of the fused operations: auto (measured on GPUs), measure (anew), default "
                "(not measured), or by name, such as relu2:torch,attention:flash")


@dataclass
class ChatStageFlags:
    """Flags of every stage after the base model."""

    run: str = flag("dummy", "name of the wandb run; dummy means no wandb")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    model_tag: str = flag("", "which model to start from; unset takes the only or the deepest one. "
                              "The result has the same name")
    model_step: int = flag(-1, "which of its checkpoints; -1 is the last")
    data: Literal["auto", "hub", "small-world"] = flag("auto", "what to train on: the published mixture, or "
                                                       "conversations about the built-in small world; auto is what "
                                                       "goes with the base model")
    conversations: str = flag("", "further conversations, your own: .jsonl files, with commas between")
    num_iterations: int = flag(published.mid.num_iterations, "optimizer steps; -1 = num_epochs of the data")
    embedding_lr: float = flag(published.groups["wte"].lr, "learning rate of the embedding (AdamW)")
    unembedding_lr: float = flag(published.groups["lm_head"].lr, "learning rate of the head (AdamW)")
    matrix_lr: float = flag(published.groups["matrices"].lr,
                            "learning rate of the matrices (Muon) and of the convolution taps (AdamW)")
    init_lr_frac: float = flag(published.mid.init_lr_frac, "factor of all learning rates")
    weight_decay: float = flag(published.groups["wte"].weight_decay, "weight decay of embedding, head and taps")
    grad_clip: float = flag(published.grad_clip, "largest gradient norm; 0 = no limit")
    reduce_dtype: Literal["float32", "bfloat16"] = flag("float32", REDUCE_DTYPE)
    recompute: Recompute = flag(published.mid.recompute, RECOMPUTE_HELP)
    save_every: int = flag(published.mid.save_every, "steps from one checkpoint to the next; -1 = at the end only")
    keep: int = flag(published.mid.keep, "periodical checkpoints to keep; the last one always stays")
    seed: int = flag(published.mid.seed, "of the order of the conversations, and of what is sampled")
    guard: Literal["skip", "stop", "off"] = flag("skip", GUARD)
    check_every: int = flag(100, CHECK_EVERY)
    kernels: str = kernels_flag()
    fresh: bool = flag(False, "start anew where a run of the same tag stands; that one is moved aside, not deleted")


def launch(flags: type[C], run: Callable[[C, Ranks], None], argv: Sequence[str] | None, description: str) -> None:
    """Parse the command line, join the ranks and call run(config, ranks): the `main` of every training script."""
    config = parse(flags, argv, description)
    parse_wish(config.kernels)  # raises for names that do not exist, before anything is loaded
    try:
        with joined_ranks(config.device_type) as ranks:
            run(config, ranks)
    finally:
        apply_wish(Wish())  # the choice was that of this run


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


# ---- what a run starts from

@dataclass(frozen=True)
class Origin:
    """What a run starts from: its own last checkpoint, a model of an earlier stage, or a new model.

    stage: that the run belongs to. folder: of its checkpoints, named after the model's tag.
    step: optimizer steps of this stage that are done; 0 for a new run.
    model: on the device. tokenizer: its own. meta: of the checkpoint the model was loaded from; empty for a new model.
    loaded: which checkpoint that is and why, in words.
    provenance: meta fields of every checkpoint the run writes ("data", and "from" where it began from a checkpoint).
    lock: on rank 0, of `lock_run`: no other run writes to the folder as long as this file is open.
    """

    stage: Stage
    folder: Path
    step: int
    model: GPT
    tokenizer: Any
    meta: dict[str, Any]
    loaded: str
    provenance: dict[str, Any]
    lock: IO | None = None


@dataclass(frozen=True)
class ChatDataChoice:
    """What a chat stage learns from.

    source: "hub" or "small-world". seed: the small world's. extra: files of the user's own conversations.
    """

    source: str
    seed: int
    extra: list[Path]


def resume_step(folder: Path, fresh: bool, ranks: Ranks) -> int | None:
    """Return the step of the checkpoint in `folder` to resume from, None for a new run. Collective.

    fresh: move the folder aside first, so that the run is a new one.
    """
    def look() -> int | None:
        if fresh:
            move_aside(folder)
        return latest_step(folder)

    return on_main(f"looking for a checkpoint in {folder}", look, ranks)


def lock_run(folder: Path, ranks: Ranks) -> IO | None:
    """Keep other runs from writing to a folder of checkpoints, as long as the returned file is open. Collective.

    Raises UserError where another run does.
    """
    files = []
    way_out = ("Two runs cannot write to one folder: wait until it ends, or stop it with `kill {pid}` (it saves "
               "first); another --model-tag trains beside it.")
    path = base_dir() / "locks" / f"{folder.parent.name}_{folder.name}.lock"
    on_main(f"locking {folder}", lambda: files.append(lock(path, f"{folder} is in use by a run", way_out)), ranks)
    return files[0] if files else None


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run, if there is one, to a name with the time, and print it."""
    if folder.exists():
        aside = free_name(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        folder.rename(aside)
        print(f"the run in {folder} was moved to {aside}")


def start_from_checkpoint(stage: Stage, source: str, config: ChatStageFlags, ranks: Ranks) -> Origin:
    """Load the model that a chat stage starts from: the stage's own last checkpoint, else that of the stage `source`.

    Raises:
        UserError: there is none, or the run to resume began from another model than `source` holds.
    """
    parent_folder = checkpoint_dir(source, config.model_tag or None)
    tag = parent_folder.name
    folder = base_dir() / stage.folder / tag
    file = lock_run(folder, ranks)
    step = resume_step(folder, config.fresh, ranks) or 0
    parent_step = None if config.model_step < 0 else config.model_step
    name, wanted = (stage.name, step) if step else (source, parent_step)
    model, tokenizer, meta = load_model(name, ranks.device, model_tag=tag, step=wanted, ranks=ranks)
    model.compute_dtype = dtype_of_run(ranks, meta.get("compute_dtype") if step else None)

    begun_from = _described(source, load_checkpoint(parent_folder, parent_step, weights=False).meta if step else meta)
    if step and meta.get("from", begun_from) != begun_from:
        # the newest may have a damaged file, so that the run began from the one before
        begun_from = _described(source, load_on_ranks(parent_folder, parent_step, ranks, mapped=True).meta)
    if step and meta.get("from", begun_from) != begun_from:
        raise UserError(f"{folder} was trained from another model than {parent_folder} holds now (step "
                        f"{meta['from'].get('step')} then, {begun_from['step']} now, or other weights of that step). "
                        "--fresh moves it aside and trains anew.")
    return Origin(stage=stage, folder=folder, step=step, model=model, tokenizer=tokenizer, meta=meta,
                  loaded=meta["loaded"], provenance={"data": meta.get("data"), "from": begun_from},
                  lock=file)


def _described(stage: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a checkpoint from others: its stage, step and the SHA-256 of its weights as the meta says."""
    files = meta.get("files") or {}
    weights = next((about["sha256"] for name, about in files.items() if name.startswith("model_")), None)
    return {"stage": stage, "step": meta["step"], "weights": weights}


def chat_data_choice(config: ChatStageFlags, meta: dict[str, Any]) -> ChatDataChoice:
    """Return what a chat stage learns from; with --data=auto what goes with the model of this meta."""
    about = meta.get("data") or {}
    auto = "small-world" if about.get("source") == "small-world" else "hub"
    extra = [Path(part).expanduser() for part in config.conversations.split(",") if part]
    return ChatDataChoice(auto if config.data == "auto" else config.data, about.get("seed", 0), extra)


def tokens_of_row(config: Any, model: GPT) -> int:
    """Return the tokens of a training row: --max-seq-len where it is set, else the model's own."""
    asked = getattr(config, "max_seq_len", -1)
    return asked if asked > 0 else model.config.sequence_len


def is_trained(origin: Origin, num_iterations: int, ranks: Ranks) -> bool:
    """Return whether the run has already done all its steps, and print that."""
    if origin.step < num_iterations:
        return False
    if ranks.is_main:
        print(f"{origin.folder} is trained: step {origin.step} of {num_iterations}. Nothing to do; --fresh trains it "
              "anew.")
    return True


def cannot_resume(folder: Path, why: str) -> UserError:
    """Return the error that a checkpoint cannot be trained on, with the way out."""
    return UserError(f"{folder} cannot be trained on: {why}. --fresh moves it aside and trains anew; another "
                     "--model-tag leaves it where it is.")


def loader_state(origin: Origin, ranks: Ranks) -> dict | None:
    """Return this rank's PackedLoader state to resume from, None for a new run. Raises UserError where it is gone."""
    if not origin.step:
        return None
    states = origin.meta.get("loader")
    if not states:
        raise cannot_resume(origin.folder, "it does not say how far its data was read")
    return (states if len(states) == ranks.world_size else reshard(states, ranks.world_size))[ranks.rank]


def make_optimizer(origin: Origin, config: Any, ranks: Ranks) -> MuonAdamW:
    """Return the model's optimizer, with its state where the run resumes. Raises UserError where that is gone."""
    groups = override(published.groups, matrix_lr=config.matrix_lr, embedding_lr=config.embedding_lr,
                      unembedding_lr=config.unembedding_lr, weight_decay=config.weight_decay,
                      lr_frac=getattr(config, "init_lr_frac", 1.0))
    optimizer = MuonAdamW(parameter_groups(origin.model, groups), ranks, origin.model.compute_dtype,
                          reduce_dtype=getattr(torch, config.reduce_dtype))
    if origin.step:
        found = load_on_ranks(origin.folder, origin.step, ranks, weights=False, optimizer=True, mapped=True)
        if found.optimizer_state is None:
            raise cannot_resume(origin.folder, found.no_optimizer)
        optimizer.load_state_dict(found.optimizer_state)
        if ranks.is_main:
            print_changes(origin.meta.get("user_config", {}), config, origin)
    return optimizer


def print_changes(before: dict[str, Any], config: Any, origin: Origin) -> None:
    """Print the settings that differ from those the run to resume was saved with (its user_config)."""
    changed = [f"{name} {before[name]} → {getattr(config, name)}" for name in origin.stage.settings
               if name in before and hasattr(config, name) and before[name] != getattr(config, name)]
    if changed:
        print(f"note: resuming with other settings than the run in {origin.folder} began with: {', '.join(changed)}")


# ---- the run

@dataclass(frozen=True)
class PeriodicAction:
    """Something a run does between its steps, such as an evaluation; run(step) does it.

    every: steps from one time to the next; 0 or less means never, but for the following.
    at_zero: also before the first step of a new run, where `every` is above 0.
    at_start: before the first step in any case, also of a run that resumes.
    at_end: after the last step.
    """

    every: int
    run: Callable[[int], object]
    at_zero: bool = False
    at_start: bool = False
    at_end: bool = True


def is_due(action: PeriodicAction, step: int, start: int, end: int) -> bool:
    """Return whether an action is due before step `step` of a run from `start` to `end`; step == end is the end."""
    if step == end:
        return action.at_end
    if step == start:
        return action.at_start or action.at_zero and step == 0 and action.every > 0
    return action.every > 0 and step % action.every == 0


@dataclass
class StageRun:
    """A run of a stage that is ready to train, with its log open; `open_run` makes one.

    num_iterations: optimizer steps of the whole run, those before a resume included.
    loader: whose position is saved, where the number of the step does not say it.
    kernels: the implementations that the operations use.
    results: meta fields of the checkpoints to come, such as val_bpb.
    guard: judges the steps; `open_run` makes it.
    """

    origin: Origin
    config: Any
    ranks: Ranks
    optimizer: MuonAdamW
    num_iterations: int
    log: RunLog
    loader: PackedLoader | None
    kernels: Choice
    results: dict[str, Any]
    saver: BackgroundSaver = field(default_factory=BackgroundSaver)
    began: float = field(default_factory=time.time)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.model, self.optimizer, self.ranks, self.log, mode=getattr(self.config, "guard", "off"),
                           check_every=getattr(self.config, "check_every", -1), folder=self.origin.folder,
                           judges_loss=self.origin.stage.name != "rl", meta=self._meta, start=self.origin.step,
                           wait_for_save=lambda: self._report(self.saver.wait()))
        if self.origin.step and "guard" in self.origin.meta:
            self.guard.load_state_dict(self.origin.meta["guard"])

    @property
    def model(self) -> GPT:
        return self.origin.model

    @property
    def tokenizer(self) -> Any:
        return self.origin.tokenizer

    @property
    def max_seq_len(self) -> int:
        return tokens_of_row(self.config, self.model)

    def where(self) -> str:
        """Return processes, device and precision in words."""
        count = self.ranks.world_size
        return (f"{count} process{'es' if count > 1 else ''} on {self.ranks.device.type}, "
                f"{str(self.model.compute_dtype).removeprefix('torch.')}")

    def introduce(self, lines: Sequence[str], **about: Any) -> None:
        """Print what the run is about to do, and record the model. about: further fields of the record."""
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.origin.loaded:
            self.log.say(f"{self.origin.loaded}: {parameters:,} parameters")
        for line in lines:
            self.log.say(line)
        if note := precision_note(self.ranks.device, self.model.compute_dtype):
            self.log.say(note)
        for line in self.kernels.lines():
            self.log.say(line)
        if self.origin.step:
            self.log.say(f"resuming from step {self.origin.step} of {self.origin.folder}")
        self.log.record("model", parameters=parameters, num_iterations=self.num_iterations,
                        world_size=self.ranks.world_size, dtype=str(self.model.compute_dtype),
                        model_config=self.model.config.to_dict(), start=self.origin.step, **about)
        self.log.record("kernels", **asdict(self.kernels))

    def train(self, batches: Callable[[int], Iterable[Any]], plan: TrainingPlan, actions: Sequence[PeriodicAction], *,
              mfu: bool = True) -> None:
        """Train with cross-entropy to the end, with the actions and the saves between the steps.

        Args:
            batches: given a step, this rank's micro-batches of it, as `nanochat.training.train_step` takes them.
            mfu: whether the tokens of a step are all that the model reads, so that the MFU can be told from them.

        Raises:
            UserError: training has diverged, a checkpoint could not be written, or text does not arrive any more (then
                a checkpoint is saved). SystemExit: the process was asked to stop; a checkpoint is saved.
        """
        def await_data(received: list[int]) -> UserError | None:
            if self.loader is None:
                return None
            return self.loader.prepare(3 * plan.micro_batches, lambda: bool(received))

        with explained_out_of_memory(self.config.device_batch_size, self.model.recompute):
            train(self.model, self.optimizer, batches, plan, self.ranks, self.log,
                  flops_per_token=self.model.flops_per_token(self.max_seq_len),
                  peak=peak_flops(self.ranks.device, self.model.compute_dtype) if mfu else None,
                  start=self.origin.step, before_step=self._before_step(actions), save=self._save_and_wait,
                  await_data=await_data, guard=self.guard)

    def train_by(self, one_step: Callable[[int, bool], bool], actions: Sequence[PeriodicAction]) -> None:
        """Train like `train`, with a step of another kind: one_step as `nanochat.training.run_steps` takes it."""
        with explained_out_of_memory(self.config.device_batch_size, self.model.recompute):
            run_steps(one_step, self.origin.step, self.num_iterations, self.log, flush=self.guard.settle,
                      before_step=self._before_step(actions), save=self._save_and_wait)

    def _before_step(self, actions: Sequence[PeriodicAction]) -> Callable[[int], None]:
        end = self.num_iterations
        keep = self.config.keep
        saves = PeriodicAction(self.config.save_every, lambda step: self.save(step, None if step == end else keep))

        def before_step(step: int) -> None:
            self._report(self.saver.finished())
            due = [action for action in (*actions, saves) if is_due(action, step, self.origin.step, end)]
            if due and step > self.origin.step:  # nothing is evaluated or saved whose last step was not judged
                self.guard.settle()
                self.guard.check_weights(step)
            if step == end:
                self.guard.check_end(step)
            for action in due:
                self.optimizer.wait()  # so that an action may read weights in any way
                action.run(step)
            if step == end:
                self.wait_for_save()

        return before_step

    def save(self, step: int, keep: int | None = None) -> None:
        """Start to save a checkpoint of `step` finished steps. Collective; a thread of rank 0 writes it.

        keep: see `save_checkpoint`. Raises UserError where the checkpoint before could not be written, where training
        has diverged, or where weights are not finite or not the same on all ranks; then nothing is written.
        """
        self._report(self.saver.wait())
        self.guard.settle()
        self.guard.check_weights(step)
        if not self.guard.may_save(step):
            return
        optimizer_state = self.optimizer.state_dict(self.saver.host_copy)
        position = gather_objects(self.loader.state_dict() if self.loader is not None else None, self.ranks)
        if self.ranks.is_main:
            weights = {name: self.saver.host_copy(name, tensor) for name, tensor in self.model.state_dict().items()}
            self.saver.write(self.origin.folder, step, weights, {
                **self._meta(), "guard": self.guard.state_dict(),
                **({"loader": position} if self.loader is not None else {}),
            }, optimizer_state, keep=keep, spared=self.guard.spared())

    def _meta(self) -> dict[str, Any]:
        """Return the meta fields of a checkpoint or a dump, but for those of the moment."""
        return {**self.results, "model_config": self.model.config.to_dict(), "user_config": asdict(self.config),
                "device_batch_size": self.config.device_batch_size, "max_seq_len": self.max_seq_len,
                "recompute": self.config.recompute,
                "compute_dtype": str(self.model.compute_dtype).removeprefix("torch."),
                "num_iterations": self.num_iterations, "tokenizer": self.tokenizer.fingerprint(),
                "world_size": self.ranks.world_size, **self.origin.provenance}

    def wait_for_save(self) -> None:
        """Wait until the checkpoint that is being written is on disk. Collective. Raises UserError where it is not."""
        self._report(self.saver.wait())
        barrier(self.ranks, "saving the last checkpoint")

    def _save_and_wait(self, step: int) -> None:
        self.save(step)
        self.wait_for_save()

    def _report(self, written: Sequence[int]) -> None:
        """Print and record that the checkpoints of these steps are on disk."""
        for step in written:
            self.log.say(f"step {step:05d} | saved {self.origin.folder}")
            self.log.record("checkpoint", step=step, folder=str(self.origin.folder))

    def evaluate_bpb(self, step: int, rows: Iterable[Any], token_bytes: torch.Tensor) -> None:
        """Print and record the bits per byte on `rows`; later checkpoints say it as val_bpb. Collective."""
        bpb = finite(evaluate_bpb(self.model, rows, token_bytes, self.ranks), "validation bpb", step)
        self.results["val_bpb"] = bpb
        self.log.say(f"step {step:05d} | validation bpb {bpb:.4f}")
        self.log.record("val", step=step, bpb=bpb)

    def show_samples(self, step: int, texts: Sequence[str]) -> None:
        """Print and record what the model wrote."""
        for text in texts:
            self.log.say(f"  {text}")
        self.log.record("samples", step=step, texts=texts)

    def sample_answers(self, step: int, task: Any, count: int = 4, max_tokens: int = 160) -> None:
        """Let the model answer the first few conversations of a task, print and record them. Collective; rank 0 does
        it."""
        def answer() -> None:
            engine, texts = Engine(self.model, self.tokenizer, graphs=False), []
            for i in range(min(count, len(task))):
                prompt = self.tokenizer.render_for_completion(task[i])
                rows, _ = engine.generate_batch(prompt, max_tokens=max_tokens, temperature=0)
                texts.append(self.tokenizer.decode(rows[0]).replace("\n", " ⏎ "))
            self.show_samples(step, texts)

        on_main("sample answers", answer, self.ranks)

    def finish(self, text: str, **results: Any) -> None:
        """Print and record that the run is done. text: the result in words. results: fields of the record."""
        memory = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None
        seconds = time.time() - self.began
        self.log.record("done", step=self.num_iterations, seconds=seconds, peak_memory=memory, **results)
        self.log.say(f"done in {clock(seconds)}: {text}" + (f", peak memory {memory / 1e9:.1f} GB" if memory else "")
                     + f". The model is in {self.origin.folder}")


@contextmanager
def open_run(origin: Origin, config: Any, ranks: Ranks, *, num_iterations: int, kernels: Choice,
             loader: PackedLoader | None = None, **results: Any) -> Iterator[StageRun]:
    """Make the optimizer, open the log and yield the run.

    The end of the block, however it ends, waits for the checkpoint that is being written, and closes the log.

    Args:
        num_iterations: optimizer steps of the whole run.
        loader: whose position goes into the checkpoints, where the number of the step does not say it.
        kernels: from `choose_kernels`.
        results: meta fields of every checkpoint, as they are before the first evaluation.
    """
    optimizer = make_optimizer(origin, config, ranks)
    with RunLog(origin.stage.name, origin.folder.name, asdict(config), wandb_run=config.run,
                enabled=ranks.is_main) as log:
        run = StageRun(origin=origin, config=config, ranks=ranks, optimizer=optimizer, num_iterations=num_iterations,
                       log=log, loader=loader, kernels=kernels, results=results)
        try:
            yield run
        except BaseException:  # training has diverged, for example: the last checkpoint before that is not lost
            try:
                run._report(run.saver.wait())
            except UserError as error:
                log.say(f"besides: {error}")
            raise
        run._report(run.saver.wait())
