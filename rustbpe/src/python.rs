//! The Python module. Arguments and results are converted under the GIL; the work is done without it. It is taken again
//! from time to time to check for Ctrl-C.

use crate::count::PieceCounter;
use crate::encode::{encode, Cache};
use crate::pool::pool;
use crate::split::{Splitter, DEFAULT_PATTERN};
use crate::train::{learn, Corpus};
use crate::vocab::{Vocab, MAX_ID};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

/// Training holds at most two buffers of texts. A buffer ends after so many bytes, even below `buffer_size` texts.
const BUFFER_BYTES: usize = 16 << 20;
/// Bytes of text in a thread's task.
const TASK_BYTES: usize = 1 << 18;
/// Encoding checks for Ctrl-C after so many bytes.
const GROUP_BYTES: usize = 32 << 20;
const SIGNALS_EVERY: Duration = Duration::from_millis(100);
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

fn value_error(message: String) -> PyErr {
    PyValueError::new_err(message)
}

/// Returns the UTF-8 of a text in memory of its own. A str that is asked for its UTF-8 keeps that copy for its
/// lifetime.
fn utf8(item: &Bound<'_, PyAny>, what: impl Fn() -> String) -> PyResult<PyBackedBytes> {
    let Ok(text) = item.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("{} is no str but {}", what(), item.get_type().name()?)));
    };
    match text.encode_utf8() {
        Ok(bytes) => Ok(PyBackedBytes::from(bytes)),
        Err(e) => {
            let error = value_error(format!("{} is not valid Unicode: {}", what(), e.value(item.py())));
            error.set_cause(item.py(), Some(e));
            Err(error)
        }
    }
}

fn text_of(bytes: &PyBackedBytes) -> &str {
    std::str::from_utf8(bytes).expect("Python encodes to valid UTF-8")
}

/// What encoding needs. It never changes, so threads share it.
struct Model {
    vocab: Vocab,
    splitter: Splitter,
    pattern: String,
    caches: Mutex<Vec<Cache>>,
    /// the ids as Python ints, made once: lists share them, which takes less time and memory than new ones
    ints: OnceLock<Vec<Py<PyAny>>>,
}

impl Model {
    fn new(vocab: Vocab, splitter: Splitter, pattern: String) -> Arc<Model> {
        Arc::new(Model { vocab, splitter, pattern, caches: Mutex::new(Vec::new()), ints: OnceLock::new() })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let make = |id: usize| Ok(id.into_pyobject(py)?.into_any().unbind());
        if self.ints.get().is_none() {
            let made: PyResult<_> = (0..self.vocab.id_limit()).map(make).collect();
            let _ = self.ints.set(made?); // another thread may have set it first
        }
        let ints = &self.ints.get().expect("set above")[..];
        PyList::new(py, ids.iter().map(|&id| ints[id as usize].bind(py)))
    }

    fn with_cache<R>(&self, work: impl FnOnce(&mut Cache) -> R) -> R {
        let idle = self.caches.lock().unwrap().pop();
        let mut cache = idle.unwrap_or_else(|| Cache::new(&self.splitter));
        let result = work(&mut cache);
        self.caches.lock().unwrap().push(cache);
        result
    }

    /// Returns the ids of all texts, in order, in several vectors, and the number of ids of each text.
    fn encode_batch(&self, py: Python<'_>, texts: &[PyBackedBytes]) -> PyResult<(Vec<Vec<u32>>, Vec<usize>)> {
        py.detach(|| {
            // a task is a sequence of parts of texts: (text, part)
            let mut tasks: Vec<Vec<(usize, &str)>> = vec![Vec::new()];
            let mut task_bytes = 0;
            for (i, text) in texts.iter().enumerate() {
                for part in self.splitter.parts(text_of(text), TASK_BYTES) {
                    if task_bytes >= TASK_BYTES {
                        tasks.push(Vec::new());
                        task_bytes = 0;
                    }
                    tasks.last_mut().unwrap().push((i, part));
                    task_bytes += part.len();
                }
            }
            let run = |task: &Vec<(usize, &str)>| {
                self.with_cache(|cache| {
                    let mut ids = Vec::with_capacity(task.iter().map(|(_, part)| part.len() / 3 + 1).sum());
                    let mut lengths = Vec::with_capacity(task.len());
                    for &(text, part) in task {
                        let before = ids.len();
                        encode(&self.vocab, cache, part, &mut ids)?;
                        lengths.push((text, ids.len() - before));
                    }
                    Ok((ids, lengths))
                })
            };
            let mut all = Vec::with_capacity(tasks.len());
            let mut lengths = vec![0; texts.len()];
            for group in tasks.chunks(GROUP_BYTES / TASK_BYTES) {
                let done: Result<Vec<_>, String> = if group.len() == 1 {
                    group.iter().map(run).collect()
                } else {
                    pool().map_err(PyRuntimeError::new_err)?.install(|| group.par_iter().map(run).collect())
                };
                for (ids, parts) in done.map_err(value_error)? {
                    all.push(ids);
                    parts.into_iter().for_each(|(text, n)| lengths[text] += n);
                }
                Python::attach(|py| py.check_signals())?;
            }
            Ok((all, lengths))
        })
    }
}

