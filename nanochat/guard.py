"""Judge every training step: skip bad updates, stop a run that diverges, compare the weights of the ranks.

    guard = Guard(model, optimizer, ranks, log, mode="skip")
    stats = train_step(model, optimizer, guard.recorded(step, batches), ranks, limits=guard.limits(step),
                       before_update=guard.check_due(step))
    guard.watch(step, stats)
    guard.settle(leave=1)                            # reads and judges the step before this one

    python -m nanochat.guard DUMP                    # does a step that ended a run again, and says where it goes wrong

Steps count from 0, so the checkpoint of step 7 is what step 7 began with.

Which updates are skipped. A loss or a gradient norm that is not finite; a gradient norm above its band, exp(mean + 6
sigma) of the logarithm of the last 128 norms, and at least 8 times their geometric mean (norms are skewed: healthy runs
here come to 10 sigma of the norm itself); a loss above mean + 6 sigma of the last 128 losses, and at least half a nat
above their mean. The bands begin after 64 steps. The device decides, so that no step waits for the host: the limits of
step s are computed from the steps up to s − 2, whose numbers the host has by then, however fast it is. The history is
saved in the checkpoints, so a run that resumes has the same limits. 6 sigma over 128 steps is the practice of OLMo 2
(arXiv 2501.00656), there of the norm itself.

When a run stops. After IN_A_ROW skipped steps one after the other, or OF_WINDOW among the last 128; the update after
the last of them is held back, so that a dump of the weights and of that step's batch can be written. When the smoothed
loss has been MARGIN above its lowest value for PATIENCE steps: then checkpoints are not written from the SUSPECT-th of
these steps on, and those that were written since the loss began to rise are set aside. When weights are not finite, or
not the same on all ranks.

The weights of the ranks. Each rank owns a slice of every bucket, and has copies of the others' slices, which the update
of the owner replaces after each step. So the copies are compared at the end of a backward pass, just before that: they
are what the step was computed with.
"""

import argparse
import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint import load_checkpoint, move_checkpoints, save_checkpoint
from nanochat.distributed import Ranks, gather_objects, on_main
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.logs import RunLog
from nanochat.optim import MuonAdamW

MODES = ("skip", "stop", "off")
WINDOW = 128        # steps of a band
WARM_UP = 64        # steps before it counts
SIGMAS = 6.0
NORM_AT_LEAST = math.log(8.0)  # above the mean of the logarithm of the norm. Healthy runs come to the 7.9-fold
LOSS_AT_LEAST = 0.5            # nats above the mean loss
IN_A_ROW, OF_WINDOW = 5, 16    # skipped steps that end a run
SMOOTHING = 0.9     # decay of the moving average of the loss, per step
MARGIN = 1.0        # nats of the smoothed loss above its lowest. Healthy runs come to 0.07
PATIENCE = 25       # steps above it that end a run
SUSPECT = 5         # steps above it, from which on nothing is saved
DUMPS = "diverged"  # folder of the dumps and of what was set aside, in the folder of the checkpoints


GUARD = ("what to do about a loss or gradient norm that is not finite or far above the last ones: skip the update, "
         "stop at once, or off, to stop where they are not finite alone")
CHECK_EVERY = "steps from one comparison of the weights of all ranks to the next; -1 = before checkpoints only"


# ---- histories, and what follows from them

@dataclass(frozen=True)
class Limits:
    """What a step may come to. hold: skip it, too, if the step before was skipped."""

    loss: float = math.inf
    norm: float = math.inf
    hold: bool = False


NO_LIMITS = Limits()


class Band:
    """The recent values of a number, and the limit above which the next one is out of the band.

    A value beyond the limit enters as the limit and a little more. So a single one, however large, moves the band
    little; a lasting change of level is accepted after a few steps, unless it is so large that the run stops before.
    """

    def __init__(self, at_least: float):
        """at_least: the least distance of the limit from the mean."""
        self.at_least = at_least
        self.values: deque[tuple[int, float]] = deque(maxlen=WINDOW + 2)

    def limit(self, step: int) -> float:
        """Return the limit of step `step`, from the steps up to step − 2; infinity where these are too few."""
        past = [value for at, value in self.values if at <= step - 2][-WINDOW:]
        if len(past) < WARM_UP:
            return math.inf
        mean = math.fsum(past) / len(past)
        sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in past) / (len(past) - 1))
        return mean + max(SIGMAS * sigma, self.at_least)

    def add(self, step: int, value: float) -> None:
        self.values.append((step, min(value, self.limit(step) + self.at_least / 2)))

    def state(self) -> str:
        """Return the values as text, of one line: a list would be a line a value in the meta file."""
        return " ".join(f"{step}:{value!r}" for step, value in self.values)

    def load(self, text: str) -> None:
        self.values.clear()
        for part in text.split():
            step, _, value = part.partition(":")
            self.values.append((int(step), float(value)))


