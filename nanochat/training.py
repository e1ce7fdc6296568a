"""One training step and the loop around it, shared by all stages.

    def batches(step): ...                                      # this rank's micro-batches of an optimizer step
    train(model, optimizer, batches, TrainingPlan(1000, 4, 524288), ranks, log, flops_per_token=f, peak=None)

A step runs its micro-batches forward and backward (gradient accumulation), averages the gradients over all supervised
tokens of all ranks, clips them by their norm and updates the weights, unless the step is bad (nanochat/guard.py). Every
supervised token weighs the same, whichever micro-batch or rank it is in. No step waits for the device: its loss and
gradient norm, and whether a rank was asked to stop, are read one step later. With several ranks, gradients are summed
while backward still runs, and weights arrive while the next forward pass already does.
"""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.distributed import Ranks, all_reduce_sum
from nanochat.errors import UserError
from nanochat.guard import NO_LIMITS, Guard, Limits, Smoothed
from nanochat.launcher import stop_signals
from nanochat.logs import RunLog
from nanochat.optim import LARGEST, MuonAdamW
from nanochat.recipe import MomentumSchedule, RateSchedule, Rows, published

CONSOLE_SECONDS = 2.0  # at least, between console lines after the first ten steps; the log on disk has every step


@dataclass(frozen=True)
class TrainingPlan:
    """The length of a run and the schedules of its learning rates, momentum and Muon's weight decay.

    num_iterations: optimizer steps of the whole run, those done before a resume included.
    micro_batches: gradient accumulation steps of this rank. Rank r may have one more than rank r+1, so that any number
        of ranks can share a batch.
    tokens_per_step: of all ranks; None where each step has its own number of supervised tokens.
    clip: the largest gradient norm; None for no limit.
    rates, muon_momentum: schedules of the learning rates and of Muon's momentum.
    """

    num_iterations: int
    micro_batches: int
    tokens_per_step: int | None
    clip: float | None = published.grad_clip
    rates: RateSchedule = published.base.rates
    muon_momentum: MomentumSchedule = published.base.momentum

    def lr_scale(self, step: int) -> float:
        """Return the factor of all learning rates at `step`, which counts from 0."""
        return self.rates.factor(step, self.num_iterations)

    def momentum(self, step: int) -> float:
        """Return Muon's momentum at `step`."""
        return self.muon_momentum.at(step, self.rates.fallen(step, self.num_iterations))

    def decay_scale(self, step: int) -> float:
        """Return the factor of Muon's weight decay at `step`: half a cosine, from 1 to 0 over the run."""
        return (1 + math.cos(math.pi * step / self.num_iterations)) / 2


def share_of_micro_batches(total_batch_size: int, device_batch_size: Rows, T: int, ranks: Ranks) -> int:
    """Return how many micro-batches this rank runs in an optimizer step.

    Args:
        total_batch_size: tokens of all ranks in a step.
        device_batch_size: rows of a micro-batch; "auto", where it is not chosen yet, is one row.
        T: tokens of a row.
        ranks: this process among all.

    Raises:
        UserError: the batch does not divide into micro-batches, or there are fewer of them than ranks.
    """
    device_batch_size = 1 if device_batch_size == "auto" else device_batch_size
    micro = device_batch_size * T
    if device_batch_size < 1 or total_batch_size < 1:
        raise UserError(f"device_batch_size ({device_batch_size}) and total_batch_size ({total_batch_size}) must be at "
                        "least 1")
    if total_batch_size % micro:
        near = max(1, round(total_batch_size / micro)) * micro
        raise UserError(f"total_batch_size {total_batch_size:,} is not a multiple of a micro-batch, device_batch_size "
                        f"{device_batch_size} × {T} tokens = {micro:,}. Try --total-batch-size={near}, or a "
                        f"--device-batch-size that divides {total_batch_size // T}.")
    count = total_batch_size // micro
    if count < ranks.world_size:
        raise UserError(f"total_batch_size {total_batch_size:,} makes {count} micro-batches of {micro:,} tokens, fewer "
                        f"than the {ranks.world_size} ranks. "
                        f"Try --device-batch-size={max(1, total_batch_size // T // ranks.world_size)}.")
    return count // ranks.world_size + (ranks.rank < count % ranks.world_size)