/// A byte-level BPE tokenizer: learns merges from texts, encodes and decodes. All methods are thread-safe.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    model: RwLock<Option<Arc<Model>>>,
}

impl Tokenizer {
    fn model(&self) -> Option<Arc<Model>> {
        self.model.read().unwrap().clone()
    }

    fn trained(&self) -> PyResult<Arc<Model>> {
        self.model().ok_or_else(|| {
            value_error("this tokenizer has no merges yet: call train_from_iterator, or make it with from_ranks".into())
        })
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Tokenizer {
        Tokenizer { model: RwLock::new(None) }
    }

    /// Make a tokenizer from saved ranks, a dict or pairs of (bytes, rank), and the split pattern they were trained
    /// with. Raises ValueError where a single byte is missing, or a token or rank occurs twice.
    #[staticmethod]
    fn from_ranks(ranks: &Bound<'_, PyAny>, pattern: String) -> PyResult<Tokenizer> {
        let pairs = match ranks.cast::<PyDict>() {
            Ok(dict) => dict.items().into_any(),
            Err(_) => ranks.clone(),
        };
        let mut tokens: Vec<(Vec<u8>, u32)> = Vec::new();
        for pair in pairs.try_iter()? {
            let (bytes, rank): (PyBackedBytes, u32) = pair?.extract()?;
            tokens.push((bytes.to_vec(), rank));
        }
        let splitter = Splitter::new(&pattern).map_err(value_error)?;
        let vocab = pairs.py().detach(|| Vocab::new(tokens)).map_err(value_error)?;
        Ok(Tokenizer { model: RwLock::new(Some(Model::new(vocab, splitter, pattern))) })
    }

    /// Learn merges until there are `vocab_size` tokens, including the 256 bytes but no special tokens, or until no
    /// pair is left.
    ///
    /// Texts are read from the iterator up to `buffer_size` (or 16 MB) at a time, while other threads count the
    /// previous ones; only distinct pieces are stored. `pattern` splits texts into pieces (None: GPT-4's).
    /// `progress(stage, done, total)` is called about every second and at the end of each stage: "count" with bytes of
    /// text and 0, then "merge" with merges and their total. Exceptions of the iterator and of `progress`, and Ctrl-C,
    /// pass through and leave the tokenizer as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: usize,
        pattern: Option<String>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        if vocab_size < 256 {
            return Err(value_error(format!(
                "vocab_size must be at least 256, one token for each byte; got {vocab_size}"
            )));
        }
        if vocab_size > i64::from(MAX_ID) + 1 {
            return Err(value_error(format!("vocab_size can be {} at most; got {vocab_size}", MAX_ID + 1)));
        }
        if buffer_size == 0 {
            return Err(value_error("buffer_size must be at least 1 text; got 0".into()));
        }
        if iterator.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err(
                "iterator is a str, which would be trained on letter by letter: pass [text]",
            ));
        }
        let pattern = pattern.unwrap_or_else(|| DEFAULT_PATTERN.into());
        let splitter = Splitter::new(&pattern).map_err(value_error)?;
        let mut watch = Watch::new(progress);
        let counter = count_texts(py, iterator, buffer_size, splitter.clone(), &mut watch)?;
        let merges = vocab_size as usize - 256;
        let vocab = py.detach(|| {
            let corpus = Corpus::new(counter.finish()).map_err(value_error)?;
            let mut outcome = Ok(());
            let learnt = learn(corpus, merges, |done| {
                outcome = watch.look("merge", done, merges);
                outcome.is_ok()
            });
            outcome?;
            let vocab = Vocab::from_merges(&learnt).map_err(value_error)?;
            watch.report("merge", learnt.len(), merges)?;
            Ok::<_, PyErr>(vocab)
        })?;
        *self.model.write().unwrap() = Some(Model::new(vocab, splitter, pattern));
        Ok(())
    }

    /// Return the split pattern; "" before training.
    fn get_pattern(&self) -> String {
        self.model().map_or(String::new(), |model| model.pattern.clone())
    }

    /// Return (bytes, rank) of every token, by rank; the 256 bytes before training.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        match self.model() {
            Some(model) => model.vocab.iter().map(|(bytes, id)| (PyBytes::new(py, bytes), id)).collect(),
            None => (0..=255u8).map(|b| (PyBytes::new(py, &[b]), b.into())).collect(),
        }
    }

    /// The number of tokens, including the 256 bytes.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().map_or(256, |model| model.vocab.len())
    }

    /// Return the token ids of a text.
    fn encode<'py>(&self, py: Python<'py>, text: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let texts = [utf8(text, || "text".into())?];
        let model = self.trained()?;
        let (parts, _) = model.encode_batch(py, &texts)?;
        model.list(py, &parts.concat())
    }

    /// Return the token ids of each text; all threads work on them.
    fn batch_encode<'py>(&self, py: Python<'py>, texts: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let model = self.trained()?;
        let (parts, lengths) = model.encode_batch(py, &batch(texts)?)?;
        let all = parts.concat();
        let mut rest = &all[..];
        let lists = PyList::empty(py);
        for n in lengths {
            let (ids, behind) = rest.split_at(n);
            lists.append(model.list(py, ids)?)?;
            rest = behind;
        }
        Ok(lists)
    }

    /// Return the same without a Python object an id: (ids, offsets), bytes of little-endian uint32 and uint64. The ids
    /// of text i are those from offsets[i] to offsets[i + 1], exclusive. `numpy.frombuffer(ids, "<u4")` reads them
    /// without a copy.
    fn batch_encode_flat<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (parts, lengths) = self.trained()?.encode_batch(py, &batch(texts)?)?;
        let ids = PyBytes::new_with(py, 4 * parts.iter().map(Vec::len).sum::<usize>(), |bytes| {
            let mut places = bytes.chunks_exact_mut(4);
            parts.iter().flatten().zip(&mut places).for_each(|(id, place)| place.copy_from_slice(&id.to_le_bytes()));
            Ok(())
        })?;
        let offsets = PyBytes::new_with(py, 8 * (lengths.len() + 1), |bytes| {
            let mut sum = 0;
            for (place, n) in bytes.chunks_exact_mut(8).zip(lengths.iter().chain([&0])) {
                place.copy_from_slice(&(sum as u64).to_le_bytes());
                sum += n;
            }
            Ok(())
        })?;
        Ok((ids, offsets))
    }

    /// Return the bytes of the tokens, joined. Raises ValueError for an unknown id.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let model = self.trained()?;
        let mut bytes = Vec::new();
        for id in ids.try_iter()? {
            let id = id?;
            let token = id.extract::<i64>()?.try_into().ok().and_then(|id| model.vocab.bytes_of(id));
            let Some(token) = token else {
                return Err(value_error(format!(
                    "unknown token id {id}: ids go from 0 to {}",
                    model.vocab.id_limit() - 1
                )));
            };
            bytes.extend_from_slice(token);
        }
        Ok(PyBytes::new(py, &bytes))
    }

    /// Return the text of the tokens. Raises UnicodeDecodeError where their bytes are not UTF-8, unless `errors` says
    /// otherwise, as in bytes.decode.
    #[pyo3(signature = (ids, errors="strict"))]
    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>, errors: &str) -> PyResult<Bound<'py, PyAny>> {
        self.decode_bytes(py, ids)?.call_method1("decode", ("utf-8", errors))
    }

    fn __repr__(&self) -> String {
        format!("rustbpe.Tokenizer(vocab_size={}, pattern={:?})", self.vocab_size(), self.get_pattern())
    }
}