@dataclass
class Smoothed:
    """A moving average of the loss, whose weights fall by SMOOTHING a step; NaN before the first one."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def smooth(self) -> float:
        return self.total / self.weight if self.weight else math.nan

    def see(self, loss: float) -> None:
        """Take the loss of the next step into the average."""
        self.total = SMOOTHING * self.total + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)


@dataclass
class Trend(Smoothed):
    """The smoothed loss against its lowest value so far.

    sound: number of steps done when it was last near that. above: steps it has been MARGIN above it, without a break.
    """

    lowest: float = math.inf
    sound: int = 0
    above: int = 0

    def add(self, step: int, loss: float) -> None:
        self.see(loss)
        self.lowest = min(self.lowest, self.smooth)
        if self.smooth <= self.lowest + MARGIN / 4:
            self.sound = step + 1
        self.above = self.above + 1 if self.smooth > self.lowest + MARGIN else 0

    @property
    def rising(self) -> bool:
        return bool(self.weight) and self.smooth > self.lowest + MARGIN / 4


class HostCopy:
    """An asynchronous copy of a small device tensor to the host. `read` waits for this copy, not for later work."""

    def __init__(self, tensor: Tensor):
        if tensor.device.type == "cuda":
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host, self.event = tensor, None

    def read(self) -> list:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


@dataclass
class WatchedStep:
    """A step whose numbers the host has not read yet. stats: of `train_step`. report(step, loss, norm, tokens,
    skipped) is called where the run goes on."""

    step: int
    stats: HostCopy
    limits: Limits
    weights: HostCopy | None
    report: Callable[[int, float, float, float, bool], None]


# ---- the weights of the ranks

def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the floating-point parameters and buffers that every rank has a copy of, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named if tensor.is_floating_point()}


@torch.no_grad()
def weights_of_ranks(tensors: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Return (world_size, 2, tensors) int64, on the device: the sum of the bits of each tensor on each rank, and the
    bits of its largest magnitude in float32. Collective; nothing waits for it."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=ranks.device)
    if ranks.communicates:
        sums = torch.stack([x.detach().view(integer[x.element_size()]).sum(dtype=torch.int64) for x in tensors])
    largest = torch.stack([torch.linalg.vector_norm(x.detach(), math.inf).float() for x in tensors])
    mine = torch.stack([sums, largest.view(torch.int32).long()])
    if not ranks.communicates:
        return mine[None]
    every = mine.new_empty((ranks.world_size, *mine.shape))
    dist.all_gather_into_tensor(every.view(-1), mine.view(-1))
    return every


def what_is_wrong(names: Sequence[str], found: list[list[list[int]]]) -> str:
    """Return in words what is wrong with the weights that `weights_of_ranks` tells of; "" where nothing is."""
    infinite = 0x7f800000  # the exponent's bits of float32, all set in an infinity and a NaN
    for i, name in enumerate(names):
        bad = [rank for rank, (_, largest) in enumerate(found) if largest[i] & infinite == infinite]
        if bad:
            return f"{name} is not finite" + (f" on {_ranks(bad)}" if len(found) > 1 else "")
    for i, name in enumerate(names):
        sums = Counter(of_rank[0][i] for of_rank in found)
        if len(sums) > 1:
            usual, count = sums.most_common(1)[0]
            others = [rank for rank, of_rank in enumerate(found) if of_rank[0][i] != usual]
            rest = [rank for rank in range(len(found)) if rank not in others]
            if count > len(found) // 2:
                return f"{name} of {_ranks(others)} is not that of {_ranks(rest)}"
            return f"{name} is not the same on {_ranks(sorted(others + rest))}"
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# ---- the guard of a run

class Guard:
    """Judges the steps of a run; the top of this file says how. All ranks hold the same numbers and call it alike."""

    def __init__(self, model: torch.nn.Module, optimizer: MuonAdamW, ranks: Ranks, log: RunLog, *, mode: str = "off",
                 check_every: int = -1, judges_loss: bool = True, folder: Path | None = None,
                 meta: Callable[[], dict[str, Any]] | None = None, start: int = 0,
                 wait_for_save: Callable[[], object] = lambda: None):
        """Begin without a history.

        Args:
            mode: "skip" skips bad updates and stops after a few; "stop" stops at the first; "off" stops at the first
                that is not finite and judges nothing else.
            check_every: steps from one comparison of the weights to the next; 0 or less compares them before
                checkpoints and evaluations alone.
            judges_loss: False for a loss that may have any size and sign, as that of reinforcement learning.
            folder: of the run's checkpoints, where dumps go; None for no dumps.
            meta: returns the meta fields of a checkpoint.
            start: step of the checkpoint that the run resumes from, 0 for none.
            wait_for_save: returns when the checkpoint that rank 0 is writing is on disk.
        """
        if mode not in MODES:
            raise UserError(f"--guard is one of {', '.join(MODES)}, not {mode!r}")
        self.model, self.optimizer, self.ranks, self.log, self.mode = model, optimizer, ranks, log, mode
        self.check_every, self.judges_loss, self.folder, self.meta = check_every, judges_loss, folder, meta
        self.norms, self.losses, self.trend = Band(NORM_AT_LEAST), Band(LOSS_AT_LEAST), Trend(sound=start)
        self.wait_for_save = wait_for_save
        self.skipped: list[int] = []      # those among the last steps
        self.saved = [start] if start else []
        self._stop, self._last = False, (math.nan, math.nan)
        self._pending: list[WatchedStep] = []
        self._batches: dict[int, list] = {}
        self._weights: HostCopy | None = None

    # -- the history in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for the meta of a checkpoint. Every step must be settled."""
        return {"norms": self.norms.state(), "losses": self.losses.state(), "skipped": self.skipped,
                "trend": {name: value for name, value in asdict(self.trend).items() if value != math.inf}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the history of `state_dict`. Raises UserError where it is none."""
        try:
            self.norms.load(state["norms"])
            self.losses.load(state["losses"])
            self.skipped = [int(step) for step in state["skipped"]]
            self.trend = Trend(**state["trend"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the checkpoint's history of losses and gradient norms cannot be read ({error!r}): "
                            "--guard=off trains without.") from error

    # -- around a step

    def limits(self, step: int) -> Limits:
        """Return what step `step` may come to."""
        if self.mode == "off":
            return Limits(hold=True)
        log_norm = self.norms.limit(step)
        return Limits(loss=self.losses.limit(step) if self.judges_loss else math.inf,
                      norm=math.exp(log_norm) if log_norm < 80 else math.inf,  # more than float32 holds
                      hold=self._ends(step - 1))

    def _ends(self, step: int) -> bool:
        """Return whether the run ends if step `step` is skipped."""
        before = [at for at in self.skipped if step - WINDOW < at < step]
        in_a_row = all(step - back in before for back in range(1, IN_A_ROW))
        return self.mode != "skip" or in_a_row or len(before) + 1 >= OF_WINDOW

    def recorded(self, step: int, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the micro-batches of step `step`, and keep them until it is judged."""
        self._batches = {at: kept for at, kept in self._batches.items() if at >= step - 2}
        kept = self._batches[step] = []
        for batch in batches:
            kept.append(batch)
            yield batch

    def check_due(self, step: int) -> Callable[[], None]:
        """Return what `train_step` calls before the update: where it is due, it compares the weights of the ranks."""
        def check() -> None:
            if self.check_every > 0 and (step + 1) % self.check_every == 0:
                self._weights = HostCopy(self._compared())
        return check

    def _compared(self) -> Tensor:
        self.optimizer.wait()
        return weights_of_ranks(list(tensors_of(self.model).values()), self.ranks)

    def watch(self, step: int, stats: Tensor, report: Callable[[int, float, float, float, bool], None]
              = lambda *numbers: None) -> None:
        """Take note of the stats that `train_step` returned for step `step`; `settle` judges them."""
        self._pending.append(WatchedStep(step, HostCopy(stats), self.limits(step), self._weights, report))
        self._weights = None

    def settle(self, leave: int = 0) -> bool:
        """Read and judge the steps that were not yet, but for the last `leave`. Return whether any rank was asked to
        stop so far.

        Raises:
            UserError: the run stops. Collective then, as it writes a dump.
        """
        while len(self._pending) > leave:
            self._judge(self._pending.pop(0))
        return self._stop

    def _judge(self, watched: WatchedStep) -> None:
        step = watched.step
        loss, norm, tokens, stop, updated = watched.stats.read()
        self._stop = self._stop or stop > 0
        if watched.weights is not None and (wrong := what_is_wrong([*tensors_of(self.model)], watched.weights.read())):
            self._stop_for_weights(step, wrong)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not updated:
            self._judge_skipped(step, loss, norm, finite, watched.limits)
        if finite:
            self.losses.add(step, loss)
            if norm > 0:
                self.norms.add(step, math.log(norm))
        self._last = loss, norm
        watched.report(step, loss, norm, tokens, not updated)
        if updated and self.judges_loss and self.mode != "off":
            self.trend.add(step, loss)
            if self.trend.above >= PATIENCE:
                self._stop_for_trend(step, loss, norm)

    def _judge_skipped(self, step: int, loss: float, norm: float, finite: bool, limits: Limits) -> None:
        ends = self._ends(step)
        self.skipped = [at for at in self.skipped if at > step - WINDOW] + [step]
        if finite and norm > limits.norm:
            why = f"the gradient norm {norm:.4g} is above {limits.norm:.4g}, the limit by the last {WINDOW} steps"
        elif finite:
            why = f"the loss {loss:.4f} is above {limits.loss:.4f}, the limit by the last {WINDOW} steps"
        else:
            why = f"the loss is {loss}, the gradient norm {norm}"
            if wrong := what_is_wrong([*tensors_of(self.model)], HostCopy(self._compared()).read()):
                self.log.record("diverged", step=step, loss=loss, norm=norm, why=wrong)
                self._stop_for_weights(step, wrong, f"{why}, and ")
        self.log.record("skipped", step=step, loss=loss, norm=norm, loss_limit=limits.loss, norm_limit=limits.norm)
        if not ends:
            self.log.say(f"step {step:05d} | update skipped: {why}; {len(self.skipped)} of the last {WINDOW} skipped")
            return
        self.log.record("diverged", step=step, loss=loss, norm=norm)
        many = ""
        if self.mode == "skip":
            many = f"{len(self.skipped)} of the last {min(WINDOW, step + 1)} updates were skipped, and "
        again = self._dump(step, loss, norm, f"{step} steps: its update and later ones were skipped")
        raise UserError(f"step {step}: {why}: {many}training has diverged and stops. "
                        f"{self._way_out(self.saved)}{again}")

    # -- what ends a run

    def _way_out(self, saved: Sequence[int]) -> str:
        """Return in words what the next run of the same command does, and what to change."""
        begins = "There is no checkpoint from before: the same command begins anew"
        if saved:
            begins = f"The last good checkpoint, of step {max(saved)}, is untouched: the same command resumes from it"
        return (f"{begins} and meets the same steps, so change something: lower learning rates (--matrix-lr, "
                "--embedding-lr, --unembedding-lr), or other data.")

    def _stop_for_weights(self, step: int, wrong: str, what: str = "") -> None:
        self.log.record("weights", step=step, wrong=wrong)
        what = what or "weights are broken: "
        raise UserError(f"step {step}: {what}{wrong}. Nothing is saved, and training stops. "
                        f"{self._way_out(self.saved)} If it happens at another step the next time, suspect the "
                        "hardware.")

    def _stop_for_trend(self, step: int, loss: float, norm: float) -> None:
        trend = self.trend
        self.log.record("diverged", step=step, loss=loss, norm=norm, smooth_loss=trend.smooth, lowest=trend.lowest)
        good = [at for at in self.saved if at <= trend.sound]
        late = [at for at in self.saved if at > trend.sound]
        told = self._set_aside(late) if late else ""
        again = self._dump(step, loss, norm, f"{step + 1} steps or more, after its update")
        raise UserError(f"step {step}: the loss has risen and stays: smoothed, it is {trend.smooth:.3f}, and was "
                        f"{trend.lowest:.3f} at the lowest, about step {trend.sound}: training has diverged and stops. "
                        f"{told}{self._way_out(good)}{again}")

    def _set_aside(self, late: list[int]) -> str:
        """Move checkpoints from after the loss began to rise to the folder of dumps. Return what was done, in words."""
        if self.folder is None:
            return ""

        def move() -> None:
            self.wait_for_save()
            aside = self.folder / DUMPS
            aside.mkdir(parents=True, exist_ok=True)
            move_checkpoints(self.folder, late, aside)

        on_main("setting checkpoints aside", move, self.ranks)
        return f"Checkpoints of a risen loss (step {', '.join(map(str, late))}) were set aside in {DUMPS}/. "

    def _dump(self, step: int, loss: float, norm: float, weights: str) -> str:
        """Write what is needed to do a step again. Return how, in words. Collective."""
        if self.folder is None or step not in self._batches:
            return ""
        try:
            mine = [tuple(part.cpu() for part in batch) for batch in self._batches[step]]
            batches = gather_objects(mine, self.ranks)
            self.optimizer.wait()
            about = {"step": step, "loss": loss, "norm": norm, "weights": weights}
            folder = self.folder / DUMPS / f"step_{step:06d}"
            on_main("writing the dump", lambda: write_dump(folder, self.model, self.meta() if self.meta else {}, about,
                                                           batches), self.ranks)
        except (UserError, OSError) as error:
            return f" A dump of the step could not be written: {error}"
        return f" To do step {step} again and see where it goes wrong: python -m nanochat.guard {folder}"

    # -- between steps

    def check_weights(self, step: int) -> None:
        """Raise UserError where weights are not finite, or not the same on all ranks, after `step` steps. Collective.
        It waits for the device."""
        if wrong := what_is_wrong([*tensors_of(self.model)], HostCopy(self._compared()).read()):
            self._stop_for_weights(step, wrong)

    def may_save(self, step: int) -> bool:
        """Return whether a checkpoint of `step` finished steps may be written; say it where not. `check_weights` and
        `settle` come before."""
        if self.trend.above >= SUSPECT:
            self.log.say(f"step {step:05d} | not saved: the smoothed loss {self.trend.smooth:.3f} is more than "
                         f"{MARGIN:g} above its lowest, {self.trend.lowest:.3f}; training stops if it stays there")
            return False
        self.saved.append(step)
        return True

    def spared(self) -> set[int]:
        """Return the steps of checkpoints not to be deleted, though there are newer ones: while the loss rises, the
        newest from before it did."""
        good = [step for step in self.saved if step <= self.trend.sound]
        return {max(good)} if good and self.trend.rising else set()

    def check_end(self, step: int) -> None:
        """Raise UserError where the run ends with a loss that has risen. Collective."""
        if self.trend.above >= SUSPECT:
            self._stop_for_trend(step - 1, *self._last)


# ---- results

def finite(value: float, what: str, step: int) -> float:
    """Return a result of an evaluation. Raises UserError where it is not finite: the run has not succeeded."""
    if not math.isfinite(value):
        raise UserError(f"step {step}: the {what} is {value}, though the losses were finite: the model is broken, and "
                        "training stops. The last checkpoint is untouched: the same command resumes from it; use lower "
                        "learning rates if it happens again.")
    return value


# ---- dumps

def write_dump(folder: Path, model: torch.nn.Module, meta: dict[str, Any], about: dict[str, Any],
               batches: list[list[tuple[Tensor, ...]]]) -> None:
    """Write a dump: a checkpoint without optimizer state, and batch.pt with the micro-batches of each rank.

    about: step, loss, norm, and of how many steps the weights are, in words.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_checkpoint(folder, about["step"], state, {"model_config": model.config.to_dict(), **meta, "dump": about})
    with atomic_write(folder / "batch.pt") as file:
        torch.save(batches, file)


def redo(folder: Path, device: torch.device, say: Callable[[str], None] = print) -> dict[str, float]:
    """Do the step of a dump again, and print its loss, its gradient's norm for each parameter, and the first modules
    whose output or gradient is not finite. The kernels are the default ones, and nothing is compiled.

    Returns:
        loss and norm.
    """
    from nanochat.kernels.fp8 import EMULATED, REAL
    from nanochat.loading import model_from_state

    found = load_checkpoint(folder)
    about, config = found.meta.get("dump") or {}, found.meta.get("user_config") or {}
    path = folder / "batch.pt"
    if not about or not path.exists():
        raise UserError(f"{folder} is not a dump: those are in the folder {DUMPS} of a run that stopped.")
    batches = torch.load(path, map_location="cpu", weights_only=True)
    model = model_from_state(found.meta["model_config"], found.model_state, what=str(folder)).to(device).train()
    model.compute_dtype = getattr(torch, found.meta.get("compute_dtype", "float32"))
    if config.get("fp8") or config.get("fp8_emulated"):
        model.train_in_fp8(REAL if config.get("fp8") and device.type == "cuda" else EMULATED)
    counted = max(1, sum(int((batch[1] != -1).sum()) for of_rank in batches for batch in of_rank))
    say(f"step {about['step']}: weights of {about['weights']}; {sum(map(len, batches))} micro-batches of "
        f"{len(batches)} ranks, {counted:,} supervised tokens, {str(model.compute_dtype).removeprefix('torch.')}")
    total, first = 0.0, {}
    with _watching(model, first):
        for rank, of_rank in enumerate(batches):
            for number, batch in enumerate(of_rank):
                inputs, targets, *factors = (part.to(device) for part in batch)
                loss = model(inputs, targets, "sum", factors=factors[0]) if factors else model(inputs, targets, "sum")
                loss.backward()
                total += loss.item()
                if not math.isfinite(loss.item()):
                    first.setdefault("loss", f"micro-batch {number} of rank {rank}")
                first["micro-batch"] = f"micro-batch {number} of rank {rank}"
    norms = {name: 0.0 if p.grad is None else float(torch.linalg.vector_norm(p.grad.float() / counted))
             for name, p in model.named_parameters()}
    width = max(map(len, norms))
    for name, norm in norms.items():
        say(f"  {name:<{width}}  norm of the gradient {norm:.4g}")
    loss, norm = total / counted, math.sqrt(math.fsum(norm * norm for norm in norms.values()))
    say(f"loss {loss:.6g}, gradient norm {norm:.6g}; in the run: loss {about['loss']}, gradient norm {about['norm']}")
    for what in ("output", "gradient", "loss"):
        if what in first:
            say(f"first {what} that is not finite: {first[what]}")
    if math.isfinite(loss) and math.isfinite(norm):
        if not (math.isfinite(float(about["loss"])) and math.isfinite(float(about["norm"]))):
            say("done again, the step is finite: suspect the hardware, a kernel, or the compiler")
    return {"loss": loss, "norm": norm}


@contextlib.contextmanager
def _watching(model: torch.nn.Module, first: dict[str, str]) -> Iterator[None]:
    """Within the block, note in `first` the module whose output, and whose output's gradient, is the first that is not
    finite. A block's parts come before the block."""
    def note(what: str, name: str, tensor: Tensor) -> None:
        if what not in first and not tensor.isfinite().all():
            first[what] = f"{name or 'the model'}, {first.get('micro-batch', 'micro-batch 0 of rank 0')}"

    def hook(name: str) -> Callable:
        def after(module: torch.nn.Module, given: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else (output,)
            for tensor in parts:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    note("output", name, tensor.detach())
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: note("gradient", name, gradient))
        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main(argv: Sequence[str] | None = None) -> None:
    """Do the step of a dump again. Raises UserError where there is none."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.guard", description=redo.__doc__)
    parser.add_argument("dump", type=Path, help="folder of a dump, such as base_checkpoints/d20/diverged/step_001234")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; unset takes the best there is")
    given = parser.parse_args(argv)
    from nanochat.distributed import joined_ranks
    with joined_ranks(given.device_type) as ranks:
        redo(given.dump, ranks.device)


if __name__ == "__main__":
    from nanochat.cli import run_main
    run_main(main)
