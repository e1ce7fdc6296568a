"""The checks of dev/gpu_check.py that can fail: whether this device computes the right numbers. Each works on a CPU
too.

A section is a function of (Run, Report). It puts numbers into the report and states with `expect` what they must be.
"""

import glob
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.measure import random_model, relative_error, table, text_batches
from bench.twin import TwinGPT
from nanochat.distributed import Ranks, compute_dtype
from nanochat.engine import Engine
from nanochat.evaluation.loss import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import cross_entropy
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.training import train_step


@dataclass
class Run:
    """What all sections share."""

    device: torch.device
    tiny: bool                 # use shapes that a CPU computes in a second
    compiled: bool             # whether sections may compile
    golden: Path | None        # folder of golden values
    deadline: float            # in time.monotonic(), of this process
    save: Callable[[], None] = lambda: None  # writes down what a part has found so far

    @property
    def ranks(self) -> Ranks:
        return Ranks(0, 0, 1, self.device)

    def left(self) -> float:
        """Return the seconds until the time is up."""
        return self.deadline - time.monotonic()


class Skipped(Exception):
    """This section makes no sense here; the message says why."""


@dataclass
class Report:
    """What one section found: numbers by name, checks with their limits, goals of speed, tables in markdown."""

    numbers: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def expect(self, name: str, value: float | int | bool | None, *, at_most: float | None = None,
               at_least: float | None = None) -> None:
        """Compare a value with its limits; a bool must be True, NaN fails. A failure does not end the section."""
        if isinstance(value, bool) or value is None:
            ok = bool(value)
        else:
            ok = (at_most is None or value <= at_most) and (at_least is None or value >= at_least) and value == value
        limit = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}" if at_least is not None else "true"
        self.checks.append({"name": name, "value": value, "limit": limit, "ok": ok})

    def goal(self, name: str, value: float | None, *, at_least: float | None = None,
             at_most: float | None = None) -> None:
        """Record what was wished for and what was measured (None: nothing). A missed goal does not fail the check."""
        within = value is not None and (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        held = None if value is None else within
        sign, wish = ("≤", at_most) if at_least is None else ("≥", at_least)
        self.goals.append({"goal": name, "sign": sign, "wish": wish, "measured": value, "held": held})

    def table(self, headers: list[str], rows: list[list[object]], left: tuple[int, ...] = (0,)) -> None:
        self.tables.append(table(headers, rows, left))


def largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if any is NaN (Python's max may skip one)."""
    values = list(values)
    return max(values) if all(value == value for value in values) else float("nan")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name, and remove them from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest `off` of any parameter; infinite where only one side has a gradient."""
    if ours.keys() != theirs.keys():
        return float("inf")
    return largest(relative_error(ours[name], theirs[name]) for name in theirs)


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


# --- golden values ----------------------------------------------------------------------------------------------------

def golden(run: Run, out: Report) -> None:
    """The published model's numbers: float32 to 1e-4 (gradient norms to 1e-3 of each); bfloat16 within its rounding."""
    folders = sorted(path.parent for path in run.golden.glob("*/expected.npz")) if run.golden else []
    if not folders:
        raise Skipped("no golden values found; name their folder with --golden")
    for folder in folders:
        _golden_folder(run, out, folder)


def _golden_folder(run: Run, out: Report, folder: Path) -> None:
    import numpy as np
    name, expected = folder.name, np.load(folder / "expected.npz")
    more = json.loads((folder / "expected.json").read_text())
    model = GPT(GPTConfig(**json.loads(Path(glob.glob(f"{folder}/meta_*.json")[0]).read_text())["model_config"]))
    weights = torch.load(glob.glob(f"{folder}/model_*.pt")[0], weights_only=True)
    model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in weights.items()}, strict=True)
    model.to(run.device).eval()
    ids, targets, logits = (torch.from_numpy(expected[key]).to(run.device) for key in ("ids", "targets", "logits"))
    out.expect(f"{name}: parameters", sum(p.numel() for p in model.parameters()) == more["parameters"])
    for dtype, limits in ((torch.float32, (1e-4, 1e-4, 1e-3)), (torch.bfloat16, (None, 0.02, 0.15))):
        model.compute_dtype = dtype
        short = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            got = model(ids)
        loss = model(ids, targets)
        loss.backward()
        norms = {key: float(grad.double().norm()) for key, grad in gradients(model).items()}
        if limits[0] is not None:
            out.expect(f"{name} {short}: logits, largest difference", float((got - logits).abs().max()),
                       at_most=limits[0])
        else:
            out.expect(f"{name} {short}: logits, relative error", relative_error(got, logits), at_most=0.06)
        out.expect(f"{name} {short}: loss, difference", abs(loss.item() - float(expected["loss"])), at_most=limits[1])
        out.expect(f"{name} {short}: gradient norms, largest relative difference",
                   largest(abs(norms.get(key, 0.0) - norm) / max(norm, 1e-3)
                           for key, norm in more["grad_norms"].items()),
                   at_most=limits[2])
    model.compute_dtype = torch.float32
    token_bytes = torch.load(folder / "token_bytes.pt", weights_only=True).to(run.device)
    out.expect(f"{name}: bits per byte, difference",
               abs(evaluate_bpb(model, [(ids, targets)], token_bytes) - float(expected["bpb"])),
               at_most=1e-4)
    same = 0
    for row in expected["greedy"].tolist():
        made = list(model.generate(torch.tensor([row[:16]]), len(row) - 16, temperature=0, top_k=0, top_p=1,
                                   repetition_penalty=1))
        same += made == row[16:]
    out.expect(f"{name}: greedy rows that are the published ones", same, at_least=len(expected["greedy"]))


