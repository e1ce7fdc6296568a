"""The checks of dev/gpu_check.py on single kernels: every backend of this device against float64 and beside its plain
twin.

A section is a function of (Run, Report), as in dev/gpu_correctness.py. Inputs are fresh random numbers, of odd sizes,
with T = 1 among them, and columns of wider tensors; memory that a kernel has to write is NaN before. An error may be at
most 1.5 times that of the twin in the same dtype, which rounds at every step. On a CPU the backend is the Rust crate,
where it is built; with TRITON_INTERPRET=1 the Triton kernels run there too, slowly.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import columns, joined_width
from bench.measure import random_model, relative_error
from bench.peer import Endless
from dev.gpu_correctness import Report, Run, Skipped, largest, poisoned, small
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.kernels import attention as attend_kernel
from nanochat.kernels import cpu, cross_entropy, decode_attention
from nanochat.kernels.slc2 import causal_conv, gated_input
from nanochat.layers import Linear, project
from nanochat.loading import ready_to_decode
from nanochat.positions import rope_table

NOISE = 1.5  # an error may be so many times the twin's
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def backends(run: Run, operation: str, name: str) -> dict[str, Callable[..., Any]]:
    """Return the kernels of this name by backend, for those that work on this device. Raises Skipped without any."""
    found = {}
    if run.device.type == "cuda" or INTERPRETED:
        found["Triton"] = getattr(import_module(f"nanochat.kernels.{operation}.triton"), name)
    if run.device.type == "cpu" and cpu.cpukernels is not None:
        found["native"] = getattr(import_module(f"nanochat.kernels.{operation}.cpu"), name)
    if not found:
        raise Skipped("no kernel of ours runs on this device")
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def close(out: Report, name: str, got: list[Tensor], plain: list[Tensor], exact: list[Tensor],
          floor: float = 6e-7) -> None:
    """Check that the worst error of `got` is at most NOISE times that of `plain`, both against `exact`.

    Errors below `floor` count as `floor`.
    """
    mine, theirs = ([relative_error(a, b) for a, b in zip(values, exact, strict=True)] for values in (got, plain))
    out.expect(f"{name}: error {largest(mine):.1e}, over that of the twin",
               largest(a / max(b, floor) for a, b in zip(mine, theirs)),
               at_most=NOISE)


# --- SLC2 -------------------------------------------------------------------------------------------------------------

# B, T, H, D, K, dtype, whether there is a past; Triton compiles each for some seconds
SLC2_SHAPES = ((2, 300, 10, 128, 3, torch.bfloat16, False), (1, 1, 10, 128, 3, torch.bfloat16, True),
               (3, 37, 10, 128, 3, torch.float32, True), (2, 65, 6, 64, 2, torch.bfloat16, True),
               (3, 9, 3, 48, 4, torch.float32, True),
               (1, 2, 1, 2, 4, torch.float32, False), (5, 130, 4, 32, 4, torch.bfloat16, False),
               (1, 1, 3, 20, 2, torch.float32, False))


def slc2_inputs(run: Run, B: int, T: int, H: int, D: int, K: int, dtype: torch.dtype,
                with_past: bool) -> tuple[Tensor, ...]:
    """Return (z, dy, taps, past or None).

    The columns of z are x, B, A and alpha; dy is a part of a wider tensor.
    """
    E = H * D

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=run.device).to(dtype)
    z, dy = random(B, T, joined_width(E, H)), random(B, T, E + 8)[..., 3:3 + E]
    return z, dy, random(E, K), random(B, K - 1, E) if with_past else None


def slc2_twin(z: Tensor, dy: Tensor, taps: Tensor, past: Tensor | None, H: int) -> list[Tensor]:
    """Return y and the gradients of x, B, A, alpha, taps and past, by autograd through the definition, in z's dtype."""
    E = taps.shape[0]
    given = [part.detach().clone().requires_grad_()
             for part in (*columns(z, E, H), taps, *([] if past is None else [past]))]
    x, B, A, alpha, taps, *past = given
    y = B * F.silu(causal_conv(gated_input(x, A, alpha), taps, *past))
    return [y.detach(), *torch.autograd.grad(y, given, dy)]


