//! The Python module. Its only caller is nanochat/kernels (cpu.py and the cpu.py of each operation), which checks
//! shapes, dtypes and strides; here they are not checked again.
//!
//! A tensor is passed as (address, stride, stride), strides in elements, the last dimension contiguous. `bf16` is the
//! dtype of all tensors that have one in common: bfloat16, or else float32. A tensor whose dtype may differ is (is
//! bf16, (address, stride, stride)). The GIL is released during the work.

use crate::adamw::{AdamW, Factors, BLOCK as ADAMW_BLOCK};
use crate::attention;
use crate::cross_entropy::{SoftcappedCrossEntropy, IGNORE};
use crate::decode_attention::{Combine, Shape as DecodeShape, Split};
use crate::math::{Bf16, Elem};
use crate::pool::{blocks, run, shares_threads, Panicked};
use crate::relu2::{Relu2, BLOCK};
use crate::rms_norm::RmsNorm;
use crate::rope_norm::RopeNorm;
use crate::simd::{best, Kernel};
use crate::slc2::{Backward, Forward, Inputs, Shape, Step, SumTaps, SUM_BLOCK};
use crate::view::{AnyView, Dtype, Heads, View};
use pyo3::exceptions::{PyIndexError, PyRuntimeError};
use pyo3::prelude::*;
use std::marker::PhantomData;

type Rows = (usize, isize, isize);
type AnyRows = (bool, Rows);

fn view((address, i, j): Rows) -> View {
    View { address, strides: [i, j] }
}

fn any_view((bf16, rows): AnyRows) -> AnyView {
    AnyView { view: view(rows), dtype: if bf16 { Dtype::Bf16 } else { Dtype::F32 } }
}

fn work<K: Kernel>(py: Python<'_>, kernel: K, items: usize, operations: usize, threads: usize) -> PyResult<()> {
    let done = py.detach(|| run(&kernel, items, operations, threads));
    done.map_err(|Panicked| PyRuntimeError::new_err("a kernel failed; its message is on stderr"))
}

/// The same call for either dtype: `with_dtype!(bf16, function(arguments))` calls `function::<T>`.
macro_rules! with_dtype {
    ($bf16:expr, $function:ident($($argument:expr),*)) => {
        if $bf16 { $function::<Bf16>($($argument),*) } else { $function::<f32>($($argument),*) }
    };
}

/// The instruction set in use, and whether the kernels run on torch's own threads.
#[pyfunction]
fn runs_on() -> (String, bool) {
    (format!("{:?}", best()), shares_threads())
}

#[pyfunction]
fn relu2(py: Python<'_>, threads: usize, bf16: bool, n: usize, x: usize, dy: Option<usize>, y: usize) -> PyResult<()> {
    fn go<T: Elem>(py: Python<'_>, threads: usize, n: usize, x: usize, dy: Option<usize>, y: usize) -> PyResult<()> {
        work(py, Relu2::<T> { x, dy, y, n, dtype: PhantomData }, blocks(n, BLOCK), n, threads)
    }
    with_dtype!(bf16, go(py, threads, n, x, dy, y))
}

/// state: gradient, mean and square, contiguous as the weights are; factors: those of `Factors`, in its order.
#[pyfunction]
fn adamw(
    py: Python<'_>,
    threads: usize,
    n: usize,
    weights: usize,
    state: [usize; 3],
    factors: [f32; 9],
) -> PyResult<()> {
    let [gradient, mean, square] = state;
    let [scale, weight, decay, square_weight, of_root, eps, of_mean, rate, kept] = factors;
    let by = Factors { scale, weight, decay, square_weight, of_root, eps, of_mean, rate, kept };
    work(py, AdamW { weights, gradient, mean, square, n, by }, blocks(n, ADAMW_BLOCK), 16 * n, threads)
}