# --- against the twin, and against itself -----------------------------------------------------------------------------

SHAPES = ({}, {"n_kernel": 2, "n_kv_head": 1}, {"n_kernel": 4, "n_layer": 5, "slc_rate": 2}, {"layer_pattern": "AAAA"},
          {"layer_pattern": "SSSS", "n_head": 4, "n_kv_head": 2}, {"n_embd": 192, "n_head": 6, "n_kv_head": 3})
WINDOWED = {"window": 5, "n_kv_head": 1}  # the twin has no window


def small(run: Run, seed: int = 0, **given: Any) -> GPT:
    """Return a small model with large random weights, on the device."""
    E = 32 if run.tiny else 128
    config = GPTConfig(**{"sequence_len": 64, "vocab_size": 331, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": E,
                          **given})
    model = random_model(config, run.device, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv1d" in name:
                p.normal_()
            elif "wte" not in name:
                p.normal_(std=1.5 * p.shape[-1] ** -0.5)
    return model


def ids_for(run: Run, *shape: int) -> Tensor:
    return torch.randint(331, shape, device=run.device)


def twin(run: Run, out: Report) -> None:
    """Random shapes in float32: our forward, loss and gradients are those of the plain twin; fresh inputs each time."""
    conv = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False  # or the twin's convolution would be rounded to TF32
    try:
        logits, losses, grads = [], [], []
        for seed, shape in enumerate(SHAPES):
            model = small(run, seed, **shape)
            plain = TwinGPT(model.config).to(run.device)
            plain.load_state_dict(model.state_dict(), strict=True)
            for B, T in ((3, 37), (2, 1), (1, 64)):
                ids, targets = ids_for(run, B, T), ids_for(run, B, T)
                targets[:, T // 2 + 1:T // 2 + 3] = -1
                with torch.no_grad():
                    logits.append(relative_error(model(ids), plain(ids)))
                ours, theirs = model(ids, targets), plain(ids, targets)
                ours.backward()
                theirs.backward()
                losses.append(abs(ours.item() - theirs.item()))
                a, b = gradients(model), gradients(plain)
                scale = float(torch.stack([g.norm() for g in b.values()]).max())
                apart = {name: float((a.get(name, torch.zeros_like(g)) - g).norm()) for name, g in b.items()}
                grads.append(largest(apart[name] / max(float(g.norm()), 1e-3 * scale) for name, g in b.items()))
    finally:
        torch.backends.cudnn.enabled = conv
    out.expect("logits, relative error", largest(logits), at_most=1e-4)
    out.expect("loss, difference in nats", largest(losses), at_most=1e-4)
    out.expect("gradients, relative error of the worst parameter", largest(grads), at_most=1e-3)


def head_loss(run: Run, out: Report) -> None:
    """The chunked head and loss against float64; chunks that do not divide the tokens, memory full of NaN."""
    N, E, V = (37, 16, 331) if run.tiny else (1000, 128, 5003)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        x, weight = torch.randn(N, E, device=run.device), torch.randn(V, E, device=run.device) * E ** -0.5 * 4
        targets = torch.randint(V, (N,), device=run.device)
        targets[::7] = -1
        exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
        logits = cross_entropy.softcap(exact_x @ exact_w.T)
        factors = torch.rand(N, device=run.device) * 2 - 0.5  # as reinforcement learning has them
        exact = (torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none") * factors).sum()
        exact.backward()
        for rows in (1, 13, N):
            a, b = x.clone().to(dtype).requires_grad_(), weight.clone().requires_grad_()
            with patch.object(cross_entropy, "chunk_tokens", lambda *_, rows=rows: rows), poisoned():
                loss = cross_entropy.head_loss(a, b, targets, "sum", factors)
                loss.backward()
            short = str(dtype).removeprefix("torch.")
            out.expect(f"{short}, {rows} tokens a chunk: relative error of loss and gradients",
                       largest([relative_error(loss, exact), relative_error(a.grad, exact_x.grad),
                                relative_error(b.grad, exact_w.grad)]), at_most=limit)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill newly allocated memory with NaN within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@torch.no_grad()
def state(run: Run, out: Report) -> None:
    """Decoding in any split, ragged, forked and selected gives the logits of a full forward pass."""
    splits, ragged, forked = [], [], []
    for seed, shape in enumerate((*SHAPES, WINDOWED)):
        model = small(run, seed, **shape)
        ids = ids_for(run, 2, 29)
        full = model(ids)
        for parts in ((29,), (1,) * 29, (3, 1, 1, 17, 2, 5)):
            cache = model.new_cache(2, max_len=4)
            pieces = [model(part, cache=cache) for part in ids.split(parts, dim=1)]
            splits.append(relative_error(torch.cat(pieces, dim=1), full))
        rows, joined = [ids_for(run, 1, n) for n in (5, 11, 8)], model.new_cache(1)
        for i, row in enumerate(rows):
            alone = model.new_cache(1)
            model(row[:, :-3], cache=alone)
            joined.resize(i + 1)
            joined.copy_row(i, alone, 0)
        got = torch.cat([model(torch.cat([row[:, -3:-2] for row in rows]), cache=joined),
                         model(torch.cat([row[:, -2:] for row in rows]), cache=joined)], dim=1)
        ragged.append(largest(relative_error(mine, model(row)[0, -3:]) for mine, row in zip(got, rows)))
        cache = model.new_cache(2)
        model(ids[:, :9], cache=cache)
        branch = cache.fork(2)
        more = ids_for(run, 4, 3)
        model(more, cache=branch)
        kept, last = branch.select([3, 0]), ids_for(run, 2, 2)
        forked.append(relative_error(model(last, cache=kept),
                          model(torch.cat([ids[[1, 0], :9], more[[3, 0]], last], dim=1))[:, -2:]))
    out.expect("any split, relative error", largest(splits), at_most=1e-4)
    out.expect("rows of different lengths, relative error", largest(ragged), at_most=1e-4)
    out.expect("forks and selections, relative error", largest(forked), at_most=1e-4)


def engine(run: Run, out: Report) -> None:
    """Many prompts decoded together, ragged, while rows come and go.

    Greedily, each gets the tokens that a full forward pass of it alone would give; sampled, those that it gets alone.
    """
    class Bare:
        """Stands in for the tokenizer: ids 91 to 96 are special tokens, 91 and 92 end a row."""

        def encode_special(self, name: str) -> int:
            names = ("assistant_end", "bos", "python_start", "python_end", "output_start", "output_end")
            return 91 + names.index(name.strip("<|>"))

        def get_bos_token_id(self) -> int:
            return 92

        def decode(self, ids: list[int]) -> str:
            return ""

    wrong = far = 0
    for seed, shape in enumerate((*SHAPES, WINDOWED)):
        model = small(run, seed, vocab_size=97, **shape)
        dice = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(90, (n,), generator=dice).tolist() for n in (3, 17, 1, 9, 30, 8)]
        ours = Engine(model, Bare(), calculate=lambda text: None)
        for prompt, [row] in zip(prompts, ours.generate_many(prompts, max_tokens=12, temperature=0, batch_size=4)):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *row.tokens[:-1]]], device=run.device))[0, len(prompt) - 1:]
            best = logits.max(dim=-1).values - logits[torch.arange(len(row.tokens)), row.tokens]
            far += int((best > 1e-3).sum())  # tokens that are not the most likely, near ties excepted
        options = {"max_tokens": 12, "temperature": 1.1, "top_k": 20, "top_p": 0.9}
        together = ours.generate_many(prompts, 3, seed=list(range(6)), batch_size=7, **options)
        alone = [ours.generate_many([prompt], 3, seed=number, **options)[0] for number, prompt in enumerate(prompts)]
        wrong += sum(a.tokens != b.tokens for one, other in zip(together, alone) for a, b in zip(one, other))
    out.expect("greedy tokens that are not the most likely ones of a full forward pass", float(far), at_most=0)
    # a near tie of two sums
    out.expect("sampled rows that differ from those of their prompt alone", float(wrong), at_most=1)