def slc2(run: Run, out: Report) -> None:
    """The core of SLC2: forward, all gradients, and the decode step; nothing else is written."""
    forwards, backwards, steps = (backends(run, "slc2", name) for name in ("forward", "backward", "step"))
    last = run.left() - (1e9 if run.tiny else 90)
    for number, (B, T, H, D, K, dtype, with_past) in enumerate(SLC2_SHAPES):
        if run.left() < last:
            out.numbers["left_out"] = len(SLC2_SHAPES) - number
            break
        if run.tiny and T > 100:
            T = 41
        torch.manual_seed(number)
        z, dy, taps, past = slc2_inputs(run, B, T, H, D, K, dtype, with_past)
        wide = [None if t is None else t.double() for t in (z, dy, taps, past)]
        exact, plain = slc2_twin(*wide, H), slc2_twin(z, dy, taps, past, H)
        E, what = H * D, f"{B}×{T}×{H}·{D}, K {K}, {name_of(dtype)}{', with a past' if with_past else ''}"
        for backend in forwards:
            given = columns(z, E, H)
            with poisoned():
                y = forwards[backend](*given, taps, past)
            dz = torch.full_like(z, float("nan"))
            before = [None if t is None else t.clone() for t in (z, dy, taps, past)]
            with poisoned():
                dtaps, dpast = backwards[backend](dy, *given, taps, past, *columns(dz, E, H))
            got = [y, *columns(dz, E, H), dtaps, *([] if dpast is None else [dpast])]
            close(out, f"{backend}, {what}", got, plain, exact)
            out.expect(f"{backend}, {what}: inputs stay",
                       all(a is None or torch.equal(a, b) for a, b in zip((z, dy, taps, past), before)))
            if with_past and K > 1:
                memory, token = past.clone(), [part[:, :1] for part in given]
                with poisoned():
                    y1 = steps[backend](*token, taps, memory)
                x, _, A, alpha = (part.double() for part in token)
                moved = torch.cat([past, gated_input(x, A, alpha).to(dtype)], dim=1)[:, 1:]
                close(out, f"{backend}, {what}: one token, and its memory", [y1, memory], [plain[0][:, :1], moved],
                      [exact[0][:, :1], moved], floor=1e-6 if dtype == torch.float32 else 4e-3)


    B, T, H, D = (3, 41, 2, 16) if run.tiny else (32, 2048, 10, 128)
    z, dy, taps, _ = slc2_inputs(run, B, T, H, D, 3, torch.bfloat16, False)
    for backend in forwards:
        def both(rows: slice, backend: str = backend) -> list[Tensor]:
            given, dz = columns(z[rows], H * D, H), torch.full_like(z[rows], float("nan"))
            y = forwards[backend](*given, taps, None)
            dtaps, _ = backwards[backend](dy[rows], *given, taps, None, *columns(dz, H * D, H))
            return [y[-1], *(part[-1] for part in columns(dz, H * D, H)), dtaps]
        many, again, alone = both(slice(None)), both(slice(None)), both(slice(-1, None))
        out.expect(f"{backend}: the same to the last bit on a second run",
                   all(torch.equal(a, b) for a, b in zip(many, again)))
        out.expect(f"{backend}: the last of {B} rows of {T} is what it is alone",
                   all(torch.equal(a, b) for a, b in zip(many[:-1], alone)))


# --- loss -------------------------------------------------------------------------------------------------------------

