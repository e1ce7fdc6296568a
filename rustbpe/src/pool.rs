//! The thread pool for counting and encoding: RAYON_NUM_THREADS threads, by default one a core.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Mutex};

/// Returns the pool of this process. A forked child has no threads of its parent, so it gets a new pool.
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
    // the parent's pool is not dropped: that would wait for threads that do not exist here
    std::mem::forget(pool.replace((process, made.clone())));
    Ok(made)
}
