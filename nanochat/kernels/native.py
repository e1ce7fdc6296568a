"""Kernels for CPUs: what our Rust crate `cpukernels` offers, behind checks of shapes, dtypes and strides.

Raw functions without autograd, of float32 or bfloat16 tensors with a contiguous last dimension; other strides are free. Arithmetic is
float32 and rounded once on the way out; a row's result depends neither on the rows beside it nor on the number of threads. They work
on torch's own threads, as many as `torch.get_num_threads()`. `ready` says where they can be used; without the built crate, nowhere.
What does not fit together raises ValueError.
"""

import torch
from torch import Tensor, nn

try:
    import cpukernels
    from cpukernels import runs_on  # noqa: F401  (of the source folder an empty package can be imported, too)
except ImportError:
    cpukernels = None

_DTYPES = {torch.float32: False, torch.bfloat16: True}  # the crate's flag for each
_PLAIN = {Tensor, nn.Parameter}


def ready(*tensors: Tensor) -> bool:
    """Whether these tensors are for the kernels here: on a CPU, of a dtype and strides as above, real memory, and nothing traces."""
    if torch.compiler.is_compiling() or cpukernels is None:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():  # vmap, or fake tensors and other modes
        return False
    return all(type(t) in _PLAIN and t.is_cpu and t.dtype in _DTYPES and _dense(t) for t in tensors)


def _dense(t: Tensor) -> bool:
    return t.dim() > 0 and (t.stride(-1) == 1 or t.shape[-1] == 1)


def _wrong(what: str, **tensors: Tensor | None) -> ValueError:
    """What to raise: the rule, and the tensors that break it."""
    seen = (f"{name} {tuple(t.shape)} {t.dtype} with strides {t.stride()}" for name, t in tensors.items() if t is not None)
    return ValueError(f"{what}; got {', '.join(seen)}")


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """dy, of x's shape and dtype, with a contiguous last dimension."""
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise _wrong("dy has x's shape and dtype", dy=dy, x=x)
    return dy if _dense(dy) else dy.contiguous()


def _rows(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1)


def _any_rows(t: Tensor) -> tuple[bool, tuple[int, int, int]]:
    return _DTYPES[t.dtype], _rows(t)


# ---- cross-entropy of softcapped logits


def softcapped_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor, want_grad: bool = True) -> None:
    """Write the loss of each row of raw logits z (n, V), softcapped at 15, to losses; with want_grad, overwrite z with its gradient.

    targets (n,) int64, −1 where nothing counts: loss and gradient are 0 there. factors (n,) float32 or None: what the gradient, not the
    loss, is multiplied with. losses (n,) float32. Raises IndexError, and writes nothing, for another target outside the vocabulary.
    """
    if z.dim() != 2 or z.dtype not in _DTYPES or not z.numel() or not _dense(z):
        raise _wrong("z is (n, V), float32 or bfloat16, its rows contiguous", z=z)
    n, V = z.shape
    for t, dtype in ((targets, torch.int64), (losses, torch.float32), (factors, torch.float32)):
        if t is not None and (t.shape != (n,) or t.dtype != dtype or not _dense(t)):
            raise _wrong("targets (n,) are int64, losses and factors (n,) float32, all contiguous", z=z, targets=targets, losses=losses,
                         factors=factors)
    cpukernels.softcapped_(torch.get_num_threads(), _DTYPES[z.dtype], n, V, _rows(z), targets.data_ptr(),
                           None if factors is None else factors.data_ptr(), losses.data_ptr(), want_grad)


# ---- the core of SLC2


def _slc2_inputs(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None) -> tuple:
    """What the crate wants to know of the inputs, after checks."""
    shape, dtype = x.shape, x.dtype
    (b, T, E), D, H, K = shape, A.shape[-1], alpha.shape[-1], taps.shape[-1]
    if not (dtype in _DTYPES and E == H * D > 0 and T > 0 and B.shape == shape and A.shape == (b, T, D) and alpha.shape == (b, T, H)
            and B.dtype == A.dtype == alpha.dtype == dtype and _dense(x) and _dense(B) and _dense(A) and _dense(alpha)):
        raise _wrong("x and B are (B, T, E), A (B, T, D), alpha (B, T, H), E = H·D, of one dtype, the last dimension contiguous",
                     x=x, B=B, A=A, alpha=alpha)
    if not (taps.dtype in _DTYPES and taps.shape == (E, K) and K > 0
            and (past is None or past.dtype in _DTYPES and past.shape == (b, K - 1, E) and (_dense(past) or K == 1))):
        raise _wrong("taps are (E, K) and past (B, K − 1, E), its last dimension contiguous", x=x, taps=taps, past=past)
    return ((b, T, H, D, K), _rows(x), _rows(B), _rows(A), _rows(alpha), _any_rows(taps), None if past is None else _any_rows(past))