/// `n` rows of `width` elements; strides are (row to row, 0).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn rms_norm(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    n: usize,
    width: usize,
    x: Rows,
    dy: Option<Rows>,
    y: Rows,
) -> PyResult<()> {
    fn go<T: Elem>(
        py: Python<'_>,
        threads: usize,
        n: usize,
        width: usize,
        x: View,
        dy: Option<View>,
        y: View,
    ) -> PyResult<()> {
        work(py, RmsNorm::<T> { x, dy, y, width, dtype: PhantomData }, n, 2 * n * width, threads)
    }
    with_dtype!(bf16, go(py, threads, n, width, view(x), dy.map(view), view(y)))
}

/// shape: (B, T, H, D). x, dy and y each have the stride from head to head too.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn rope_norm(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    shape: (usize, usize, usize, usize),
    x: (Rows, isize),
    dy: Option<(Rows, isize)>,
    y: (Rows, isize),
    cos: Rows,
    sin: Rows,
) -> PyResult<()> {
    fn go<E: Elem>(
        py: Python<'_>,
        threads: usize,
        (B, T, H, D): (usize, usize, usize, usize),
        [x, y]: [Heads; 2],
        dy: Option<Heads>,
        [cos, sin]: [View; 2],
    ) -> PyResult<()> {
        let kernel = RopeNorm::<E> { x, dy, y, cos, sin, T, H, D, dtype: PhantomData };
        work(py, kernel, B * T, 4 * B * T * H * D, threads)
    }
    with_dtype!(bf16, go(py, threads, shape, [heads(x), heads(y)], dy.map(heads), [view(cos), view(sin)]))
}

/// targets (n,) of int64, factors and losses (n,) of float32, contiguous. Raises IndexError, and writes nothing, where
/// a target is neither −1 nor in the vocabulary.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn softcapped_cross_entropy_(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    n: usize,
    vocab: usize,
    z: Rows,
    targets: usize,
    factors: Option<usize>,
    losses: usize,
    grad: bool,
) -> PyResult<()> {
    // SAFETY: the caller gives n targets
    let all = unsafe { std::slice::from_raw_parts(targets as *const i64, n) };
    if let Some(wrong) = all.iter().find(|&&target| target != IGNORE && !(0..vocab as i64).contains(&target)) {
        return Err(PyIndexError::new_err(format!("target {wrong} is neither −1 nor one of the {vocab} tokens")));
    }
    fn go<T: Elem>(
        py: Python<'_>,
        threads: usize,
        n: usize,
        vocab: usize,
        z: View,
        [targets, losses]: [usize; 2],
        factors: Option<usize>,
        grad: bool,
    ) -> PyResult<()> {
        let kernel = SoftcappedCrossEntropy::<T> { z, targets, factors, losses, vocab, grad, dtype: PhantomData };
        work(py, kernel, n, 16 * n * vocab, threads)
    }
    with_dtype!(bf16, go(py, threads, n, vocab, view(z), [targets, losses], factors, grad))
}

/// (B, T, H, D, K); x, B, A, alpha; taps (E, K); past
type Slc2 = ((usize, usize, usize, usize, usize), Rows, Rows, Rows, Rows, AnyRows, Option<AnyRows>);

/// taps (E, K) as rows of time (K, E) in float32.
unsafe fn by_time<T: Elem>((address, by_row, by_tap): Rows, E: usize, rows: &mut [f32]) {
    for (j, row) in rows.chunks_exact_mut(E).enumerate() {
        let first = (address as *const T).offset(by_tap * j as isize);
        for (e, to) in row.iter_mut().enumerate() {
            *to = (*first.offset(by_row * e as isize)).get();
        }
    }
}

