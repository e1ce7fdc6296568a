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


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _input(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    _check(t.shape == shape and t.dtype == dtype, f"{name} is {tuple(t.shape)} {t.dtype}, wanted {shape} {dtype}")
    return t if _dense(t) else t.contiguous()


def _output(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    _check(_dense(t), f"{name} is written in place: its last dimension must be contiguous")
    return _input(name, t, shape, dtype)


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
    n, V = z.shape
    _check(z.dtype in _DTYPES and V > 0, f"z is {tuple(z.shape)} {z.dtype}")
    _output("z", z, (n, V), z.dtype)
    targets = _input("targets", targets, (n,), torch.int64).contiguous()
    factors = None if factors is None else _input("factors", factors, (n,), torch.float32).contiguous()
    _output("losses", losses, (n,), torch.float32)
    cpukernels.softcapped_(torch.get_num_threads(), _DTYPES[z.dtype], n, V, _rows(z), targets.data_ptr(),
                           None if factors is None else factors.data_ptr(), losses.data_ptr(), want_grad)


# ---- the core of SLC2


def _slc2_inputs(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None) -> tuple:
    """What the crate wants to know of the inputs, after checks."""
    (b, T, E), D, H, K = x.shape, A.shape[-1], alpha.shape[-1], taps.shape[-1]
    _check(x.dtype in _DTYPES and E == H * D > 0 and T > 0 and K > 0, f"x is {tuple(x.shape)} {x.dtype}, {H} heads of {D}, {K} taps")
    _check(taps.dtype in _DTYPES and taps.shape == (E, K), f"taps are {tuple(taps.shape)} {taps.dtype}, wanted ({E}, K)")
    _check(past is None or past.dtype in _DTYPES and past.shape == (b, K - 1, E) and (_dense(past) or past.numel() == 0),
           f"past is wanted as ({b}, {K - 1}, {E}), its last dimension contiguous")
    for name, t, shape in (("x", x, (b, T, E)), ("B", B, (b, T, E)), ("A", A, (b, T, D)), ("alpha", alpha, (b, T, H))):
        _check(_dense(t), f"the last dimension of {name} must be contiguous")
        _input(name, t, shape, x.dtype)
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
    dy = _input("dy", dy, x.shape, x.dtype)
    for name, given, like in (("dx", dx, x), ("dB", dB, B), ("dA", dA, A), ("dalpha", dalpha, alpha)):
        _output(name, given, like.shape, x.dtype)
    dtaps = torch.empty(taps.shape, dtype=torch.float32)
    dpast = None if past is None else torch.empty(past.shape, dtype=past.dtype)
    cpukernels.slc2_backward(torch.get_num_threads(), _DTYPES[x.dtype], inputs, _rows(dy),
                             (_rows(dx), _rows(dB), _rows(dA), _rows(dalpha)), dtaps.data_ptr(), None if past is None else _any_rows(dpast))
    return dtaps, dpast


def slc2_step(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return y (B, 1, E) of one token a sequence, as `slc2_forward` does, and move past (B, K−1, E) on by it, in place."""
    _check(x.shape[1] == 1 and past is not None, "a step is of one token behind a past")
    inputs = _slc2_inputs(x, B, A, alpha, taps, past)
    y = torch.empty(x.shape, dtype=x.dtype)
    cpukernels.slc2_step(torch.get_num_threads(), _DTYPES[x.dtype], inputs, _rows(y))
    return y


# ---- rows


def _rms_norm(x: Tensor, dy: Tensor | None) -> Tensor:
    _check(x.dtype in _DTYPES and x.dim() > 0, f"x is {tuple(x.shape)} {x.dtype}")
    E = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        rows = x.reshape(-1, E)
        rows = rows if _dense(rows) else rows.contiguous()
        if dy is not None:
            dy = _input("dy", dy, x.shape, x.dtype).reshape(-1, E)
        n = rows.shape[0]
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
    _check(x.dtype in _DTYPES, f"x is {x.dtype}")
    x = x.contiguous()
    dy = None if dy is None else _input("dy", dy, x.shape, x.dtype).contiguous()
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


def _table(name: str, t: Tensor, B: int, T: int, half: int) -> Tensor:
    t = t if t.dim() == 3 else t.unsqueeze(0)
    return _input(name, t.expand(B, -1, -1), (B, T, half), torch.float32)


def _rope_norm(x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor | None) -> Tensor:
    B, T, H, D = x.shape
    _check(x.dtype in _DTYPES and _dense(x) and D % 2 == 0, f"x is {tuple(x.shape)} {x.dtype}; heads are contiguous and of even width")
    y = torch.empty(x.shape, dtype=x.dtype)
    dy = None if dy is None else _input("dy", dy, x.shape, x.dtype)
    cos, sin = _table("cos", cos, B, T, D // 2), _table("sin", sin, B, T, D // 2)
    if y.numel():
        cpukernels.rope_norm(torch.get_num_threads(), _DTYPES[x.dtype], (B, T, H, D), _heads(x), None if dy is None else _heads(dy),
                             _heads(y), _rows(cos), _rows(sin))
    return y


def rope_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the RMS norm of each head of x (B, T, H, D), turned by its position; contiguous.

    Pairs (x[d], x[d + D/2]) become (x1·cos + x2·sin, x2·cos − x1·sin). cos, sin (T, D/2) or (B, T, D/2) are float32.
    """
    return _rope_norm(x, cos, sin, None)


def rope_norm_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x, contiguous, from that of `rope_norm(x, cos, sin)`."""
    return _rope_norm(x, cos, sin, dy)