def loss_kernel(run: Run, out: Report) -> None:
    """Losses and in-place gradients of softcapped logits.

    Some targets are ignored, some logits extreme, and the losses have factors.
    """
    kernels = backends(run, "cross_entropy", "softcapped_cross_entropy_")
    shapes = ((5, 97), (3, 2)) if run.tiny else ((33, 65536), (64, 5003), (5, 97), (3, 2))
    for dtype in (torch.bfloat16, torch.float32):
        for n, V in shapes:
            torch.manual_seed(n)
            z = (torch.randn(n, V, device=run.device) * 8).to(dtype)
            z[0, 0], z[-1, -1] = 300, -300
            targets = torch.randint(V, (n,), device=run.device)
            targets[1], factors = -1, torch.rand(n, device=run.device) * 2 - 0.5

            def by_autograd(z: Tensor, wide: torch.dtype, targets: Tensor = targets,
                            factors: Tensor = factors) -> list[Tensor]:
                z = z.detach().clone().requires_grad_()
                losses = F.cross_entropy(cross_entropy.softcap(z).to(wide), targets, ignore_index=-1, reduction="none")
                return [losses.detach(), *torch.autograd.grad((losses * factors.to(wide)).sum(), z)]
            exact, plain = by_autograd(z.double(), torch.float64), by_autograd(z, torch.float32)
            for backend, kernel in kernels.items():
                losses, kept, mine = torch.full((n,), float("nan"), device=run.device), z.clone(), z.clone()
                kernel(kept, targets, None, losses, False)
                out.expect(f"{backend}, {n}×{V} {name_of(dtype)}: logits stay where no gradient is wanted",
                           torch.equal(kept, z))
                alone = losses.clone()
                kernel(mine, targets, factors, losses.fill_(float("nan")), True)
                out.expect(f"{backend}, {n}×{V} {name_of(dtype)}: the same losses either way",
                           torch.equal(alone, losses))
                close(out, f"{backend}, {n}×{V} {name_of(dtype)}", [losses, mine], plain, exact, floor=1e-6)


# --- attention --------------------------------------------------------------------------------------------------------

def attention(run: Run, out: Report) -> None:
    """Causal attention, with a window, with a mask, and with all keys: the path of this device, gradients included."""
    T, D = (19, 16) if run.tiny else (300, 128)
    out.numbers["path"] = attend_kernel.path(torch.zeros(1, 1, 1, D, dtype=torch.bfloat16, device=run.device))
    mask = torch.rand(2, 1, T, T, device=run.device) < 0.5
    mask |= torch.eye(T, dtype=torch.bool, device=run.device)
    ways = {"causal": {"causal": True}, "a window of 7": {"causal": True, "window": 7}, "a mask": {"mask": mask},
            "all": {}}
    for dtype in (torch.bfloat16, torch.float32):
        for H, G in ((4, 4), (6, 2)):
            q, k, v = (torch.randn(2, T, heads, 3 * D, device=run.device).to(dtype)[..., D:2 * D]
                       for heads in (H, G, G))
            dy = torch.randn(2, T, H, D, device=run.device).to(dtype)

            def of(fn: Callable[..., Tensor], wide: torch.dtype, given: dict, q=q, k=k, v=v, dy=dy) -> list[Tensor]:
                mine = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
                y = fn(*mine, **given)
                return [y.detach(), *torch.autograd.grad(y, mine, dy.to(y.dtype))]
            for what, given in ways.items():
                exact, got = of(attend_kernel.attend_twin, torch.float64, given), of(attend_kernel.attend, dtype, given)
                # the twin computes in float32 and no fast path does: these limits suit products of numbers of the dtype
                out.expect(f"{what}, {H} heads on {G}, {name_of(dtype)}: relative error of output and gradients",
                           largest(relative_error(a, b) for a, b in zip(got, exact)),
                           at_most=2e-2 if dtype == torch.bfloat16 else 2e-5)