# --- compiled, optimizer, no waiting ----------------------------------------------------------------------------------

def compiled(run: Run, out: Report) -> None:
    """Compiled blocks: loss and gradients as in eager mode in float32; few graphs.

    In bfloat16 they are no further from float32 than eager mode is.
    """
    if not run.compiled:
        raise Skipped("nothing is compiled here; --compile does it")
    model = small(run, n_layer=6)
    ids, targets = ids_for(run, 2, 64), ids_for(run, 2, 64)

    def now(dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        model.compute_dtype = dtype
        loss = model(ids, targets)
        loss.backward()
        return loss.item(), gradients(model)
    full, full_grads = now(torch.float32)
    half, half_grads = now(torch.bfloat16)
    torch._dynamo.reset()  # variants compiled by other sections count against the limit
    torch._dynamo.utils.counters.clear()
    model.compile_blocks(2, 64)
    start = time.monotonic()
    loss, grads = now(torch.float32)
    out.numbers["compile_seconds"] = time.monotonic() - start
    out.expect("float32: loss, difference", abs(loss - full), at_most=1e-4)
    out.expect("float32: gradients, relative error of the worst parameter", worst(grads, full_grads), at_most=1e-3)
    graphs = out.numbers["graphs"] = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    out.expect("graphs for 6 layers of 2 kinds", graphs, at_most=2)
    loss, grads = now(torch.bfloat16)
    eager = worst(half_grads, full_grads)
    out.numbers["bfloat16_eager_error"] = eager
    out.expect("bfloat16: gradients' worst error over that of eager", worst(grads, full_grads) / eager, at_most=1.5)
    out.expect("bfloat16: loss, difference to float32", abs(loss - full), at_most=max(0.02, 2 * abs(half - full)))


def optimizer(run: Run, out: Report) -> None:
    """Three steps from the same weights and gradients.

    In float32 the device gets the CPU's weights; in bfloat16 it stays near them.
    """
    start = {name: p.detach().cpu().clone() for name, p in small(run, n_layer=3).named_parameters()}

    def after(device: torch.device, wish: str) -> dict[str, Tensor]:
        here = Run(device, run.tiny, False, None, run.deadline)
        model = small(here, n_layer=3)
        model.load_state_dict(start)
        with setting("NANOCHAT_DTYPE", wish):
            optimizer = MuonAdamW(parameter_groups(model), here.ranks)
        dice = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=dice).to(device)
            optimizer.step(grad_scale=0.1, clip=1.0)
        return {name: p.detach().cpu() - start[name] for name, p in model.named_parameters()}
    there, here = after(torch.device("cpu"), "float32"), after(run.device, "float32")
    rounded = after(run.device, "bfloat16")
    out.expect("float32: change of the weights, relative error of the worst parameter", worst(here, there),
               at_most=2e-3)
    out.expect("bfloat16 Newton-Schulz: change of the weights, relative error of the worst parameter",
               worst(rounded, there), at_most=0.1)


