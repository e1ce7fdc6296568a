"""One training step and the loop around it, shared by all stages that minimise cross-entropy.

The step is: some micro-batches forward and backward, every supervised token weighing the same whichever micro-batch or rank it stands in;
gradients averaged over the ranks, clipped by the norm of that average, applied. Nothing in it waits for the device: what a step has to
tell (loss, norm, whether a rank was asked to stop) is read one step later.
"""

import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.distributed import Ranks, all_reduce_sum
from nanochat.errors import UserError
from nanochat.logs import RunLog
from nanochat.optim import MuonAdamW

SMOOTHING = 0.9  # of the loss on the console, a step
QUIET = 2.0      # seconds between console lines, after the first ten steps; the log on disk has every step


@dataclass(frozen=True)
class Plan:
    """How long a run is and how its rates move.

    micro_batches: of this rank in a step; rank r may have one more than rank r+1, so that any number of ranks can share a batch.
    tokens_per_step: of all ranks, or None where each step has its own number of supervised tokens. clip: the largest gradient norm, None
    for no limit. The ratios are fractions of num_iterations.
    """

    num_iterations: int
    micro_batches: int
    tokens_per_step: int | None
    clip: float | None = 1.0
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0
    momentum_steps: int = 300

    def lr_scale(self, step: int) -> float:
        """Return what the rates are multiplied with at `step` (from 0): up over the warm-up, 1, down to final_lr_frac at the end."""
        warmup, warmdown = round(self.warmup_ratio * self.num_iterations), round(self.warmdown_ratio * self.num_iterations)
        if step < warmup:
            return (step + 1) / warmup
        if step <= self.num_iterations - warmdown:
            return 1.0
        left = (self.num_iterations - step) / warmdown
        return left + (1 - left) * self.final_lr_frac

    def momentum(self, step: int) -> float:
        """Return Muon's momentum at `step`: from 0.85 to 0.95 over the first momentum_steps."""
        part = min(step / self.momentum_steps, 1.0)
        return 0.85 + 0.1 * part


def share_of_micro_batches(total_batch_size: int, device_batch_size: int, T: int, ranks: Ranks) -> int:
    """Return how many micro-batches of device_batch_size rows of T tokens this rank does in a step of total_batch_size tokens.

    Raises UserError where the batch does not divide into micro-batches or there are fewer of them than ranks.
    """
    micro = device_batch_size * T
    if device_batch_size < 1 or total_batch_size < 1:
        raise UserError(f"device_batch_size ({device_batch_size}) and total_batch_size ({total_batch_size}) must be at least 1")
    if total_batch_size % micro:
        near = max(1, round(total_batch_size / micro)) * micro
        raise UserError(f"total_batch_size {total_batch_size:,} is no multiple of a micro-batch, device_batch_size {device_batch_size} × "
                        f"{T} tokens = {micro:,}. Try --total-batch-size={near}, or a --device-batch-size that divides "
                        f"{total_batch_size // T}.")
    count = total_batch_size // micro
    if count < ranks.world_size:
        raise UserError(f"total_batch_size {total_batch_size:,} makes {count} micro-batches of {micro:,} tokens, fewer than the "
                        f"{ranks.world_size} ranks. Try --device-batch-size={max(1, total_batch_size // T // ranks.world_size)}.")
    return count // ranks.world_size + (ranks.rank < count % ranks.world_size)


def train_step(model: torch.nn.Module, optimizer: MuonAdamW, batches: Iterable[Any], ranks: Ranks, *, lr_scale: float = 1.0,
               momentum: float = 0.95, clip: float | None = None, stop: bool = False) -> Tensor:
    """Do one optimizer step over this rank's micro-batches; collective over ranks.

    batches: of inputs and targets (B, T), −1 where a target does not count; and, where tokens weigh differently, of factors (B, T) that
    each token's loss is multiplied with. Where no target counts on any rank, the gradient is zero. Returns, on the device and without
    waiting for it, [mean loss in nats a supervised token over all ranks, gradient norm before clipping, supervised tokens, ranks asked to
    stop].
    """
    optimizer.zero_grad()
    stats = torch.zeros(3, device=ranks.device)
    stats[2] = float(stop)
    for inputs, targets, *factors in batches:
        loss = model(inputs, targets, "sum", factors=factors[0]) if factors else model(inputs, targets, "sum")
        loss.backward()
        stats[0] += loss.detach()
        stats[1] += (targets != -1).sum()
    stats = all_reduce_sum(stats, ranks)
    counted = stats[1].clamp_min(1)
    norm = optimizer.step(lr_scale=lr_scale, momentum=momentum, grad_scale=1 / counted, clip=clip)
    return torch.stack([stats[0] / counted, norm.to(stats.dtype), stats[1], stats[2]])


class _Later:
    """A small device tensor on its way to the host: `read` waits for what made it, not for what was started since."""

    def __init__(self, tensor: Tensor):
        if tensor.device.type == "cuda":
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host, self.event = tensor, None

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