def slc2_forward(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return y = B · silu(c) (B, T, E), c the causal convolution of u = silu(silu(alpha) ⊗ A) · x.

    x, B (B, T, E); A (B, T, D); alpha (B, T, H): any strides but the last. taps (E, K) and past (B, K−1, E), the u before the first
    token, oldest first (None: zeros), may be of another dtype.
    """
    inputs = _slc2_inputs(x, B, A, alpha, taps, past)
    y = torch.empty(x.shape, dtype=x.dtype)
    cpukernels.slc2_forward(torch.get_num_threads(), _DTYPES[x.dtype], inputs, _rows(y))
    return y


def slc2_backward(dy: Tensor, x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None,
                  dx: Tensor, dB: Tensor, dA: Tensor, dalpha: Tensor) -> tuple[Tensor, Tensor | None]:
    """Write all of dx, dB, dA and dalpha, of the shapes of x, B, A and alpha, any strides but the last; return dtaps and dpast.

    dtaps is (E, K) float32; dpast has past's shape and dtype, None where past is.
    """
    inputs = _slc2_inputs(x, B, A, alpha, taps, past)
    dy = _like(dy, x)
    for given, like in ((dx, x), (dB, B), (dA, A), (dalpha, alpha)):
        if given.shape != like.shape or given.dtype != x.dtype or not _dense(given):
            raise _wrong("dx, dB, dA and dalpha have their inputs' shapes and dtype, the last dimension contiguous",
                         dx=dx, dB=dB, dA=dA, dalpha=dalpha)
    dtaps = torch.empty(taps.shape, dtype=torch.float32)
    dpast = None if past is None else torch.empty(past.shape, dtype=past.dtype)
    cpukernels.slc2_backward(torch.get_num_threads(), _DTYPES[x.dtype], inputs, _rows(dy),
                             (_rows(dx), _rows(dB), _rows(dA), _rows(dalpha)), dtaps.data_ptr(), None if past is None else _any_rows(dpast))
    return dtaps, dpast


def slc2_step(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return y (B, 1, E) of one token a sequence, as `slc2_forward` does, and move past (B, K−1, E) on by it, in place."""
    if x.shape[1] != 1 or past is None:
        raise _wrong("a step is of one token behind a past", x=x, past=past)
    inputs = _slc2_inputs(x, B, A, alpha, taps, past)
    y = torch.empty(x.shape, dtype=x.dtype)
    cpukernels.slc2_step(torch.get_num_threads(), _DTYPES[x.dtype], inputs, _rows(y))
    return y


# ---- rows


def _matrix(t: Tensor) -> Tensor:
    """t (…, E) as (n, E) with a contiguous last dimension; a copy where its strides do not allow that."""
    return (t if _dense(t) else t.contiguous()).reshape(-1, t.shape[-1])


def _rms_norm(x: Tensor, dy: Tensor | None) -> Tensor:
    if x.dtype not in _DTYPES or not x.dim():
        raise _wrong("x is (…, E), float32 or bfloat16", x=x)
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        rows, dy = _matrix(x), None if dy is None else _matrix(_like(dy, x))
        n, E = rows.shape
        cpukernels.rms_norm(torch.get_num_threads(), _DTYPES[x.dtype], n, E, (rows.data_ptr(), rows.stride(0), 0),
                            None if dy is None else (dy.data_ptr(), dy.stride(0), 0), (y.data_ptr(), E, 0))
    return y


def rms_norm(x: Tensor) -> Tensor:
    """Return x / √(mean x² + 2⁻²³) of each row of x (…, E), contiguous."""
    return _rms_norm(x, None)


def rms_norm_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x (…, E), contiguous, from that of `rms_norm(x)`."""
    return _rms_norm(x, dy)


def _relu2(x: Tensor, dy: Tensor | None) -> Tensor:
    if x.dtype not in _DTYPES:
        raise _wrong("x is float32 or bfloat16", x=x)
    x, dy = x.contiguous(), None if dy is None else _like(dy, x).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    cpukernels.relu2(torch.get_num_threads(), _DTYPES[x.dtype], x.numel(), x.data_ptr(), None if dy is None else dy.data_ptr(),
                     y.data_ptr())
    return y


def relu2(x: Tensor) -> Tensor:
    """Return relu(x)², contiguous, of any shape."""
    return _relu2(x, None)


def relu2_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Return 2 · dy · relu(x), contiguous; x may be relu(x) as well."""
    return _relu2(x, dy)


def _heads(t: Tensor) -> tuple[tuple[int, int, int], int]:
    return _rows(t), t.stride(2)


def _rope_norm(x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor | None) -> Tensor:
    B, T, H, D = x.shape
    for table in (cos, sin):
        if x.dtype not in _DTYPES or not _dense(x) or D % 2 or table.dtype != torch.float32 or not _dense(table) \
                or table.shape not in ((T, D // 2), (B, T, D // 2)):
            raise _wrong("x is (B, T, H, D), float32 or bfloat16, D even; cos and sin are (T, D/2) or (B, T, D/2), float32; "
                         "the last dimension contiguous", x=x, cos=cos, sin=sin)
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        dy = None if dy is None else _like(dy, x)
        tables = [(t.data_ptr(), t.stride(0) if t.dim() == 3 else 0, t.stride(-2)) for t in (cos, sin)]
        cpukernels.rope_norm(torch.get_num_threads(), _DTYPES[x.dtype], (B, T, H, D), _heads(x), None if dy is None else _heads(dy),
                             _heads(y), *tables)
    return y


def rope_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the RMS norm of each head of x (B, T, H, D), turned by its position; contiguous.

    Pairs (x[d], x[d + D/2]) become (x1·cos + x2·sin, x2·cos − x1·sin). cos, sin (T, D/2) or (B, T, D/2) are float32.
    """
    return _rope_norm(x, cos, sin, None)


def rope_norm_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x, contiguous, from that of `rope_norm(x, cos, sin)`."""
    return _rope_norm(x, cos, sin, dy)


# ---- attention


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, window: int | None, queries: int) -> tuple[int, ...]:
    """What the crate wants to know of the shape, after checks: B, S, H, G, D and what a query sees at most."""
    fit = q.dim() == k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES
    if not fit or q.shape != (k.shape[0], queries, q.shape[2], k.shape[3]) or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise _wrong(f"q is (B, {queries}, H, D), k and v (B, S, G, D) with H a multiple of G, of one dtype", q=q, k=k, v=v)
    if not (_dense(q) and _dense(k) and _dense(v)) or window is not None and window < 1:
        raise _wrong(f"the last dimension is contiguous and a window at least 1, not {window}", q=q, k=k, v=v)
    (B, S, G, D), H = k.shape, q.shape[2]
    return B, S, H, G, D, S if window is None else min(window, S)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, D), contiguous, and the logarithm (B, H, T), float32, of each query's sum of exponentials.

    q (B, T, H, D) and k, v (B, T, G, D): any strides but the last; H/G neighbouring query heads share a key head. Each query sees
    the keys up to its own place, with a window only the last so many of them; its result does not depend on what comes later.
    """
    shape = _attention_shape(q, k, v, window, k.shape[1])
    B, T, H = shape[:3]
    y, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, T)
    if y.numel():
        cpukernels.attention_forward(torch.get_num_threads(), _DTYPES[q.dtype], shape, [_heads(t) for t in (q, k, v, y)], sums.data_ptr())
    return y, sums


def attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor,
                       window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous, from dy and what `attention_forward` took and gave."""
    shape = _attention_shape(q, k, v, window, k.shape[1])
    B, T, H = shape[:3]
    dy, y = _like(dy, q), _like(y, q)
    if sums.shape != (B, H, T) or sums.dtype != torch.float32 or not sums.is_contiguous():
        raise _wrong("sums are what the forward pass gave", q=q, sums=sums)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    if y.numel():
        cpukernels.attention_backward(torch.get_num_threads(), _DTYPES[q.dtype], shape, [_heads(t) for t in (q, k, v, y, dy, dq, dk, dv)],
                                      sums.data_ptr())
    return dq, dk, dv


def one_query(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None, window: int | None = None) -> Tensor:
    """Return the attention, (B, 1, H, D), of one query a row over its first `lengths` keys, with a window over the last so many of these.

    q (B, 1, H, D); k, v (B, S, G, D): any strides but the last. lengths: B numbers from 1 to S, or None for all keys. What lies behind
    is not read, and a row's result does not depend on how much that is.
    """
    B, S, H, G, D, window = _attention_shape(q, k, v, window, 1)
    lengths = [S] * B if lengths is None else lengths
    if len(lengths) != B or any(not 1 <= n <= S for n in lengths):
        raise _wrong(f"each row has a length from 1 to S, not {lengths}", q=q, k=k)
    y = torch.empty(q.shape, dtype=q.dtype)
    spans = [(max(0, n - window), n) for n in lengths]
    cpukernels.one_query(torch.get_num_threads(), _DTYPES[q.dtype], (H, G, D), [_heads(t) for t in (q, k, v, y)], spans)
    return y
