//! Tensors as Python passes them: an address and strides, in elements; the last dimension is contiguous.

use crate::math::{Bf16, Elem};

/// Rows at (i, j) of a tensor (I, J, ...).
#[derive(Clone, Copy)]
pub struct View {
    pub address: usize,
    pub strides: [isize; 2],
}

impl View {
    #[inline(always)]
    fn at<T>(&self, i: usize, j: usize) -> *mut T {
        (self.address as *mut T).wrapping_offset(self.strides[0] * i as isize + self.strides[1] * j as isize)
    }

    /// # Safety
    /// The row lies inside the tensor and has this type, and nothing writes to it meanwhile.
    #[inline(always)]
    pub unsafe fn row<'a, T>(&self, i: usize, j: usize, width: usize) -> &'a [T] {
        std::slice::from_raw_parts(self.at(i, j), width)
    }

    /// # Safety
    /// The row lies inside the tensor and has this type, and nothing else reads or writes it meanwhile.
    #[inline(always)]
    pub unsafe fn row_mut<'a, T>(&self, i: usize, j: usize, width: usize) -> &'a mut [T] {
        std::slice::from_raw_parts_mut(self.at(i, j), width)
    }
}

/// Heads at (b, t): a tensor (B, T, H, D), `stride` elements from one head to the next.
#[derive(Clone, Copy)]
pub struct Heads {
    pub tokens: View,
    pub stride: isize,
}

impl Heads {
    #[inline(always)]
    pub fn head<T>(&self, h: usize) -> View {
        let address = (self.tokens.address as *mut T).wrapping_offset(self.stride * h as isize) as usize;
        View { address, strides: self.tokens.strides }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dtype {
    F32,
    Bf16,
}

/// A view whose dtype may differ from that of the other tensors.
#[derive(Clone, Copy)]
pub struct AnyView {
    pub view: View,
    pub dtype: Dtype,
}

impl AnyView {
    /// # Safety
    /// As for `View::row`.
    #[inline(always)]
    pub unsafe fn read(&self, i: usize, j: usize, into: &mut [f32]) {
        match self.dtype {
            Dtype::F32 => copy::<f32, f32>(self.view.row(i, j, into.len()), into),
            Dtype::Bf16 => copy::<Bf16, f32>(self.view.row(i, j, into.len()), into),
        }
    }

    /// # Safety
    /// As for `View::row_mut`.
    #[inline(always)]
    pub unsafe fn write(&self, i: usize, j: usize, from: &[f32]) {
        match self.dtype {
            Dtype::F32 => copy::<f32, f32>(from, self.view.row_mut(i, j, from.len())),
            Dtype::Bf16 => copy::<f32, Bf16>(from, self.view.row_mut(i, j, from.len())),
        }
    }
}

#[inline(always)]
pub fn copy<A: Elem, B: Elem>(from: &[A], to: &mut [B]) {
    for (a, b) in from.iter().zip(to) {
        *b = B::put(a.get());
    }
}