fn batch(texts: &Bound<'_, PyAny>) -> PyResult<Vec<PyBackedBytes>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts is a str: pass a list of texts, or call encode"));
    }
    texts.try_iter()?.enumerate().map(|(i, text)| utf8(&text?, || format!("texts[{i}]"))).collect()
}

/// Checks for Ctrl-C and reports progress, each at its interval.
struct Watch {
    progress: Option<Py<PyAny>>,
    looked: Instant,
    reported: Instant,
}

impl Watch {
    fn new(progress: Option<Py<PyAny>>) -> Watch {
        Watch { progress, looked: Instant::now(), reported: Instant::now() }
    }

    /// Cheap to call often.
    fn look(&mut self, stage: &str, done: usize, total: usize) -> PyResult<()> {
        let now = Instant::now();
        if now - self.looked >= SIGNALS_EVERY {
            self.looked = now;
            Python::attach(|py| py.check_signals())?;
        }
        if now - self.reported >= PROGRESS_EVERY {
            self.report(stage, done, total)?;
        }
        Ok(())
    }

    fn report(&mut self, stage: &str, done: usize, total: usize) -> PyResult<()> {
        self.reported = Instant::now();
        match &self.progress {
            Some(progress) => Python::attach(|py| progress.call1(py, (stage, done, total)).map(|_| ())),
            None => Ok(()),
        }
    }
}

