//! Distribute a kernel's items over threads: those of the OpenMP library that torch uses (libgomp, or one with its
//! entry points). These spin for a while after each of torch's operations, so that they start at once, and a second
//! pool would compete with them for the cores. Where the process has no such library (macOS), threads are started for
//! large work.

use crate::simd::{best, run_at, Kernel};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

/// With fewer simple operations on elements than this, the calling thread works alone: waking others takes as long (a
/// few µs).
const LEAST_WORK: usize = 1 << 15;
/// The same where threads must be started first (tens of µs).
const LEAST_WORK_TO_START_THREADS: usize = 1 << 20;

struct OpenMp {
    parallel: unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint),
    thread: unsafe extern "C" fn() -> c_int,
    threads: unsafe extern "C" fn() -> c_int,
}

extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_DEFAULT: *mut c_void = if cfg!(target_os = "macos") { -2isize as *mut c_void } else { std::ptr::null_mut() };

/// Looks among the libraries whose symbols are global; torch loads its OpenMP library so.
fn openmp() -> Option<&'static OpenMp> {
    static FOUND: OnceLock<Option<OpenMp>> = OnceLock::new();
    let find = || {
        let [parallel, thread, threads] = ["GOMP_parallel\0", "omp_get_thread_num\0", "omp_get_num_threads\0"]
            .map(|name| unsafe { dlsym(RTLD_DEFAULT, name.as_ptr().cast()) });
        if parallel.is_null() || thread.is_null() || threads.is_null() {
            return None;
        }
        // SAFETY: the types are those of the interfaces of OpenMP and GCC
        unsafe {
            Some(OpenMp {
                parallel: std::mem::transmute_copy(&parallel),
                thread: std::mem::transmute_copy(&thread),
                threads: std::mem::transmute_copy(&threads),
            })
        }
    };
    FOUND.get_or_init(find).as_ref()
}

/// Whether the kernels run on torch's own threads.
pub fn shares_threads() -> bool {
    openmp().is_some()
}

/// A kernel panicked, which is a bug here; its results are incomplete.
#[derive(Debug)]
pub struct Panicked;

struct Team<'a, K> {
    kernel: &'a K,
    items: usize,
    mode: FloatMode,
    failed: AtomicBool,
}

impl<K: Kernel> Team<'_, K> {
    /// Do one thread's contiguous share, in the calling thread's floating-point mode; never unwinds.
    fn share(&self, thread: usize, threads: usize) {
        let own = FloatMode::of_this_thread();
        self.mode.set();
        let cut = |i: usize| self.items * i / threads;
        let work = || run_at(best(), self.kernel, cut(thread)..cut(thread + 1));
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        own.set();
    }
}

extern "C" fn enter<K: Kernel>(team: *mut c_void) {
    let omp = openmp().expect("OpenMP called this");
    // SAFETY: `run` passes a team that outlives the region
    unsafe { (*(team as *const Team<K>)).share((omp.thread)() as usize, (omp.threads)() as usize) }
}

/// Do all items of a kernel, on up to `threads` threads; `work` is the approximate number of simple operations on
/// elements.
pub fn run<K: Kernel>(kernel: &K, items: usize, work: usize, threads: usize) -> Result<(), Panicked> {
    let team = Team { kernel, items, mode: FloatMode::of_this_thread(), failed: AtomicBool::new(false) };
    if threads <= 1 || items <= 1 || work < LEAST_WORK {
        team.share(0, 1);
    } else if let Some(omp) = openmp() {
        // all of torch's threads even for fewer items: OpenMP would end some threads for a team of another size
        unsafe { (omp.parallel)(enter::<K>, &team as *const Team<K> as *mut c_void, threads as c_uint, 0) };
    } else if work < LEAST_WORK_TO_START_THREADS {
        team.share(0, 1);
    } else {
        std::thread::scope(|scope| {
            for i in 1..threads {
                let team = &team;
                scope.spawn(move || team.share(i, threads));
            }
            team.share(0, threads);
        });
    }
    if team.failed.into_inner() {
        Err(Panicked)
    } else {
        Ok(())
    }
}

/// The number of blocks of `size` elements in `total`.
pub fn blocks(total: usize, size: usize) -> usize {
    total.div_ceil(size)
}

/// The elements of the i-th block.
pub fn block(i: usize, size: usize, total: usize) -> Range<usize> {
    i * size..((i + 1) * size).min(total)
}

/// How a thread treats numbers below float32's normal range (`torch.set_flush_denormal` sets it in its own thread
/// alone).
#[derive(Clone, Copy)]
struct FloatMode(u64);

impl FloatMode {
    #[cfg(target_arch = "x86_64")]
    fn of_this_thread() -> FloatMode {
        let mut mode = 0u32;
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) std::ptr::addr_of_mut!(mode), options(nostack)) };
        FloatMode((mode & !0x3f) as u64) // without the exception flags
    }
    #[cfg(target_arch = "x86_64")]
    fn set(self) {
        let mode = self.0 as u32;
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) std::ptr::addr_of!(mode), options(nostack, readonly)) };
    }
    #[cfg(target_arch = "aarch64")]
    fn of_this_thread() -> FloatMode {
        let mode: u64;
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nomem, nostack)) };
        FloatMode(mode)
    }
    #[cfg(target_arch = "aarch64")]
    fn set(self) {
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.0, options(nostack)) };
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn of_this_thread() -> FloatMode {
        FloatMode(0)
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn set(self) {
        let _ = self.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    struct Count(Vec<AtomicUsize>);

    impl Kernel for Count {
        #[inline(always)]
        fn run<const F: bool>(&self, items: Range<usize>) {
            for i in items {
                self.0[i].fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn every_item_is_done_once_by_any_number_of_threads() {
        for threads in 1..6 {
            for items in [0, 1, 2, 5, 64] {
                let count = Count((0..items).map(|_| AtomicUsize::new(0)).collect());
                run(&count, items, 1 << 30, threads).unwrap();
                assert!(count.0.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn panic_becomes_an_error() {
        let count = Count(Vec::new());
        assert!(run(&count, 8, 1 << 30, 2).is_err() && run(&count, 8, 0, 2).is_err());
    }
}