def train_step(model: torch.nn.Module, optimizer: MuonAdamW, batches: Iterable[Any], ranks: Ranks, *,
               lr_scale: float = 1.0, momentum: float = 0.95, decay_scale: float = 1.0, clip: float | None = None,
               stop: bool = False, limits: Limits = NO_LIMITS, before_update: Callable[[], None] = lambda: None
               ) -> Tensor:
    """Do one optimizer step over this rank's micro-batches. Collective: all ranks call it.

    Where no target counts on any rank, the gradient is zero. A step whose loss or gradient norm is not finite or above
    its limit updates nothing; the device decides it from numbers that all ranks have alike, without the host.

    Args:
        batches: (inputs, targets), both (B, T) int64, target −1 where nothing is learnt; or (inputs, targets, factors)
            with factors (B, T) that each token's loss is multiplied with.
        lr_scale: factor of all learning rates. momentum: Muon's. decay_scale: factor of Muon's weight decay.
        clip: the largest gradient norm, None for no limit.
        stop: whether this rank was asked to stop.
        limits: of loss and gradient norm.
        before_update: called when the gradients are computed and the weights are not changed yet.

    Returns:
        (5,) on the device, without waiting for it: mean loss in nats per supervised token over all ranks, gradient norm
        before clipping, number of supervised tokens, number of ranks asked to stop, and 1 where the weights were
        updated, 0 where the step was skipped.
    """
    optimizer.zero_grad()
    stats = torch.zeros(3, device=ranks.device)
    stats[2].fill_(float(stop))  # an assignment waits for the device in torch 2.11
    remaining = iter(batches)
    batch = next(remaining, None)
    while batch is not None:
        inputs, targets, *factors = batch
        loss = model(inputs, targets, "sum", factors=factors[0]) if factors else model(inputs, targets, "sum")
        batch = next(remaining, None)
        with optimizer.reducing() if batch is None else nullcontext():
            loss.backward()
        stats[0] += loss.detach()
        stats[1] += (targets != -1).sum()
    optimizer.finish_reducing()  # a rank without a batch sends its zeros before the sums below, as the others did
    stats = all_reduce_sum(stats, ranks)
    counted = stats[1].clamp_min(1)
    loss = stats[0] / counted
    allowed = loss.abs() <= min(limits.loss, LARGEST)  # not for NaN either
    if limits.hold:
        allowed = allowed & optimizer.applied
    before_update()
    norm = optimizer.step(lr_scale=lr_scale, momentum=momentum, decay_scale=decay_scale, grad_scale=1 / counted,
                          clip=clip, norm_limit=limits.norm, allowed=allowed)
    return torch.stack([loss, norm.to(stats.dtype), stats[1], stats[2], optimizer.applied])


