"""Time each fused operation of the model separately: ours, its plain twin, torch.compile of the twin, and the usual
unfused way.

    python -m bench.kernels --depth=4 --device-batch-size=16 --max-seq-len=256
    python -m bench.kernels --depth=20 --device-batch-size=32 --max-seq-len=2048 --vocab-size=65536      # on a GPU
    python -m bench.kernels --peer=../another-checkout              # times the whole model of that checkout too
    python -m bench.kernels --only=slc2,step --dtype=float32 --compile=yes

Forward is timed as in training, with what backward needs saved, and backward alone. The columns:

- "of the copy": the bytes that must move at least (every input read once, every output written once) over the time,
  against the copy bandwidth measured in the same run. What fits into a CPU's caches can be faster than a copy.
- "of the product": FLOPs over the time, against a large matrix product.
- "error": ‖out − exact‖ / ‖exact‖ for one row of fresh random inputs, exact being the twin in float64; for backward
  that of the worst gradient.
- "memory": bytes alive at the peak that were not alive before.

On a GPU the calls alternate between several sets of inputs, so that its cache holds none of them, and the host's time
is not counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from bench import head, peer
from bench.measure import (
    command_line,
    copy_bandwidth,
    interleaved,
    interleaved_kernels,
    json_flag,
    matmul_flops,
    median,
    nbytes,
    peak_growth,
    provenance,
    provenance_line,
    random_batch,
    relative_error,
    si,
    table,
    write_results,
)
from bench.train import our_case, twin_case
from nanochat.cli import DEPTH, ROUNDS, ROW_TOKENS, ROWS, Range, flag, parse, run_main
from nanochat.distributed import Ranks, close_ranks, compute_dtype, init_ranks
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.kernels import attention, cpu, decode_attention, relu2, rms_norm, rope_norm, slc2
from nanochat.layers import ALIGNED, Linear, project
from nanochat.optim import newton_schulz
from nanochat.positions import rope_table

TWIN, COMPILED, PLAIN, HEAD = "twin, eager", "twin, torch.compile", "ours, plain torch", "head+loss"
ATTENTION_ROWS = 8  # few, since the twin holds all scores in float32
ROTATED = 1 << 28  # bytes of all sets of inputs on a GPU: several times its cache
Outputs = Tensor | tuple[Tensor, ...]


@dataclass
class Config:
    """Flags of bench.kernels."""

    depth: int = flag(4, "layers of the model whose shapes are taken", within=DEPTH)
    device_batch_size: int = flag(16, "rows", within=ROWS)
    max_seq_len: int = flag(256, "tokens in a row; keys that a decode step sees", within=ROW_TOKENS)
    vocab_size: int = flag(2048, "tokens the model knows", within=Range(1, 1 << 24))
    decode_rows: int = flag(64, "rows of a decode step", within=ROWS)
    dtype: str = flag("auto", "bfloat16, float32, or auto: what the model computes in on this device")
    rounds: int = flag(7, "measurements of each way; the median is shown", within=ROUNDS)
    compile: str = flag("auto", "time torch.compile of the twins too: yes, no, or auto (on GPUs)")
    only: str = flag("", "words that the names of the wanted operations contain, separated by commas; unset means all")
    peer: str = flag("", "a checkout with a nanochat.gpt: its whole model is timed beside ours and the twin")
    threads: int = flag(0, "CPU threads; 0 leaves it to torch", within=Range(0, 4096))
    device: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    json: str = json_flag()


@dataclass(frozen=True)
class Shape:
    """What inputs are made from.

    Attributes:
        model: config of the model whose shapes are taken
        B, T: rows and tokens in a row
        decode_rows: rows of a decode step
        dtype, device: of the inputs
    """

    model: GPTConfig
    B: int
    T: int
    decode_rows: int
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """Query heads, key heads and their width."""
        return self.model.n_head, self.model.n_kv_head, self.model.n_embd // self.model.n_head

    def random(self, *shape: int) -> Tensor:
        """Return random numbers on the device."""
        return torch.randn(shape, device=self.device).to(self.dtype)


@dataclass
class Operation:
    """One operation, implemented in several ways; one of them is TWIN, the definition.

    Attributes:
        name: as shown in the table
        rows: rows of a timed call
        inputs: returns fresh random inputs for so many rows
        ways: implementations by name
        bytes: that forward and backward must move at least, for all rows
        flops: of forward and backward, for all rows
        backward: whether backward is timed too
        compiles: whether torch.compile of the twin is timed too
    """

    name: str
    rows: int
    inputs: Callable[[int], tuple[Tensor, ...]]
    ways: dict[str, Callable[..., Outputs]]
    bytes: tuple[int, int] = (0, 0)
    flops: tuple[float, float] = (0, 0)
    backward: bool = True
    compiles: bool = True


# --- bytes and FLOPs --------------------------------------------------------------------------------------------------

def slc2_bytes(tokens: int, E: int, H: int, size: int) -> tuple[int, int]:
    """Return the bytes that the core of SLC2 must move forward and backward.

    Forward reads x, B, A and alpha and writes y; backward reads dy and the same inputs and writes their gradients. The
    taps are negligible. d20 in bfloat16: 7,956 and 13,352 a token.
    """
    small = E // H + H
    return tokens * size * (3 * E + small), tokens * size * (5 * E + 2 * small)


def slc2_step_bytes(rows: int, E: int, H: int, K: int, size: int) -> int:
    """Return the bytes of a decode step of the core: inputs, output, K−1 past rows read and written, and taps."""
    return slc2_bytes(rows, E, H, size)[0] + size * (2 * rows * (K - 1) * E + E * K)


def elementwise_bytes(count: int, size: int) -> tuple[int, int]:
    """Return the bytes of a function of `count` numbers: x read and y written; dy and x read and dx written."""
    return 2 * count * size, 3 * count * size


def product_flops(tokens: int, fan_in: int, fan_out: int) -> tuple[float, float]:
    """Return the FLOPs of a matrix product forward, and backward, which is two products."""
    return 2.0 * tokens * fan_in * fan_out, 4.0 * tokens * fan_in * fan_out


def newton_schulz_flops(count: int, rows: int, columns: int, steps: int = 5) -> float:
    """Return the FLOPs of Muon's plain iteration on `count` matrices."""
    n, m = sorted((rows, columns))
    return count * steps * (4.0 * n * n * m + 2.0 * n ** 3)