/// Counts the pieces of all texts. While the threads of the pool work on one buffer, the next is filled from the
/// iterator.
fn count_texts(
    py: Python<'_>,
    iterator: &Bound<'_, PyAny>,
    buffer_size: usize,
    splitter: Splitter,
    watch: &mut Watch,
) -> PyResult<PieceCounter> {
    let pool = pool().map_err(PyRuntimeError::new_err)?;
    let counter = Arc::new(PieceCounter::new(splitter.clone()));
    let stop = Arc::new(Stop(AtomicBool::new(false)));
    let _stop_on_return = StopOnDrop(stop.clone());
    let mut texts = iterator.try_iter()?.enumerate();
    let mut bytes_seen = 0;
    let mut working: Option<Receiver<Result<(), String>>> = None;
    loop {
        let (mut buffer, mut bytes) = (Vec::new(), 0);
        while buffer.len() < buffer_size && bytes < BUFFER_BYTES {
            let Some((i, text)) = texts.next() else { break };
            let text = utf8(&text?, || format!("text {i} of the iterator"))?;
            bytes += text.len();
            buffer.push(text);
            watch.look("count", bytes_seen, 0)?;
        }
        if let Some(outcome) = working.take() {
            wait(py, outcome, watch, bytes_seen)?;
        }
        if buffer.is_empty() {
            break;
        }
        bytes_seen += bytes;
        let (tell, outcome) = channel();
        let (counter, stop, splitter) = (counter.clone(), stop.clone(), splitter.clone());
        pool.spawn(move || {
            let parts: Vec<&str> = buffer.iter().flat_map(|text| splitter.parts(text_of(text), TASK_BYTES)).collect();
            let per_task = (parts.len() * TASK_BYTES / (bytes + 1)).clamp(1, parts.len().max(1));
            let counted = parts
                .par_chunks(per_task)
                .try_for_each(|task| counter.count(task.iter().copied(), || !stop.0.load(Ordering::Relaxed)));
            drop((buffer, counter));
            let _ = tell.send(counted); // after an exception there is no receiver
        });
        working = Some(outcome);
    }
    watch.report("count", bytes_seen, 0)?;
    Ok(Arc::into_inner(counter).expect("no thread counts any more"))
}

/// Waits without the GIL until a buffer is counted.
fn wait(py: Python<'_>, outcome: Receiver<Result<(), String>>, watch: &mut Watch, bytes_seen: usize) -> PyResult<()> {
    py.detach(move || loop {
        match outcome.recv_timeout(SIGNALS_EVERY) {
            Ok(counted) => return counted.map_err(value_error),
            Err(RecvTimeoutError::Timeout) => watch.look("count", bytes_seen, 0)?,
            Err(RecvTimeoutError::Disconnected) => return Err(PyRuntimeError::new_err("a counting thread failed")),
        }
    })
}

/// Tells the threads to stop working on a buffer when training ends early.
struct Stop(AtomicBool);
struct StopOnDrop(Arc<Stop>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0 .0.store(true, Ordering::Relaxed);
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Tokenizer>()
}