def syncs(fn: Callable[[], object]) -> list[str]:
    """Return where `fn` made the host wait for the GPU: file:line, one entry for each time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fn()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


def no_waiting(run: Run, out: Report) -> None:
    """A training step never makes the host wait, eager or compiled, with two micro-batches.

    Where decoding waits is only listed.
    """
    if run.device.type != "cuda":
        raise Skipped("only a GPU can be waited for")
    for how in ("eager", "compiled") if run.compiled else ("eager",):
        model = random_model(GPTConfig.from_depth(4, sequence_len=256, vocab_size=2048), run.device)
        model.compute_dtype = compute_dtype(run.device)
        if how == "compiled":
            torch._dynamo.reset()
            model.compile_blocks(4, 256)
        optimizer = MuonAdamW(parameter_groups(model), run.ranks)
        text = text_batches(4, 256, run.device)
        batches = [next(text), next(text)]

        def step(model=model, optimizer=optimizer, batches=batches) -> None:
            train_step(model, optimizer, batches, run.ranks, lr_scale=0.5, momentum=0.9, clip=1.0)
        for _ in range(3):
            step()
        found = syncs(step)
        out.numbers[f"{how}_syncs"] = found
        out.expect(f"{how} step: times the host waits", len(found), at_most=0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            clean = True
        except RuntimeError as error:
            clean = False
            frames = traceback.extract_tb(error.__traceback__)
            out.numbers[f"{how}_first_sync"] = [str(error)[:200],
                                                *(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        out.expect(f"{how} step runs where waiting is an error", clean)
    with torch.inference_mode():
        state, one = model.new_cache(1), torch.zeros(1, 1, dtype=torch.long, device=run.device)
        model(one, cache=state)
        out.numbers["decode_syncs"] = syncs(lambda: model(one, cache=state))


def learning(run: Run, out: Report) -> None:
    """20 steps on text: the loss falls, in bfloat16 as in float32."""
    depth, B, T = (2, 4, 64) if run.tiny else (6, 16, 512)
    curves = {}
    for dtype in (torch.float32, compute_dtype(run.device)):
        torch.manual_seed(0)
        model = GPT(GPTConfig.from_depth(depth, sequence_len=T, vocab_size=512)).to(run.device)
        model.compute_dtype = dtype
        optimizer = MuonAdamW(parameter_groups(model), run.ranks)
        text = text_batches(B, T, run.device)
        losses = [train_step(model, optimizer, [next(text)], run.ranks, momentum=0.85, clip=1.0)[0] for _ in range(20)]
        curves[str(dtype).removeprefix("torch.")] = torch.stack(losses).tolist()
    out.numbers["curves"] = curves
    for name, losses in curves.items():
        out.expect(f"{name}: loss after 20 steps, from {losses[0]:.2f}", losses[-1], at_most=losses[0] - 1.5)
    if len(curves) > 1:
        apart = largest(abs(a - b) for a, b in zip(*curves.values()))
        out.expect("largest difference of the two curves, nats", apart, at_most=0.1)