# --- ways -------------------------------------------------------------------------------------------------------------

def ours(fn: Callable[..., Outputs], device: torch.device, on_cuda: str = "") -> dict[str, Callable[..., Outputs]]:
    """Return our function under the name of each backend that runs here, and in plain PyTorch.

    Args:
        fn: the function
        device: of the inputs
        on_cuda: name of its backend on a GPU; empty where it has none
    """
    on_cpu = "native" if device.type == "cpu" and cpu.cpukernels is not None else ""
    backend = on_cuda if device.type == "cuda" else on_cpu
    return {**({f"ours, {backend}": fn} if backend else {}), PLAIN: fn}


@contextmanager
def through(how: str) -> Iterator[None]:
    """Use plain PyTorch within the block where `how` is PLAIN; change nothing otherwise."""
    if how != PLAIN:
        yield
        return
    with patch.object(cpu, "cpukernels", None), patch.object(slc2, "uses_triton", lambda *_: False):
        yield


# --- operations -------------------------------------------------------------------------------------------------------

def columns(z: Tensor, E: int, H: int) -> list[Tensor]:
    """Return x, B, A and alpha, columns of the joined projection z."""
    return slc2.split_columns(z, H, E // H)[:4]


def joined_width(E: int, H: int) -> int:
    """Return the width of z, rounded up to a multiple of ALIGNED."""
    return -(-(2 * E + E // H + H) // ALIGNED) * ALIGNED


def unfused_core(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor) -> Tensor:
    """The core as such blocks are usually written: gate by torch, nn.Conv1d's convolution, output gate by torch."""
    E, K = taps.shape
    u = F.silu((F.silu(alpha).unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2)) * x
    c = F.conv1d(u.transpose(1, 2), taps.unsqueeze(1), padding=K - 1, groups=E)[..., :x.shape[1]]
    return B * F.silu(c.transpose(1, 2))


def dao_core(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor) -> Tensor:
    """The same with the convolution of causal-conv1d, which includes the silu that follows."""
    from causal_conv1d import causal_conv1d_fn
    u = F.silu((F.silu(alpha).unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2)) * x
    return B * causal_conv1d_fn(u.transpose(1, 2), taps, activation="silu").transpose(1, 2)


def core_operation(shape: Shape) -> Operation:
    """Gate, convolution and output gate of SLC2."""
    E, H, K = shape.model.n_embd, shape.model.n_head, shape.model.n_kernel

    def inputs(rows: int) -> tuple[Tensor, ...]:
        return shape.random(rows, shape.T, joined_width(E, H)), shape.random(E, K)
    ways: dict[str, Callable[..., Outputs]] = ours(partial(slc2.slc2_mix, n_head=H, head_width=E // H), shape.device,
                                                   "Triton")
    plain = {TWIN: slc2.slc2_core_twin, "unfused, F.conv1d": unfused_core}
    if shape.device.type == "cuda" and _installed("causal_conv1d"):
        plain["unfused, causal-conv1d"] = dao_core
    ways |= {how: lambda z, taps, way=way: way(*columns(z, E, H), taps) for how, way in plain.items()}
    return Operation("slc2 core", shape.B, inputs, ways, slc2_bytes(shape.B * shape.T, E, H, shape.size))


def step_operation(shape: Shape) -> Operation:
    """The decode step of the core, with its update of the past."""
    E, H, K, rows = shape.model.n_embd, shape.model.n_head, shape.model.n_kernel, shape.decode_rows

    def inputs(rows: int) -> tuple[Tensor, ...]:
        return shape.random(rows, 1, joined_width(E, H)), shape.random(E, K), shape.random(rows, K - 1, E)

    def way(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda z, taps, past: step(*columns(z, E, H), taps, past)
    return Operation("slc2 step", rows, inputs,
                     {**ours(way(slc2.slc2_step), shape.device, "Triton"), TWIN: way(slc2.slc2_step_twin)},
                     (slc2_step_bytes(rows, E, H, K, shape.size), 0), backward=False)


def elementwise_operation(shape: Shape, name: str, fn: Callable[..., Tensor], twin: Callable[..., Tensor],
                          width: int) -> Operation:
    """A function of rows of `width` numbers each."""
    return Operation(name, shape.B, lambda rows: (shape.random(rows, shape.T, width),),
                     {**ours(fn, shape.device), TWIN: twin},
                     elementwise_bytes(shape.B * shape.T * width, shape.size))


def relu2_operation(shape: Shape) -> Operation:
    """The MLP's activation."""
    return elementwise_operation(shape, "relu²", relu2.relu_squared, relu2.relu_squared_twin, 4 * shape.model.n_embd)


def rms_norm_operation(shape: Shape) -> Operation:
    """The norm before each mixer and each MLP."""
    return elementwise_operation(shape, "rms_norm", rms_norm.rms_norm, rms_norm.rms_norm_twin, shape.model.n_embd)


def rope_norm_operation(shape: Shape) -> Operation:
    """Rotary positions and the norm of queries; keys are alike."""
    H, D = shape.model.n_head, shape.model.n_embd // shape.model.n_head
    rope = rope_table(shape.T, D, shape.device)

    def way(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: fn(x, tuple(table.to(_wide(x, torch.float32)) for table in rope))
    return Operation("rope_norm", shape.B, lambda rows: (shape.random(rows, shape.T, H, D),),
                     {**ours(way(rope_norm.rope_norm), shape.device), TWIN: way(rope_norm.rope_norm_twin)},
                     elementwise_bytes(shape.B * shape.T * H * D, shape.size))


def attention_operation(shape: Shape) -> Operation:
    """Causal attention of whole rows, at most ATTENTION_ROWS. Backward has five products where forward has two."""
    H, G, D = shape.head_sizes
    rows = min(shape.B, ATTENTION_ROWS)
    flops = 2.0 * rows * H * D * shape.T * shape.T

    def inputs(rows: int) -> tuple[Tensor, ...]:
        return shape.random(rows, shape.T, H, D), shape.random(rows, shape.T, G, D), shape.random(rows, shape.T, G, D)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                              enable_gqa=H != G).transpose(1, 2)
    mine, q = partial(attention.attend, causal=True), inputs(1)[0].requires_grad_()
    ways: dict[str, Callable[..., Outputs]] = {f"ours, {attention.path(q)}": mine}
    with through(PLAIN):
        if f"ours, {attention.path(q)}" not in ways:
            ways[PLAIN] = mine
    if f"ours, {attention.PYTORCH}" not in ways:
        ways[attention.PYTORCH] = torchs
    return Operation("attention", rows, inputs, {**ways, TWIN: partial(attention.attend_twin, causal=True)},
                     flops=(flops, 2.5 * flops))


def decode_attention_operation(shape: Shape) -> Operation:
    """Rotary positions, norms and attention of one new token a row, at the end of a KV cache of max_seq_len tokens."""
    (H, G, D), rows = shape.head_sizes, shape.decode_rows

    def inputs(rows: int) -> tuple[Tensor, ...]:
        rope = [table[-1:].expand(rows, 1, -1) for table in rope_table(shape.T, D, shape.device)]
        new = [shape.random(rows, 1, heads, D) for heads in (H, G, G)]
        cache = [shape.random(rows, shape.T, G, D) for _ in range(2)]
        return *new, *rope, *cache, torch.full((rows,), shape.T - 1, device=shape.device)

    def way(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, cos, sin, keys, values, positions: fn(q, k, v, (cos, sin), keys, values, positions)

    def in_steps(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
                 positions: Tensor) -> Tensor:
        keys[:, -1:], values[:, -1:] = rope_norm.rope_norm(k, rope), v
        return decode_attention.decode_attention(rope_norm.rope_norm(q, rope), keys, values)
    mine = "ours, Triton" if shape.device.type == "cuda" else PLAIN
    ways = {mine: decode_attention.append_and_attend, "ours, without a buffer": in_steps,
            TWIN: decode_attention.append_and_attend_twin}
    return Operation("decode attention", rows, inputs, {how: way(fn) for how, fn in ways.items()},
                     (shape.size * rows * D * (2 * H + 2 * shape.T * G), 0), backward=False)


def projections_operation(shape: Shape) -> Operation:
    """The four projections before the core, which have one input, from float32 weights."""
    E, H = shape.model.n_embd, shape.model.n_head
    widths = (E, E, E // H, H)
    with torch.device(shape.device):
        layers = torch.nn.ModuleList(Linear(E, width) for width in widths)
    layers.forward = lambda h: project(h, *layers)
    weights = [layer.weight.detach() for layer in layers]

    def joined(h: Tensor, *weights: Tensor) -> Outputs:
        return functional_call(layers, {f"{i}.weight": weight for i, weight in enumerate(weights)}, h)
    return Operation("projections", shape.B, lambda rows: (shape.random(rows, shape.T, E), *weights),
                     {"ours, one product": joined,
                      TWIN: lambda h, *weights: tuple(F.linear(h, weight.to(h.dtype)) for weight in weights)},
                     flops=product_flops(shape.B * shape.T, E, sum(widths)))


def muon_operation(shape: Shape) -> Operation:
    """Muon's iteration on the first matrix of every MLP."""
    count, E = shape.model.n_layer, shape.model.n_embd

    def one_by_one(x: Tensor) -> Outputs:
        return tuple(newton_schulz(matrix.unsqueeze(0), _wide(x, shape.dtype)) for matrix in x)

    def plain(x: Tensor) -> Outputs:
        """The formula, one matrix after the other."""
        found = []
        for matrix in x:
            y = matrix.to(_wide(x, shape.dtype)).T
            y = y / (y.norm() + 1e-7)
            for _ in range(5):
                gram = y @ y.T
                y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
            found.append(y.T.unsqueeze(0))
        return tuple(found)
    return Operation("newton-schulz", count, lambda rows: (torch.randn(rows, 4 * E, E, device=shape.device),),
                     {"ours, batched": lambda x: newton_schulz(x, _wide(x, shape.dtype)),
                      "ours, one by one": one_by_one, TWIN: plain},
                     flops=(newton_schulz_flops(count, 4 * E, E), 0), backward=False, compiles=False)


def _wide(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return dtype, or float64 where x is float64."""
    return x.dtype if x.dtype == torch.float64 else dtype


def _installed(package: str) -> bool:
    from importlib.util import find_spec
    return find_spec(package) is not None


OPERATIONS = {"slc2 core": core_operation, "slc2 step": step_operation, "attention": attention_operation,
              "decode attention": decode_attention_operation,
              "projections": projections_operation, "rope_norm": rope_norm_operation, "rms_norm": rms_norm_operation,
              "relu²": relu2_operation, "newton-schulz": muon_operation}
NAMES = (*OPERATIONS, HEAD)


# --- measuring --------------------------------------------------------------------------------------------------------

def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def errors(operation: Operation) -> dict[str, tuple[float, float | None]]:
    """Return for each way the worst error of an output and of a gradient, against the twin in float64 on one row."""
    given, slopes = operation.inputs(1), []

    def of(way: Callable[..., Outputs], exactly: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        mine = [x.detach().to(torch.float64 if exactly and x.is_floating_point() else x.dtype, copy=True)
                for x in given]
        wanted = [x.requires_grad_() for x in mine if operation.backward and x.is_floating_point()]
        outputs = as_tuple(way(*mine))
        if not wanted:
            return list(outputs), []
        # made for the first way, in the dtype of its output
        slopes[:] = slopes or [torch.randn_like(y) for y in outputs]
        return list(outputs), list(torch.autograd.grad(outputs, wanted,
                                                       [dy.to(y.dtype) for dy, y in zip(slopes, outputs)]))
    got = {}
    for how, way in operation.ways.items():
        if how != COMPILED:
            with through(how):
                got[how] = of(way)
    exact = of(operation.ways[TWIN], exactly=True)
    worst = {how: [max((relative_error(a, b) for a, b in zip(*pair)), default=None) for pair in zip(both, exact)]
             for how, both in got.items()}
    return {how: (forward, backward) for how, (forward, backward) in worst.items()}


def leaves(operation: Operation) -> tuple[Tensor, ...]:
    """Return fresh inputs of all rows, which require gradients where backward is timed."""
    return tuple(x.requires_grad_() if operation.backward and x.is_floating_point() else x
                 for x in operation.inputs(operation.rows))


def within(how: str, fn: Callable[[int], object]) -> Callable[[int], object]:
    """Return fn, run with the backend that `how` names."""
    def call(number: int) -> object:
        with through(how):
            return fn(number)
    return call if how == PLAIN else fn


def timed(operation: Operation, shape: Shape,
          rounds: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, int | None]]]:
    """Return by pass and way the seconds of each round, and the bytes alive at the peak that were not alive before."""
    first = leaves(operation)
    sets = 1 if shape.device.type == "cpu" else max(2, min(64, -(-ROTATED // nbytes(first))))
    given = [first, *(leaves(operation) for _ in range(sets - 1))]
    forward = {how: within(how, lambda i, way=way: way(*given[i])) for how, way in operation.ways.items()}
    seconds = {"forward": interleaved_kernels(forward, shape.device, rounds, sets)}
    memory = {"forward": {how: peak_growth(lambda fn=fn: fn(0), shape.device) for how, fn in forward.items()}}
    if operation.backward:
        made = {how: [as_tuple(fn(i)) for i in range(sets)] for how, fn in forward.items()}
        slopes = [[torch.randn_like(y) for y in outputs] for outputs in made[TWIN]]
        wanted = [[x for x in one if x.requires_grad] for one in given]

        def gradients(i: int, outputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs[i], wanted[i], [dy.to(y.dtype) for dy, y in zip(slopes[i], outputs[i])],
                                       retain_graph=True)
        backward = {how: within(how, partial(gradients, outputs=outputs)) for how, outputs in made.items()}
        seconds["backward"] = interleaved_kernels(backward, shape.device, rounds, sets)
        memory["backward"] = {how: peak_growth(lambda fn=fn: fn(0), shape.device) for how, fn in backward.items()}
    return seconds, memory


def compare(operation: Operation, shape: Shape, rounds: int, compiled: bool,
            ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Return a table row for each way and pass."""
    wrong, rows = errors(operation), []
    if compiled and operation.compiles:
        twin = operation.ways[TWIN]
        torch._dynamo.reset()  # torch stops compiling a function after a number of variants
        rival = torch.compile(lambda *inputs: twin(*inputs), dynamic=False)
        try:
            rival(*leaves(operation))
            operation.ways[COMPILED] = rival
        except Exception as error:  # the compiler may fail in any way; the other results still count
            rows.append({"operation": operation.name, "pass": "forward", "how": COMPILED,
                         "failed": f"{type(error).__name__}"})
    seconds, memory = timed(operation, shape, rounds)
    for number, way in enumerate(seconds):
        least, flops = operation.bytes[number], operation.flops[number]
        for how, times in seconds[way].items():
            took = median(times)
            unseen = how == COMPILED and shape.device.type == "cpu"  # the memory of compiled code is not counted
            rows.append({"operation": operation.name, "pass": way, "how": how, "seconds": took, "all_seconds": times,
                         "vs_twin": median(b / a for a, b in zip(times, seconds[way][TWIN])), "bytes": least,
                         "flops": flops,
                         "of_the_copy": least / took / ceilings["copy_bandwidth"] if least else None,
                         "of_the_product": flops / took / ceilings["matmul_flops"] if flops else None,
                         "error": wrong[how][number] if how in wrong else None,
                         "memory": None if unseen else memory[way][how]})
    return rows


def head_rows(shape: Shape, rounds: int, compiled: bool, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Return the rows of the head and the loss, as bench.head compares them; bench.head itself shows more."""
    given = head.inputs(shape.B * shape.T, shape.model.n_embd, shape.model.vocab_size, shape.dtype, shape.device)
    ways: dict[str, head.Loss] = {"ours": head.head_loss, TWIN: head.head_loss_twin}
    if compiled:
        ways[COMPILED] = torch.compile(head.head_loss_twin, dynamic=False)
    liger, ceiling = head.liger(shape.device), ceilings["matmul_flops"]
    rows = head.compare("training", ways if isinstance(liger, str) else {**ways, head.LIGER: liger}, given, rounds,
                        ceiling)
    rows += head.compare("evaluation", ways, given, rounds, ceiling)
    return [{"operation": HEAD, "bytes": 0, **row} for row in rows]


def model_rows(shape: Shape, rounds: int, compiled: bool, path: str) -> list[dict[str, Any]]:
    """Return the rows of the whole model: the losses of an evaluation, and forward and backward of a training step.

    Compared are ours, the twin, and the checkout at `path`.
    """
    ranks, batch = Ranks(0, 0, 1, shape.device), random_batch(shape.B, shape.T, shape.model.vocab_size, shape.device)
    mine = our_case("ours", shape.model, batch, ranks, shape.dtype, compiled)
    twin = twin_case(shape.model, batch, ranks)

    @torch.no_grad()
    def losses(model: torch.nn.Module, *how: str) -> None:
        model(*batch, *how)
    work = {"forward": {"ours": lambda: losses(mine.model, "none"), TWIN: lambda: losses(twin.model)},
            "pass": {"ours": mine.forward_backward, TWIN: twin.forward_backward}}
    rows = []
    for what, ways in work.items():
        seconds = interleaved(ways, shape.device, rounds)
        told = peer.run_peer(path, what, shape.model, shape.B, shape.T, steps=rounds, warmup=2,
                             device=shape.device.type)
        for found in told:
            if "error" in found:
                rows.append({"operation": "model", "pass": what, "how": f"peer {found['peer']}, {found['how']}",
                             "failed": found["error"]})
            else:
                seconds[f"peer {found['peer']}, {found['how']}"] = found["seconds"]
        rows += [{"operation": "model", "pass": what, "how": how, "seconds": median(times), "all_seconds": times,
                  "vs_twin": median(seconds[TWIN]) / median(times)} for how, times in seconds.items()]
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """Return the table of all rows."""
    def cell(row: dict[str, Any], key: str, form: Callable[[float], str]) -> str:
        return "-" if row.get(key) is None else form(row[key])
    return table(["operation", "pass", "how", "ms", "vs twin", "of the copy", "of the product", "error", "memory"],
                 [[row["operation"], row["pass"], row["how"],
                   f"{1000 * row['seconds']:.3f}" if "seconds" in row else row.get("failed", "out of memory"),
                   cell(row, "vs_twin", lambda r: f"{r:.2f}×"),
                   cell(row, "of_the_copy", lambda r: f"{100 * r:.0f}%"),
                   cell(row, "of_the_product", lambda r: f"{100 * r:.0f}%"),
                   cell(row, "error", lambda e: f"{e:.1e}"), cell(row, "memory", lambda b: si(b) + "B")]
                   for row in rows], (0, 1, 2))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say.

    Raises:
        UserError: a flag is wrong, or an error of ours is far beyond the twin's
    """
    config = parse(Config, argv, __doc__)
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    if config.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"--dtype is bfloat16, float32 or auto, not {config.dtype!r}")
    if min(config.device_batch_size, config.max_seq_len, config.decode_rows, config.rounds) < 1:
        raise UserError("--device-batch-size, --max-seq-len, --decode-rows and --rounds must be at least 1")
    words = [word.strip() for word in config.only.split(",") if word.strip()]
    names = [name for name in NAMES if not words or any(word in name for word in words)]
    if not names:
        raise UserError(f"--only={config.only} names none of: {', '.join(NAMES)}")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    model = GPTConfig.from_depth(config.depth, sequence_len=config.max_seq_len, vocab_size=config.vocab_size)
    device = init_ranks(config.device).device
    try:
        about = provenance(command_line("bench.kernels", argv))
        dtype = compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        shape = Shape(model, config.device_batch_size, config.max_seq_len, config.decode_rows, dtype, device)
        compiled = config.compile == "yes" or config.compile == "auto" and device.type == "cuda"
        rows, ceilings = measured(shape, names, config.rounds, compiled)
        if config.peer:
            rows += model_rows(shape, config.rounds, compiled, config.peer)
    finally:
        close_ranks()
    copied, product = ceilings["copy_bandwidth"] / 1e9, si(ceilings["matmul_flops"])
    print(f"{provenance_line(about)}\nshapes of d{config.depth}, {shape.B} rows of {shape.T} tokens, "
          f"decoding {shape.decode_rows} rows, {dtype}, on {device}; "
          f"copy {copied:,.1f} GB/s, product {product}FLOP/s\n\n{shown(rows)}", flush=True)
    write_results(config.json, about, config, rows, **ceilings)
    if bad := too_far(rows, dtype):
        raise UserError(f"these compute wrong numbers, so their times mean nothing: {', '.join(bad)}")


def measured(shape: Shape, names: Sequence[str], rounds: int, compiled: bool, tiny: bool = False
             ) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows of these operations, and the ceilings measured in the same run.

    tiny: measure the ceilings on something small, for tests; they mean nothing then.
    """
    torch.manual_seed(0)
    if compiled:
        from torch._functorch import config
        config.donated_buffer = False  # the same backward pass runs several times
    side = 256 if tiny else 2048 if shape.device.type == "cpu" else 8192
    ceilings = {"copy_bandwidth": copy_bandwidth(shape.device, 1 << 22 if tiny else 0),
                "matmul_flops": matmul_flops(shape.device, shape.dtype, side)}
    rows = []
    for name in names:
        if name == HEAD:
            rows += head_rows(shape, rounds, compiled, ceilings)
        else:
            rows += compare(OPERATIONS[name](shape), shape, rounds, compiled, ceilings)
    return rows, ceilings


def too_far(rows: list[dict[str, Any]], dtype: torch.dtype, factor: float = 3.0) -> list[str]:
    """Return the ways of ours whose numbers are wrong.

    That is an error which is NaN, or more than `factor` times the larger of the twin's error and the rounding of dtype.
    """
    judged = [row for row in rows if row.get("error") is not None]
    twins = {(row["operation"], row["pass"]): max(row["error"], torch.finfo(dtype).eps / 4) for row in judged
             if row["how"] == TWIN}
    return [f"{row['operation']} {row['pass']}, {row['how']}" for row in judged
            if row["how"].startswith("ours") and not row["error"] <= factor * twins[row["operation"], row["pass"]]]


if __name__ == "__main__":
    run_main(main)