@contextmanager
def freeze_garbage_collector() -> Iterator[None]:
    """Within the block, exclude all objects that exist at its beginning from Python's garbage collection.

    A full collection visits every object, half a million after compiling: 0.26 s from time to time, while the device
    waits. A step makes no garbage that needs a collection.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_steps(one_step: Callable[[int, bool], bool], start: int, num_iterations: int, log: RunLog, *,
              before_step: Callable[[int], None], save: Callable[[int], None],
              flush: Callable[[], object] = lambda: None,
              await_data: Callable[[list[int]], UserError | None] = lambda received: None) -> None:
    """Run optimizer steps start … num_iterations − 1, and save and exit when the process is asked to stop.

    Args:
        one_step: given the step and whether this process was asked to stop, does the step and returns whether any rank
            was asked to. All ranks must return the same.
        before_step: called before each step, and with num_iterations after the last.
        save: writes a checkpoint of that many finished steps.
        flush: reports the steps that are done and not reported yet. Called after the last step, and before a save on
            request.
        await_data: called before each step with the signals that came so far, a list that grows. Waits until there is
            data for this step and two more, and returns the error that ends the run where there will be no more: as
            many steps pass until all ranks have stopped.

    Raises:
        UserError: after saving, what await_data returned on this rank.
        SystemExit: with 128 + the signal's number, after saving, where a rank was asked to stop (Ctrl-C, SIGTERM,
            SIGHUP).
    """
    failure: UserError | None = None
    with stop_signals() as received:
        for step in range(start, num_iterations):
            before_step(step)
            failure = failure or await_data(received)
            if one_step(step, bool(received) or failure is not None):
                flush()
                log.say(f"asked to stop: saving step {step + 1}")
                save(step + 1)
                if failure is not None:
                    raise failure
                raise SystemExit(128 + (received[0] if received else signal.SIGTERM))
        flush()
        before_step(num_iterations)


def train(model: torch.nn.Module, optimizer: MuonAdamW, batches: Callable[[int], Iterable[Any]], plan: TrainingPlan,
          ranks: Ranks, log: RunLog, *, flops_per_token: float, peak: float | None, start: int = 0,
          before_step: Callable[[int], None] = lambda step: None,
          save: Callable[[int], None] = lambda step: None,
          await_data: Callable[[list[int]], UserError | None] = lambda received: None,
          guard: Guard | None = None, tokens: int = 0) -> None:
    """Train with `train_step` from step `start` to plan.num_iterations.

    Args:
        batches: given a step, this rank's micro-batches of it, as `train_step` takes them.
        flops_per_token: of the model's forward and backward pass.
        peak: FLOP/s of one device, for the MFU; None for no MFU.
        before_step, save, await_data: see `run_steps`. The time of before_step does not count in tokens per second.
            Before a save, `guard.settle` must be called.
        guard: judges the steps; None stops at the first loss or gradient norm that is not finite.
        tokens: supervised ones before `start`, for the log of a run whose steps do not have the same number.

    Raises:
        UserError: training has diverged, or there is no more data.
        SystemExit: the process was asked to stop; see `run_steps`.
    """
    reports = _StepReports(plan, ranks, log, start, flops_per_token, peak, tokens)
    judge = guard or Guard(model, optimizer, ranks, log, start=start)

    def one_step(step: int, stop: bool) -> bool:
        stats = train_step(model, optimizer, judge.recorded(step, batches(step)), ranks, clip=plan.clip,
                           lr_scale=plan.lr_scale(step), momentum=plan.momentum(step),
                           decay_scale=plan.decay_scale(step), stop=stop, limits=judge.limits(step),
                           before_update=judge.check_due(step))
        judge.watch(step, stats, reports.add)
        return judge.settle(leave=1)  # the same on all ranks: all stop at this step

    with ExitStack() as stack:
        stack.enter_context(optimizer.gathering_in_forward(model))

        def paused(step: int) -> None:
            if step == start + 2:  # everything is compiled and warm
                stack.enter_context(freeze_garbage_collector())
            began = time.perf_counter()
            before_step(step)
            reports.exclude(time.perf_counter() - began)

        run_steps(one_step, start, plan.num_iterations, log, before_step=paused, save=save, flush=judge.settle,
                  await_data=await_data)


class _StepReports:
    """Turns the numbers of each step into a console line and a log record."""

    def __init__(self, plan: TrainingPlan, ranks: Ranks, log: RunLog, start: int, flops_per_token: float,
                 peak: float | None, tokens: int):
        self.plan, self.log, self.start, self.flops_per_token = plan, log, start, flops_per_token
        self.peak = None if peak is None else peak * ranks.world_size
        self.loss, self.seconds, self.timed = Smoothed(), 0.0, 0
        self.last = time.perf_counter()
        self.last_line = 0.0
        self.tokens = tokens

    def exclude(self, seconds: float) -> None:
        """Do not count this time as training."""
        self.last += seconds

    def add(self, step: int, loss: float, norm: float, tokens: float, skipped: bool) -> None:
        """Report step `step`. One whose loss or norm is not finite has no place in a mean, and gets no record."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        plan = self.plan
        if not plan.tokens_per_step:
            self.tokens += int(tokens)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return
        self.loss.see(loss)
        if step > self.start or plan.num_iterations - self.start == 1:  # the first step compiles and warms up
            decay = min(0.95, self.timed / (self.timed + 1))
            self.seconds = decay * self.seconds + (1 - decay) * seconds
            self.timed += 1
        speed = (plan.tokens_per_step or tokens) / (self.seconds or seconds)
        self.tokens = (step + 1) * plan.tokens_per_step if plan.tokens_per_step else self.tokens
        left = (plan.num_iterations - step - 1) * (self.seconds or seconds)
        mfu = None if self.peak is None else speed * self.flops_per_token / self.peak
        lr = plan.lr_scale(step)
        text = (f"loss {self.loss.smooth:.4f} | lr x{lr:.2f} | norm {norm:.2f} | {speed:,.0f} tok/s"
                + (f" | mfu {100 * mfu:.1f}%" if mfu is not None else "") + f" | {clock(left)} left")
        done = f"step {step + 1:05d}/{plan.num_iterations:05d} ({100 * (step + 1) / plan.num_iterations:.1f}%)"
        if step < self.start + 10 or now - self.last_line >= CONSOLE_SECONDS or step == plan.num_iterations - 1:
            self.last_line = now
            self.log.say(f"{done} | {text}")
        self.log.progress(step + 1, plan.num_iterations, text)
        self.log.record("train", step=step + 1, loss=loss, smooth_loss=self.loss.smooth, norm=norm,
                        lr_scale=lr, seconds=seconds, tokens_per_second=speed, mfu=mfu, tokens=self.tokens,
                        supervised=int(tokens), **({"skipped": True} if skipped else {}))


def clock(seconds: float) -> str:
    """Return a duration in words: 42s, 3m05s, 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