def one_token(run: Run, out: Report) -> None:
    """One new token a row over a KV cache: rows at different positions, NaN behind them."""
    D, S = (16, 70) if run.tiny else (128, 3000)
    for dtype in (torch.bfloat16, torch.float32):
        for B, H, G, window in ((5, 6, 2, None), (3, 4, 4, 50), (1, 10, 10, None)):
            torch.manual_seed(B)
            q, k, v = (torch.randn(B, 1, heads, D, device=run.device).to(dtype) for heads in (H, G, G))
            keys, values = (torch.randn(B, S, G, D, device=run.device).to(dtype) for _ in range(2))
            at = torch.tensor([0, S - 1, S // 2, 1, 63][-B:], device=run.device)
            rope = tuple(table[at].unsqueeze(1) for table in rope_table(S, D, run.device))
            for row, place in enumerate(at.tolist()):
                keys[row, place:], values[row, place:] = float("nan"), float("nan")

            def of(fn: Callable[..., Tensor], wide: torch.dtype, q=q, k=k, v=v, rope=rope, keys=keys, values=values,
                   at=at, window=window):
                q, k, v, keys, values = (x.to(wide, copy=True) for x in (q, k, v, keys, values))
                return [fn(q, k, v, rope, keys, values, at, window), keys.nan_to_num(), values.nan_to_num()]
            twin = decode_attention.append_and_attend_twin
            exact = of(twin, torch.float64)
            with poisoned():
                got = of(decode_attention.append_and_attend, dtype)
            close(out, f"{B} rows, {H} heads on {G}, window {window}, {name_of(dtype)}", got, of(twin, dtype), exact,
                  floor=1e-6 if dtype == torch.float32 else 2e-3)


# --- graphs, joined projections ---------------------------------------------------------------------------------------

def graphs(run: Run, out: Report) -> None:
    """Decode steps at fixed addresses (on CUDA: captured graphs) give the tokens of ordinary steps.

    Greedy and sampled, while rows come and go.
    """
    shape = {} if run.tiny else {"n_embd": 256, "n_head": 2, "n_kv_head": 2}
    different = total = 0
    for seed, (pattern, window) in enumerate((("SASA", None), ("SSSS", None), ("AAAA", 5))):
        model = small(run, seed, vocab_size=97, layer_pattern=pattern, window=window, **shape)
        with torch.inference_mode():
            model = ready_to_decode(model)
            model.float().compute_dtype = torch.float32  # so that near ties are rare
        dice = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(97, (n,), generator=dice).tolist() for n in (3, 17, 1, 9, 30)]
        for options in ({"temperature": 0}, {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "seed": list(range(5))}):
            engines = [Engine(model, Endless(), graphs=fixed) for fixed in (False, True)]
            rows = [[row.tokens for [row] in one.generate_many(prompts, max_tokens=24, batch_size=3, **options)]
                    for one in engines]
            different += sum(a != b for a, b in zip(*rows))
            total += len(prompts)
    out.numbers["rows"] = total
    # two logits may be nearly equal
    out.expect(f"rows, of {total}, that graphs decode differently", different, at_most=1)


def each(h: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """Return the products one by one, in h's dtype."""
    return [layer(h) for layer in layers]


def projections(run: Run, out: Report) -> None:
    """Several matrices with one input as one product: outputs and gradients are those of single products."""
    E, widths = (48, (48, 48, 16, 3)) if run.tiny else (1280, (1280, 1280, 128, 10))
    torch.manual_seed(0)
    with torch.device(run.device):
        layers = [Linear(E, width) for width in widths]
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(3, 37, E, device=run.device).to(dtype)
        slopes = [torch.randn(3, 37, width, device=run.device).to(dtype) for width in widths]

        def of(way: Callable[..., Sequence[Tensor]], wide: torch.dtype, h: Tensor = h,
               slopes: list[Tensor] = slopes) -> list[Tensor]:
            h = h.detach().to(wide).requires_grad_()
            outputs = way(h)
            return [*outputs, *torch.autograd.grad(outputs, [h, *(layer.weight for layer in layers)],
                                                   [dy.to(wide) for dy in slopes])]
        one_by_one = partial(each, layers=layers)
        close(out, name_of(dtype), of(lambda h: project(h, *layers), dtype), of(one_by_one, dtype),
              of(one_by_one, torch.float64))
    model = random_model(GPTConfig(sequence_len=64, vocab_size=331, n_layer=3, n_head=2, n_kv_head=2, n_embd=64),
                   run.device).eval()
    ids = torch.randint(331, (2, 21), device=run.device)
    with torch.inference_mode():
        before = model(ids)
        after = ready_to_decode(model)(ids)
    out.expect(f"ready to decode, in {name_of(model.dtype)}: logits, relative error", relative_error(after, before),
               at_most=3e-2 if model.dtype == torch.bfloat16 else 1e-5)