@contextmanager
def few_to_collect() -> Iterator[None]:
    """Within the block, Python's garbage collector looks at what is made from now on alone.

    A full collection walks over all objects there are, half a million after compiling: 0.26 s, now and then, while the device waits. A
    step makes no garbage that only a collection finds.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within the block, SIGTERM and SIGINT (Ctrl-C) do not end the process: they append their number to the list that is given."""
    asked: list[int] = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, lambda number, frame: asked.append(number))
        except ValueError:  # not the main thread: whoever runs us there handles signals
            break
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model: torch.nn.Module, optimizer: MuonAdamW, batches: Callable[[int], Iterable[Any]], plan: Plan, ranks: Ranks, log: RunLog, *,
          flops_per_token: float, peak: float | None, start: int = 0, before_step: Callable[[int, bool], None] = lambda step, last: None,
          save: Callable[[int], None] = lambda step: None) -> None:
    """Train from step `start` to plan.num_iterations. batches(step): this rank's micro-batches of a step, see `train_step`.

    before_step(step, last) is called before each step and once more at the end with last=True: evaluation, samples, checkpoints; its time
    does not count into tokens/s. save(step) is called when the process is asked to stop (SIGTERM, Ctrl-C), which then ends with exit
    code 128 + the signal. peak: FLOP/s of one device, for the MFU. Raises UserError at a step whose loss or gradient is not finite.
    """
    watch = _Watch(plan, ranks, log, start, flops_per_token, peak)
    pending: tuple[int, _Later] | None = None
    with stop_signals() as asked, ExitStack() as stack:
        for step in range(start, plan.num_iterations + 1):
            if step == start + 2:  # all is compiled and warm
                stack.enter_context(few_to_collect())
            last = step == plan.num_iterations
            if last and pending is not None:
                watch.step_done(*pending)
                pending = None
            paused = time.perf_counter()
            before_step(step, last)
            watch.pause(time.perf_counter() - paused)
            if last:
                return
            stats = train_step(model, optimizer, batches(step), ranks, clip=plan.clip, lr_scale=plan.lr_scale(step),
                               momentum=plan.momentum(step), stop=bool(asked))
            previous, pending = pending, (step, _Later(stats))
            stop = watch.step_done(*previous) if previous is not None else False
            if stop:  # every rank reads the same sum, one step late: all stop here
                watch.step_done(*pending)
                log.say(f"asked to stop: saving step {step + 1}")
                save(step + 1)
                raise SystemExit(128 + (asked[0] if asked else signal.SIGTERM))


class _Watch:
    """Turns what steps tell into console lines, log records and the check that all is finite."""

    def __init__(self, plan: Plan, ranks: Ranks, log: RunLog, start: int, flops_per_token: float, peak: float | None):
        self.plan, self.log, self.start, self.flops_per_token = plan, log, start, flops_per_token
        self.peak = None if peak is None else peak * ranks.world_size
        self.smooth, self.weight, self.seconds, self.timed = 0.0, 0.0, 0.0, 0
        self.last = time.perf_counter()
        self.said = 0.0
        self.tokens = 0

    def pause(self, seconds: float) -> None:
        """Time that was not training."""
        self.last += seconds

    def step_done(self, step: int, later: _Later) -> bool:
        """Take in what step `step` has to tell; returns whether a rank was asked to stop."""
        loss, norm, tokens, stop = later.read()
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        plan = self.plan
        need_finite(step, loss, norm, self.log)
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        if step > self.start or plan.num_iterations - self.start == 1:  # the first step compiles and warms up
            decay = min(0.95, self.timed / (self.timed + 1))
            self.seconds = decay * self.seconds + (1 - decay) * seconds
            self.timed += 1
        speed = (plan.tokens_per_step or tokens) / (self.seconds or seconds)
        self.tokens = (step + 1) * plan.tokens_per_step if plan.tokens_per_step else self.tokens + int(tokens)
        left = (plan.num_iterations - step - 1) * (self.seconds or seconds)
        mfu = None if self.peak is None else speed * self.flops_per_token / self.peak
        lr = plan.lr_scale(step)
        text = (f"loss {self.smooth / self.weight:.4f} | lr x{lr:.2f} | norm {norm:.2f} | {speed:,.0f} tok/s"
                + (f" | mfu {100 * mfu:.1f}%" if mfu is not None else "") + f" | {clock(left)} left")
        if step < self.start + 10 or now - self.said >= QUIET or step == plan.num_iterations - 1:
            self.said = now
            self.log.say(f"step {step + 1:05d}/{plan.num_iterations:05d} ({100 * (step + 1) / plan.num_iterations:.1f}%) | {text}")
        self.log.progress(step + 1, plan.num_iterations, text)
        self.log.record("train", step=step + 1, loss=loss, smooth_loss=self.smooth / self.weight, norm=norm, lr_scale=lr, seconds=seconds,
                        tokens_per_second=speed, mfu=mfu, tokens=self.tokens, supervised=int(tokens))
        return stop > 0


def need_finite(step: int, loss: float, norm: float, log: RunLog) -> None:
    """Record and raise UserError where a step's loss or gradient norm is not finite."""
    if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
        log.record("diverged", step=step, loss=loss, norm=norm)
        raise UserError(f"step {step}: the loss is {loss}, the gradient norm {norm}: training has diverged and stops. The last good "
                        "checkpoint is untouched; run the same command to go on from it, with lower rates if it happens again.")


def clock(seconds: float) -> str:
    """Return a duration as people read it: 42s, 3m05s, 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