/// The number of sequences, the taps as rows of time, and the inputs of the kernels, which must not outlive the taps.
fn slc2_inputs((shape, x, b, a, alpha, (taps_bf16, taps), past): Slc2) -> (usize, Vec<f32>, Inputs) {
    let (sequences, T, H, D, K) = shape;
    let E = H * D;
    let mut rows = vec![0.0f32; K * E];
    // SAFETY: the caller gives (E, K) of this dtype
    unsafe {
        if taps_bf16 {
            by_time::<Bf16>(taps, E, &mut rows)
        } else {
            by_time::<f32>(taps, E, &mut rows)
        }
    }
    let inputs = Inputs {
        shape: Shape { T, H, D, K },
        x: view(x),
        B: view(b),
        A: view(a),
        alpha: view(alpha),
        taps: rows.as_ptr() as usize,
        past: past.map(any_view),
    };
    (sequences, rows, inputs)
}

#[pyfunction]
fn slc2_forward(py: Python<'_>, threads: usize, bf16: bool, inputs: Slc2, y: Rows) -> PyResult<()> {
    fn go<T: Elem>(py: Python<'_>, threads: usize, sequences: usize, inputs: Inputs, y: View) -> PyResult<()> {
        let Shape { T: length, H, D, .. } = inputs.shape;
        let kernel = Forward::<T> { inputs, y, dtype: PhantomData };
        work(py, kernel, sequences * inputs.shape.chunks(), 16 * sequences * length * H * D, threads)
    }
    let (sequences, _taps, inputs) = slc2_inputs(inputs);
    with_dtype!(bf16, go(py, threads, sequences, inputs, view(y)))
}

/// The decode step: T is 1; past is required and updated in place.
#[pyfunction]
fn slc2_step(py: Python<'_>, threads: usize, bf16: bool, inputs: Slc2, y: Rows) -> PyResult<()> {
    fn go<T: Elem>(py: Python<'_>, threads: usize, sequences: usize, inputs: Inputs, y: View) -> PyResult<()> {
        let operations = 16 * sequences * inputs.shape.H * inputs.shape.D;
        work(py, Step::<T> { inputs, y, dtype: PhantomData }, sequences, operations, threads)
    }
    let (sequences, _taps, inputs) = slc2_inputs(inputs);
    with_dtype!(bf16, go(py, threads, sequences, inputs, view(y)))
}

/// gradients: dx, dB, dA, dalpha. dtaps: (E, K) of float32, contiguous.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn slc2_backward(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    inputs: Slc2,
    dy: Rows,
    gradients: (Rows, Rows, Rows, Rows),
    dtaps: usize,
    dpast: Option<AnyRows>,
) -> PyResult<()> {
    fn go<T: Elem>(
        py: Python<'_>,
        threads: usize,
        sequences: usize,
        inputs: Inputs,
        dy: View,
        [dx, dB, dA, dalpha]: [View; 4],
        dtaps: usize,
        dpast: Option<AnyView>,
    ) -> PyResult<()> {
        let Shape { T: length, H, D, K } = inputs.shape;
        let (E, count) = (H * D, sequences * inputs.shape.chunks());
        let mut parts = Vec::<f32>::with_capacity(count * K * E); // the kernel writes all of it
        let at = parts.as_mut_ptr() as usize;
        let kernel = Backward::<T> { inputs, dy, dx, dB, dA, dalpha, dtaps: at, dpast, dtype: PhantomData };
        work(py, kernel, count, 32 * sequences * length * E, threads)?;
        let sums = SumTaps { parts: at, count, E, K, dtaps };
        work(py, sums, blocks(K * E, SUM_BLOCK), count * K * E, threads)
    }
    let (sequences, _taps, inputs) = slc2_inputs(inputs);
    let gradients = [gradients.0, gradients.1, gradients.2, gradients.3].map(view);
    with_dtype!(bf16, go(py, threads, sequences, inputs, view(dy), gradients, dtaps, dpast.map(any_view)))
}

/// (B, T, H, G, D, window)
type Attention = (usize, usize, usize, usize, usize, usize);

fn heads((rows, stride): (Rows, isize)) -> Heads {
    Heads { tokens: view(rows), stride }
}

fn attention_shape((B, T, H, G, D, window): Attention) -> (usize, attention::Shape) {
    (B, attention::Shape { T, H, G, D, window })
}

