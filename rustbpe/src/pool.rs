//! The threads that count and encode: as many as RAYON_NUM_THREADS says, else as the machine has cores.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Mutex};

/// The pool of this process. A forked child has none of its parent's threads, so it gets a pool of its own.
pub fn pool() -> Result<Arc<ThreadPool>, String> {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let process = std::process::id();
    let mut pool = POOL.lock().unwrap();
    if let Some((owner, threads)) = &*pool {
        if *owner == process {
            return Ok(threads.clone());
        }
    }
    let made = ThreadPoolBuilder::new().thread_name(|i| format!("rustbpe-{i}")).build();
    let made = Arc::new(made.map_err(|e| format!("cannot start threads: {e}"))?);
    // a parent's pool is left alone: ending it would wait for threads that are not here
    std::mem::forget(pool.replace((process, made.clone())));
    Ok(made)
}
