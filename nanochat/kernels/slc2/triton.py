"""The core of SLC2 on GPUs: forward, backward and the decode step, each one memory-bound kernel, without autograd.

    y[t] = B[t] · silu(Σ_j taps[:, j] · u[t − (K−1) + j]),   u = silu(silu(alpha) ⊗ A) · x,   u = past before t = 0

Shapes: x, B, y (B, T, E); A (B, T, D); alpha (B, T, H); taps (E, K); past (B, K−1, E), oldest first; E = H·D, channel
h·D + d. Any T and D, any small K. Dtypes: any of 16 or 32 bits, taps and past may differ from the rest; arithmetic is
float32, rounded once when a result is written. Strides: any, with a contiguous last dimension, so that x, B, A and
alpha may be columns of one tensor. Offsets are 64 bits wide.

How the work is divided: a thread holds a few neighbouring channels of one head over ROWS time steps in registers, so
that the convolution and its transpose are arithmetic on registers. The K−1 steps around these are loaded and gated
again; they come from the L1 cache, since a neighbouring thread of the same program loads them too. A program holds
SEGMENTS such stretches of time, one after the other, and loops over the heads: A stays in cache, and the gradient of A,
a sum over heads, stays in registers. No sum needs an atomic operation, so that every run gives the same numbers.

A d20 in bfloat16 moves 7,956 bytes a token forward and 13,352 backward. What programs read twice at their edges, and
the partial sums of dtaps, add at most 2 % and 7 %.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.dispatch import launch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Channels a thread, time steps a thread, steps loaded ahead, warps; by the size of an element. Not autotuned at run
# time: the order of the sums would then vary. By the compiler's count for sm_90, d20, bfloat16: forward 109 registers,
# no spill, 33 instructions an element of the 53 that fit into the time of the memory traffic; backward 255 registers,
# 96 bytes spilled, 78 of 89.
FORWARD = {2: (4, 8, 4, 4), 4: (4, 8, 4, 4)}
BACKWARD = {2: (4, 8, 4, 4), 4: (4, 4, 4, 4)}
SUMS = 512  # programs of the backward pass, at most; each has a partial sum of dtaps
STEP = 256  # channels a program of the decode step


@triton.jit
def _sigmoid(z):
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-z))
    # four instructions; the compiler's own take twelve, for denormal numbers, which do not matter here
    return tl.inline_asm_elementwise("""{
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _read(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def _taps(taps, h, d, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr):
    """Return the taps of one head, K tensors (SEGMENTS, BLOCK_D) in float32: a copy for every thread that uses them."""
    d = tl.broadcast_to(d, (SEGMENTS, d.shape[1]))
    ws = ()
    for j in tl.static_range(K):
        ws = ws + (_read(taps + (j * H + h) * D + d, d < D).to(tl.float32),)
    return ws


@triton.jit
def _convolved(ws, us, i: tl.constexpr, K: tl.constexpr):
    """Return Σ_j taps[j] · u[i + j]."""
    c = ws[0] * us[i]
    for j in tl.static_range(1, K):
        c += ws[j] * us[i + j]
    return c


@triton.jit
def _slc2(x, B, A, alpha, taps, past, y, T, blocks,
          x_b, x_t, B_b, B_t, A_b, A_t, alpha_b, alpha_t, past_b, past_t, y_b, y_t,
          H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, PAST: tl.constexpr,
          ROWS: tl.constexpr, SEGMENTS: tl.constexpr, AHEAD: tl.constexpr):
    """Compute y of SEGMENTS stretches of ROWS time steps, for all heads."""
    pid = tl.program_id(0)
    block, b = pid % blocks, (pid // blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    first = block * (SEGMENTS * ROWS) + tl.arange(0, SEGMENTS)[:, None] * ROWS  # first step of each stretch
    t = first.to(tl.int64)
    x += b * x_b + (t - (K - 1)) * x_t + d
    A += b * A_b + (t - (K - 1)) * A_t + d
    alpha += b * alpha_b + (t - (K - 1)) * alpha_t
    B += b * B_b + t * B_t + d
    y += b * y_b + t * y_t + d
    past += b * past_b + t * past_t + d  # used where t is 0
    for h in range(H):
        ws = _taps(taps, h, d, H, D, K, SEGMENTS)
        x_, A_, alpha_, B_, y_ = x + h * D, A, alpha + h, B + h * D, y + h * D
        rows, us = (), ()
        for n in tl.static_range(ROWS + K - 1 + AHEAD):
            if n < ROWS + K - 1:  # read the step first + n − (K−1)
                here = first + (n - (K - 1)) < T
                if n < K - 1:
                    here = here & (first + (n - (K - 1)) >= 0)
                inside = here & (d < D) if BLOCK_D != D else here
                x_n = _read(x_, inside)
                rows = rows + ((_read(alpha_, here), _read(A_, inside), x_n, _read(B_, inside) if n >= K - 1 else x_n),)
                x_ += x_t
                A_ += A_t
                alpha_ += alpha_t
                if n >= K - 1:
                    B_ += B_t
            if n >= AHEAD:  # compute with the step read AHEAD iterations ago
                alpha_n, A_n, x_n, B_n = rows[n - AHEAD]
                a = alpha_n.to(tl.float32)
                z = a * _sigmoid(a) * A_n.to(tl.float32)
                u = z * _sigmoid(z) * x_n.to(tl.float32)
                if PAST and n - AHEAD < K - 1:
                    u += _read(past + (n - AHEAD) * past_t + h * D,
                               (first + (n - AHEAD - (K - 1)) < 0) & (d < D)).to(tl.float32)
                us = us + (u,)
                if n - AHEAD >= K - 1:
                    c = _convolved(ws, us, n - AHEAD - (K - 1), K)
                    inside = first + (n - AHEAD - (K - 1)) < T
                    inside = inside & (d < D) if BLOCK_D != D else inside
                    tl.store(y_, B_n.to(tl.float32) * c * _sigmoid(c), mask=inside)
                    y_ += y_t


@triton.jit
def _slc2_gradient(dy, x, B, A, alpha, taps, past, dx, dB, dA, dalpha, dtaps, dpast, T, blocks, total, chain, pad,
                   dy_b, dy_t, x_b, x_t, B_b, B_t, A_b, A_t, alpha_b, alpha_t, past_b, past_t,
                   dx_b, dx_t, dB_b, dB_t, dA_b, dA_t, dalpha_b, dalpha_t,
                   H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, PAST: tl.constexpr,
                   ROWS: tl.constexpr, SEGMENTS: tl.constexpr, AHEAD: tl.constexpr):
    """Compute all gradients of `chain` blocks of time, one after the other, and their partial sum of dtaps."""
    pid = tl.program_id(0)
    lane, column = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)[None, :]
    d = lane[None, :]
    dtaps += pid.to(tl.int64) * (K * H * D) + lane
    for number in range(pid * chain, tl.minimum(total, pid * chain + chain)):
        block, b = number % blocks, (number // blocks).to(tl.int64)
        first = block * (SEGMENTS * ROWS) + tl.arange(0, SEGMENTS)[:, None] * ROWS  # first step of each stretch
        t = first.to(tl.int64)
        x_0, A_0 = x + b * x_b + (t - (K - 1)) * x_t + d, A + b * A_b + (t - (K - 1)) * A_t + d
        alpha_0 = alpha + b * alpha_b + (t - (K - 1)) * alpha_t
        B_0, dy_0 = B + b * B_b + t * B_t + d, dy + b * dy_b + t * dy_t + d
        dx_0, dB_0 = dx + b * dx_b + t * dx_t + d, dB + b * dB_b + t * dB_t + d
        dalpha_0 = dalpha + b * dalpha_b + (t + column) * dalpha_t
        dAs = ()
        for _ in tl.static_range(ROWS):
            dAs = dAs + (tl.zeros((SEGMENTS, BLOCK_D), tl.float32),)
        for h in range(H):
            ws, sums = _taps(taps, h, d, H, D, K, SEGMENTS), ()
            for _ in tl.static_range(K):
                sums = sums + (tl.zeros((SEGMENTS, BLOCK_D), tl.float32),)
            x_, A_, alpha_, B_, dy_ = x_0 + h * D, A_0, alpha_0 + h, B_0 + h * D, dy_0 + h * D
            dx_, dB_ = dx_0 + h * D, dB_0 + h * D
            dalphas = tl.zeros((SEGMENTS, ROWS), tl.float32)
            rows, gates, us, dcs, new_dAs = (), (), (), (), ()
            for n in tl.static_range(ROWS + 2 * (K - 1) + AHEAD):
                if n < ROWS + 2 * (K - 1):  # read the step first + n − (K−1)
                    here = first + (n - (K - 1)) < T
                    if n < K - 1:
                        here = here & (first + (n - (K - 1)) >= 0)
                    inside = here & (d < D) if BLOCK_D != D else here
                    alpha_n, A_n, x_n = _read(alpha_, here), _read(A_, inside), _read(x_, inside)
                    x_ += x_t
                    A_ += A_t
                    alpha_ += alpha_t
                    if n < K - 1:
                        rows = rows + ((alpha_n, A_n, x_n, x_n, x_n),)
                    else:
                        rows = rows + ((alpha_n, A_n, x_n, _read(B_, inside), _read(dy_, inside)),)
                        B_ += B_t
                        dy_ += dy_t
                if n >= AHEAD:  # compute with the step read AHEAD iterations ago
                    alpha_n, A_n, x_n, B_n, dy_n = rows[n - AHEAD]
                    a = alpha_n.to(tl.float32)
                    s = _sigmoid(a)
                    silu_a = a * s
                    slope_a = s + silu_a * (1.0 - s)
                    z = silu_a * A_n.to(tl.float32)
                    s = _sigmoid(z)
                    u = z * s * x_n.to(tl.float32)
                    if PAST and n - AHEAD < K - 1:
                        u += _read(past + b * past_b + (n - AHEAD + t) * past_t + h * D + d,
                                   (first + (n - AHEAD - (K - 1)) < 0) & (d < D)).to(tl.float32)
                    us, gates = us + (u,), gates + ((silu_a, slope_a, s),)
                    if n - AHEAD >= K - 1:
                        c = _convolved(ws, us, n - AHEAD - (K - 1), K)
                        s = _sigmoid(c)
                        silu_c = c * s
                        dy_f = dy_n.to(tl.float32)
                        dc = dy_f * B_n.to(tl.float32) * (s + silu_c * (1.0 - s))
                        dcs = dcs + (dc,)
                        if n - AHEAD < ROWS + K - 1:
                            own = first + (n - AHEAD - (K - 1)) < T
                            tl.store(dB_, dy_f * silu_c, mask=own & (d < D) if BLOCK_D != D else own)
                            dB_ += dB_t
                            new_sums = ()
                            for j in tl.static_range(K):
                                new_sums = new_sums + (sums[j] + dc * us[n - AHEAD - (K - 1) + j],)
                            sums = new_sums
                    if n - AHEAD >= 2 * (K - 1):  # the gradient of the step K−1 before is now complete
                        silu_a, slope_a, s = gates[n - AHEAD - (K - 1)]
                        alpha_n, A_n, x_n, B_n, dy_n = rows[n - AHEAD - (K - 1)]
                        du = ws[0] * dcs[n - AHEAD - (K - 1)]
                        for j in tl.static_range(1, K):
                            du += ws[j] * dcs[n - AHEAD - (K - 1) - j]
                        A_f = A_n.to(tl.float32)
                        gate = silu_a * A_f * s
                        own = first + (n - AHEAD - 2 * (K - 1)) < T
                        tl.store(dx_, du * gate, mask=own & (d < D) if BLOCK_D != D else own)
                        dx_ += dx_t
                        dz = du * x_n.to(tl.float32) * (s + gate * (1.0 - s))
                        new_dAs = new_dAs + (dAs[n - AHEAD - 2 * (K - 1)] + dz * silu_a,)
                        dalphas = tl.where(column == n - AHEAD - 2 * (K - 1),
                                           tl.sum(dz * A_f, axis=1, keep_dims=True) * slope_a, dalphas)
            dAs = new_dAs
            tl.store(dalpha_0 + h, dalphas, mask=first + column < T)
            if PAST:
                for i in tl.static_range(K - 1):
                    du = ws[0] * dcs[i]
                    for j in tl.static_range(1, i + 1):
                        du += ws[j] * dcs[i - j]
                    tl.store(dpast + (b * (K - 1) + i + t) * (H * D) + h * D + d, du, mask=(first == 0) & (d < D))
            for j in tl.static_range(K):
                # 0 for a program's first stretch
                before = _read(dtaps + (j * H + h) * D, lane < tl.minimum(number - pid * chain, 1) * D)
                tl.store(dtaps + (j * H + h) * D, before + tl.sum(sums[j], axis=0), mask=lane < D)
        dA_ = dA + b * dA_b + t * dA_t + d
        for r in tl.static_range(ROWS):
            tl.store(dA_, dAs[r], mask=(first + r < T) & (d < D))
            dA_ += dA_t
        for zero in range(H, H + pad):
            tl.store(dalpha_0 + zero, tl.zeros((SEGMENTS, ROWS), tl.float32), mask=first + column < T)


@triton.jit
def _slc2_step(x, B, A, alpha, taps, past, y, blocks, x_b, B_b, A_b, alpha_b, past_b, past_t,
               E: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Compute y and the new past of one token, for BLOCK channels."""
    pid = tl.program_id(0)
    b, e = (pid // blocks).to(tl.int64), pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    a = _read(alpha + b * alpha_b + e // D, inside).to(tl.float32)
    z = a * _sigmoid(a) * _read(A + b * A_b + e % D, inside).to(tl.float32)
    u = z * _sigmoid(z) * _read(x + b * x_b + e, inside).to(tl.float32)
    past += b * past_b + e
    ps = ()
    for j in tl.static_range(K - 1):
        ps = ps + (_read(past + j * past_t, inside),)
    tl.debug_barrier()  # all threads have read before one overwrites
    c = u * _read(taps + e * K + (K - 1), inside).to(tl.float32)
    for j in tl.static_range(K - 1):
        c += ps[j].to(tl.float32) * _read(taps + e * K + j, inside).to(tl.float32)
        tl.store(past + j * past_t, ps[j + 1] if j + 1 < K - 1 else u, mask=inside)
    tl.store(y + b * E + e, _read(B + b * B_b + e, inside).to(tl.float32) * c * _sigmoid(c), mask=inside)


def _tile(table: dict, x: Tensor, D: int) -> dict:
    """Return the launch parameters of a kernel over x (B, T, E) with heads of width D."""
    channels, rows, ahead, warps = table[x.element_size()]
    block_d = triton.next_power_of_2(D)
    warps = min(16, max(warps, block_d // (32 * channels)))
    segments = min(max(1, 32 * warps * channels // block_d), triton.next_power_of_2(triton.cdiv(x.shape[1], rows)))
    return {"BLOCK_D": block_d, "ROWS": rows, "SEGMENTS": segments, "AHEAD": ahead, "num_warps": warps}


def _strides(*tensors: Tensor) -> list[int]:
    for tensor in tensors:
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"the last dimension must be contiguous; got the strides {tensor.stride()}")
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def forward(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return y (B, T, E), contiguous, in x's dtype."""
    (rows, T, E), D, H, K = x.shape, A.shape[-1], alpha.shape[-1], taps.shape[1]
    y = torch.empty(rows, T, E, dtype=x.dtype, device=x.device)
    if y.numel():
        tile = _tile(FORWARD, x, D)
        blocks = triton.cdiv(T, tile["ROWS"] * tile["SEGMENTS"])
        first = x if past is None else past
        launch(_slc2, (rows * blocks,), x, B, A, alpha, taps.t().contiguous(), first, y, T, blocks,
               *_strides(x, B, A, alpha, first, y), H=H, D=D, K=K, PAST=past is not None, **tile)
    return y


def backward(dy: Tensor, x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None,
             dx: Tensor, dB: Tensor, dA: Tensor, dalpha: Tensor, pad: int = 0) -> tuple[Tensor, Tensor | None]:
    """Compute all gradients from the inputs of `forward` alone. The order of the sums depends on the shapes alone.

    Args:
        dy: gradient of y, (B, T, E)
        x, B, A, alpha, taps, past: as `forward` took them
        dx, dB, dA, dalpha: written in place, every element; of the shapes of x, B, A, alpha
        pad: write zeros into so many columns behind dalpha, in the tensor that dalpha is a part of

    Returns:
        dtaps (E, K) in float32, and dpast of past's shape and dtype (None without a past)
    """
    (rows, T, E), D, H, K = x.shape, A.shape[-1], alpha.shape[-1], taps.shape[1]
    dpast = None if past is None else torch.empty(past.shape, dtype=past.dtype, device=x.device)
    if not x.numel():
        return torch.zeros(E, K, device=x.device), None if dpast is None else dpast.zero_()
    tile = _tile(BACKWARD, x, D)
    blocks = triton.cdiv(T, tile["ROWS"] * tile["SEGMENTS"])
    total = rows * blocks
    chain = triton.cdiv(total, SUMS)
    programs = triton.cdiv(total, chain)
    dtaps = torch.empty(programs, K, E, dtype=torch.float32, device=x.device)
    first = x if past is None else past
    launch(_slc2_gradient, (programs,), dy, x, B, A, alpha, taps.t().contiguous(), first, dx, dB, dA, dalpha, dtaps,
           dtaps if dpast is None else dpast, T, blocks, total, chain, pad,
           *_strides(dy, x, B, A, alpha, first, dx, dB, dA, dalpha), H=H, D=D, K=K, PAST=past is not None, **tile)
    return dtaps.sum(0).t().contiguous(), dpast


def step(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return y (B, 1, E) of one token a sequence. A CUDA graph can capture it.

    past is written in place: its oldest gated input drops out and that of this token comes in.
    """
    (rows, _, E), D, K = x.shape, A.shape[-1], taps.shape[1]
    y = torch.empty(rows, 1, E, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(E, STEP)
    strides = _strides(x, B, A, alpha, past)
    if rows:
        launch(_slc2_step, (rows * blocks,), x, B, A, alpha, taps.contiguous(), past, y, blocks, *strides[:8:2],
               *strides[8:], E=E, D=D, K=K, BLOCK=STEP)
    return y