/// tensors: q, k, v and y, each with the stride from head to head too; lse: (B, H, T) in float32.
#[pyfunction]
fn attention_forward(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    shape: Attention,
    tensors: [(Rows, isize); 4],
    lse: Option<usize>,
) -> PyResult<()> {
    fn go<T: Elem>(
        py: Python<'_>,
        threads: usize,
        (B, shape): (usize, attention::Shape),
        [q, k, v, y]: [Heads; 4],
        lse: Option<usize>,
    ) -> PyResult<()> {
        let kernel = attention::Forward::<T> { shape, q, k, v, y, lse, dtype: PhantomData };
        work(py, kernel, B * shape.H * shape.blocks(), B * shape.H * shape.operations(), threads)
    }
    with_dtype!(bf16, go(py, threads, attention_shape(shape), tensors.map(heads), lse))
}

/// tensors: q, k, v, y, dy, dq, dk and dv.
#[pyfunction]
fn attention_backward(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    shape: Attention,
    tensors: [(Rows, isize); 8],
    lse: usize,
) -> PyResult<()> {
    fn go<T: Elem>(
        py: Python<'_>,
        threads: usize,
        (B, shape): (usize, attention::Shape),
        [q, k, v, y, dy, dq, dk, dv]: [Heads; 8],
        lse: usize,
    ) -> PyResult<()> {
        let kernel = attention::Backward::<T> { shape, q, k, v, y, dy, lse, dq, dk, dv, dtype: PhantomData };
        work(py, kernel, B * shape.G, B * shape.H * shape.operations(), threads)
    }
    with_dtype!(bf16, go(py, threads, attention_shape(shape), tensors.map(heads), lse))
}

/// heads: (H, G, D); tensors: q, k, v and y; ranges: of each row, the first key that counts and the one after the last.
#[pyfunction]
fn decode_attention(
    py: Python<'_>,
    threads: usize,
    bf16: bool,
    heads_of: (usize, usize, usize),
    tensors: [(Rows, isize); 4],
    ranges: Vec<(usize, usize)>,
) -> PyResult<()> {
    fn go<T: Elem>(py: Python<'_>, threads: usize, shape: DecodeShape, [q, k, v, y]: [Heads; 4]) -> PyResult<()> {
        let (B, H, G, chunks) = (shape.ranges.len(), shape.H, shape.G, shape.max_chunks());
        let size = B * chunks * H * shape.part();
        let mut scratch = Vec::<f32>::with_capacity(size); // nothing is read before it is written
        let parts = scratch.as_mut_ptr() as usize;
        let first = Split::<T> { shape: &shape, q, k, v, parts, dtype: PhantomData };
        work(py, first, B * G * chunks, 4 * shape.keys() * H * shape.D, threads)?;
        let second = Combine::<T> { shape: &shape, parts, y, dtype: PhantomData };
        work(py, second, B * H, size, threads)
    }
    let (H, G, D) = heads_of;
    let ranges = ranges.into_iter().map(|(start, end)| start..end).collect();
    with_dtype!(bf16, go(py, threads, DecodeShape { H, G, D, ranges }, tensors.map(heads)))
}

#[pymodule]
fn cpukernels(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(runs_on, module)?)?;
    module.add_function(wrap_pyfunction!(adamw, module)?)?;
    module.add_function(wrap_pyfunction!(attention_forward, module)?)?;
    module.add_function(wrap_pyfunction!(decode_attention, module)?)?;
    module.add_function(wrap_pyfunction!(attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(relu2, module)?)?;
    module.add_function(wrap_pyfunction!(rms_norm, module)?)?;
    module.add_function(wrap_pyfunction!(rope_norm, module)?)?;
    module.add_function(wrap_pyfunction!(softcapped_cross_entropy_, module)?)?;
    module.add_function(wrap_pyfunction!(slc2_forward, module)?)?;
    module.add_function(wrap_pyfunction!(slc2_step, module)?)?;
    module.add_function(wrap_pyfunction!(slc2_backward, module)?)
}
