"""A run that is ready to train: its steps, what it does between them, its checkpoints, and its end."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nanochat.chat_data import ConversationSteps, SupervisedSteps
from nanochat.dataloader import PackedLoader
from nanochat.distributed import Ranks, barrier, gather_objects, on_main, peak_flops, precision_note
from nanochat.engine import Engine
from nanochat.errors import NotWritten, UserError
from nanochat.evaluation.loss import EvalRows, evaluate_bpb
from nanochat.evaluation.verdict import Progress
from nanochat.gpt import GPT
from nanochat.guard import Guard, finite
from nanochat.kernels.choose import Choice
from nanochat.launcher import RESTARTED, at_step
from nanochat.logs import RunLog, read_log
from nanochat.memory import explained_out_of_memory
from nanochat.optim import MuonAdamW
from nanochat.run.origin import Origin, make_optimizer, move_aside, tokens_of_row
from nanochat.saving import BackgroundSaver, check_room, look_ahead
from nanochat.training import TrainingPlan, clock, run_steps, train
from nanochat.watch import busy

Loader = PackedLoader | ConversationSteps | SupervisedSteps


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


def is_due(action: PeriodicAction, step: int, start: int, end: int, stopped: bool = False) -> bool:
    """Return whether an action is due before step `step` of a run from `start` to `end`; step == end is the end.

    stopped: the checkpoint of `start` was saved when the run was asked to stop, before what was due at that step.
    """
    if step == end:
        return action.at_end
    if step == start and not (stopped and action.every > 0 and step % action.every == 0):
        return action.at_start or action.at_zero and step == 0 and action.every > 0
    return action.every > 0 and step % action.every == 0


@dataclass
class StageRun:
    """A run of a stage that is ready to train, with its log open; `open_run` makes one.

    num_iterations: optimizer steps of the whole run, those before a resume included.
    loader: whose position in the data is saved.
    kernels: the implementations that the operations use.
    results: meta fields of the checkpoints to come, such as val_bpb.
    progress: compares the end of the stage with its beginning.
    guard: judges the steps; `open_run` makes it.
    """

    origin: Origin
    config: Any
    ranks: Ranks
    optimizer: MuonAdamW
    num_iterations: int
    log: RunLog
    loader: Loader | None
    kernels: Choice
    results: dict[str, Any]
    progress: Progress
    saver: BackgroundSaver = field(default_factory=BackgroundSaver)
    began: float = field(default_factory=time.time)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.model, self.optimizer, self.ranks, self.log, mode=getattr(self.config, "guard", "off"),
                           check_every=getattr(self.config, "check_every", -1), folder=self.origin.folder,
                           judges_loss=self.origin.stage.name != "rl", meta=self._meta, start=self.origin.step,
                           wait_for_save=lambda: self._report(self.saver.wait))
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
            if not isinstance(self.loader, PackedLoader):
                return None
            with busy("waiting for text"):
                return self.loader.prepare(3 * plan.micro_batches, lambda: bool(received))

        with explained_out_of_memory(self.config.device_batch_size, self.model.recompute):
            train(self.model, self.optimizer, batches, plan, self.ranks, self.log,
                  flops_per_token=self.model.flops_per_token(self.max_seq_len),
                  peak=peak_flops(self.ranks.device, self.model.compute_dtype) if mfu else None,
                  start=self.origin.step, before_step=self._before_step(actions), save=self._save_and_wait,
                  await_data=await_data, guard=self.guard, tokens=self._tokens_before(plan))

    def _tokens_before(self, plan: TrainingPlan) -> int:
        """Return how many tokens this run trained on before it resumed, by its log, where the step does not tell."""
        if plan.tokens_per_step is not None or not self.origin.step or not self.ranks.is_main:
            return 0
        return next((row["tokens"] for row in reversed(read_log(self.log.path)) if row.get("kind") == "train"
                     and row.get("step") == self.origin.step and isinstance(row.get("tokens"), int)), 0)

    def train_by(self, one_step: Callable[[int, bool], bool], actions: Sequence[PeriodicAction]) -> None:
        """Train like `train`, with a step of another kind: one_step as `nanochat.training.run_steps` takes it."""
        with explained_out_of_memory(self.config.device_batch_size, self.model.recompute):
            run_steps(one_step, self.origin.step, self.num_iterations, self.log, flush=self.guard.settle,
                      before_step=self._before_step(actions), save=self._save_and_wait)

    def _before_step(self, actions: Sequence[PeriodicAction]) -> Callable[[int], None]:
        end, stopped = self.num_iterations, bool(self.origin.step and self.origin.meta.get("stopped"))
        keep = self.config.keep
        saves = PeriodicAction(self.config.save_every, lambda step: self.save(step, None if step == end else keep))

        def before_step(step: int) -> None:
            at_step(step)
            self._report(self.saver.finished)
            due = [action for action in (*actions, saves) if is_due(action, step, self.origin.step, end, stopped)]
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

    def save(self, step: int, keep: int | None = None, stopped: bool = False) -> None:
        """Start to save a checkpoint of `step` finished steps. Collective; a thread of rank 0 writes it.

        keep: see `save_checkpoint`. stopped: what is due at this step, such as an evaluation, was not done.

        Raises:
            UserError: training has diverged, or weights are not finite or not the same on all ranks; then nothing is
                written.
        """
        self._report(self.saver.wait)
        self.guard.settle()
        self.guard.check_weights(step)
        if not self.guard.may_save(step):
            return
        optimizer_state = self.optimizer.state_dict(self.saver.host_copy)
        if self.ranks.is_main:
            weights = {name: self.saver.host_copy(name, tensor) for name, tensor in self.model.state_dict().items()}
            self.saver.write(self.origin.folder, step, weights, {
                **self._meta(), "guard": self.guard.state_dict(), **({"stopped": True} if stopped else {}),
                **({"loader": self.loader.state_dict()} if self.loader is not None else {}),
            }, optimizer_state, keep=keep, keep_every=self.config.keep_every, spared=self.guard.spared())

    def _meta(self) -> dict[str, Any]:
        """Return the meta fields of a checkpoint or a dump, but for those of the moment."""
        return {**self.results, "model_config": self.model.config.to_dict(), "user_config": asdict(self.config),
                "device_batch_size": self.config.device_batch_size, "max_seq_len": self.max_seq_len,
                "recompute": self.config.recompute,
                "compute_dtype": str(self.model.compute_dtype).removeprefix("torch."),
                "num_iterations": self.num_iterations, "tokenizer": self.tokenizer.fingerprint(),
                "world_size": self.ranks.world_size, **self.origin.provenance}

    def wait_for_save(self) -> None:
        """Wait until the run's last checkpoint is on disk, for a while also until there is room. Collective.

        Raises NotWritten where it is not.
        """
        self._tell(self.saver.wait_for_room(self.log.say))
        barrier(self.ranks, "saving the last checkpoint")

    def _save_and_wait(self, step: int) -> None:
        self.save(step, stopped=True)
        self.wait_for_save()

    def _report(self, written: Callable[[], Sequence[int]]) -> None:
        """Tell which checkpoints are on disk, or warn that a periodic one could not be written: the run goes on."""
        try:
            self._tell(written())
        except NotWritten as error:
            self.log.say(f"warning: step {self.saver.step:05d} was not saved: {error} Training goes on.")
            self.log.record("not_saved", step=self.saver.step, reason=str(error))

    def _tell(self, written: Sequence[int]) -> None:
        """Print and record that the checkpoints of these steps are on disk, and warn where the disk fills."""
        for step in written:
            self.log.say(f"step {step:05d} | saved {self.origin.folder}")
            self.log.record("checkpoint", step=step, folder=str(self.origin.folder))
            if step < self.num_iterations:
                warning = look_ahead(self.origin.folder, step, self.config.keep, self.config.keep_every)
                if warning:
                    self.log.say(warning)

    def evaluate_bpb(self, step: int, rows: EvalRows, token_bytes: torch.Tensor, whole: bool = True) -> None:
        """Print and record the bits per byte on `rows`; later checkpoints say it as val_bpb. Collective.

        whole: False only measures where the run begins, on a few batches.
        """
        def measure(known: float | None = None) -> None:
            self.progress.measure(step, self.num_iterations, "bpb",
                                  lambda n: evaluate_bpb(self.model, rows.first(n), token_bytes, self.ranks),
                                  len(rows), rows.shape, known)

        if not whole:
            return measure()
        bpb = finite(evaluate_bpb(self.model, rows, token_bytes, self.ranks), "validation bpb", step)
        measure(bpb)
        if self.origin.stage.name == "base" and self.progress.verdict is not None:
            self.progress.compare_with_unigram(bpb, rows.unigram_bpb(token_bytes))
        self.results.update(val_bpb=bpb, val_step=step)
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
        """Print and record that the run is done, and whether it taught anything.

        A stage that did harm is told loudly and its exit status is 0: its checkpoint is whole, and whether it is wanted
        is not for a number to decide.

        text: the result in words. results: fields of the record.
        """
        memory = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None
        seconds = time.time() - self.began
        verdict = self.progress.verdict
        if verdict is not None:
            self.log.record("verdict", step=self.num_iterations, **asdict(verdict))
        self.log.record("done", step=self.num_iterations, seconds=seconds, peak_memory=memory, **results)
        self.log.say(f"done in {clock(seconds)}: {text}" + (f", peak memory {memory / 1e9:.1f} GB" if memory else "")
                     + f". The model is in {self.origin.folder}")
        if verdict is not None:
            self.log.say(str(verdict))
            if verdict.warning():
                self.log.say(verdict.warning())


def room_for(origin: Origin, config: Any, optimizer: MuonAdamW, num_iterations: int) -> str:
    """Return a warning where the disk has no room for all that the run will write; see `check_room`."""
    size = sum(4 * p.numel() for p in origin.model.parameters()) + optimizer.bytes_of_state()
    every = config.save_every
    saves = range((origin.step // every + 1) * every, num_iterations, every) if every > 0 else ()
    return check_room(origin.folder, size, saves, config.keep, config.keep_every, num_iterations - origin.step)


def measured_before(origin: Origin) -> dict[str, Any]:
    """Return what the run measured before it resumed: its next checkpoints say it until it is measured again."""
    return {name: origin.meta[name] for name in ("val_bpb", "val_loss", "val_step")
            if origin.step and name in origin.meta}


@contextmanager
def open_run(origin: Origin, config: Any, ranks: Ranks, *, num_iterations: int, kernels: Choice,
             loader: Loader | None = None, lr_factor: float = 1.0, decay_factor: float = 1.0,
             **results: Any) -> Iterator[StageRun]:
    """Make the optimizer, open the log and yield the run.

    The end of the block, however it ends, waits for the checkpoint that is being written, closes the log and
    unlocks the folder.

    Args:
        num_iterations: optimizer steps of the whole run.
        loader: whose position in the data goes into the checkpoints.
        kernels: from `choose_kernels`.
        lr_factor, decay_factor: see `make_optimizer`.
        results: meta fields of every checkpoint, as they are before the first evaluation.

    Raises:
        NotWritten: on all ranks, where the disk has no room for a checkpoint.
    """
    prints = gather_objects(origin.tokenizer.fingerprint(), ranks)
    if other := next((rank for rank, print_ in enumerate(prints) if print_ != prints[0]), 0):
        raise UserError(f"rank {other} has another tokenizer than rank 0: the text on their machines differs. Copy "
                        "base_data and tokenizer of node 0's base folder to the other nodes.")
    optimizer = make_optimizer(origin, config, ranks, lr_factor, decay_factor)
    progress = Progress(dict(origin.meta.get("began") or {}) if origin.step else {}, fresh=origin.step == 0)
    warning = on_main("looking at the disk", lambda: room_for(origin, config, optimizer, num_iterations), ranks)
    log = RunLog(origin.stage.name, origin.folder.name, asdict(config), wandb_run=config.run, resumes=origin.step > 0,
                 enabled=ranks.is_main)
    with origin.lock or nullcontext(), log:
        if origin.fresh:  # only now: what else could be wrong with the flags was looked at
            on_main(f"moving {origin.folder} aside", lambda: move_aside(origin.folder), ranks)
        if why := os.environ.get(RESTARTED):
            log.record("restart", why=why)
        run = StageRun(origin=origin, config=config, ranks=ranks, optimizer=optimizer, num_iterations=num_iterations,
                       log=log, loader=loader, kernels=kernels, progress=progress,
                       results={**results, **measured_before(origin), "began": progress.began})
        if warning:
            log.say(warning)
        try:
            yield run
        except BaseException:  # training has diverged, for example: the last checkpoint before that is not lost
            try:
                run._tell(run.saver.wait())
            except UserError as error:
                log.say(f"besides: {error}")
            raise
        run._tell(run.saver.wait())
