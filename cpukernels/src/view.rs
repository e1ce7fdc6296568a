//! Tensors as they come from Python: an address and strides, the last dimension contiguous.

use crate::math::{Bf16, Elem};

/// Rows at (i, j): of a tensor (I, J, …) with these strides, in elements.
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
    /// The row lies inside the tensor, has this type, and nobody writes it meanwhile.
    #[inline(always)]
    pub unsafe fn row<'a, T>(&self, i: usize, j: usize, width: usize) -> &'a [T] {
        std::slice::from_raw_parts(self.at(i, j), width)
    }

    /// # Safety
    /// The row lies inside the tensor, has this type, and nobody else reads or writes it meanwhile.
    #[inline(always)]
    pub unsafe fn row_mut<'a, T>(&self, i: usize, j: usize, width: usize) -> &'a mut [T] {
        std::slice::from_raw_parts_mut(self.at(i, j), width)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dtype {
    F32,
    Bf16,
}

/// A view whose dtype is its own, other than that of the tensors beside it.
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
