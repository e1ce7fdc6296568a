"""Options and marks, and what several files share: golden data, a text with its tokenizer, an interpreter process.

pytest-xdist runs the suite in several processes (`test.sh`). What takes seconds to make is made once for all of them:
see `make_once`. A test marked `alone` waits until no other test runs.
"""

import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    os.environ["NANOCHAT_DTYPE"] = "float32"  # its tolerances hold on every CPU; for processes that tests start, too
    # The same examples each time: what fails for one fails for all. --hypothesis-profile=default looks for new ones.
    hypothesis.settings.register_profile("same", derandomize=True)
    if config.getoption("--hypothesis-profile", None) is None:
        hypothesis.settings.load_profile("same")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as under nohup: tests that press Ctrl-C would wait for ever
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not _cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


    # Long tests go first: one that starts last leaves the other cores idle. Those that wait for the end of all other
    # tests go before them, where the others are short.
    items.sort(key=lambda item: ("alone" not in item.keywords, "long" not in item.keywords))


def _cuda() -> bool:
    import torch
    return torch.cuda.is_available()


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold the lock of this file, fcntl.LOCK_EX or LOCK_SH, as the only process or as one of several."""
    with open(path, "w") as file:
        fcntl.flock(file, how)  # released when the file is closed, also where the process is killed
        yield


@pytest.fixture(scope="session")
def session_folder(request, tmp_path_factory) -> Path:
    """A folder of this run of pytest, the same one in all its processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def make_once(session_folder) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function (name, make) → the folder of that name, filled by make(folder) in the first process that asks for it.

    The folder is shared by all processes, so tests only read it. make runs with the folder as $NANOCHAT_BASE_DIR.
    """
    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = session_folder / name, session_folder / f"{name}.done"
        with locked(session_folder / f"{name}.lock", fcntl.LOCK_EX):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("NANOCHAT_BASE_DIR", str(folder))
                    make(folder)
                done.touch()
        return folder
    return folder_of


@pytest.fixture(scope="session")
def tiny(make_once) -> Path:
    """A base directory with a little text and a tokenizer for it; tests only read it."""
    from tests.helpers import small_text_and_tokenizer  # here, as it imports torch
    return make_once("tiny", lambda folder: small_text_and_tokenizer())


@pytest.fixture
def tiny_base(tiny, tmp_path, monkeypatch) -> Path:
    """A base directory of the test's own, with the text and tokenizer of `tiny`."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("base_data", "tokenizer"):
        (base / name).symlink_to(tiny / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


@pytest.fixture(autouse=True)
def _takes_turns(request, session_folder) -> Iterator[None]:
    """Let a test marked `alone` run while no other process runs one."""
    if not hasattr(request.config, "workerinput"):  # the only process
        yield
        return
    alone = "alone" in request.keywords
    with locked(session_folder / "next.lock", fcntl.LOCK_EX):  # a test waiting here keeps later tests from going first
        turn = locked(session_folder / "running.lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        turn.__enter__()
    try:
        yield
    finally:
        turn.__exit__(None, None, None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and sample data; $NANOCHAT_SHARED or ../shared."""
    folder = Path(os.environ.get("NANOCHAT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set NANOCHAT_SHARED")
    return folder


@pytest.fixture(scope="session")
def nullgpu(make_once):
    """The null GPU, `tests.nullgpu.NullGPU`, built once; compiled kernels stay in its folder for all processes."""
    from tests import nullgpu
    if reason := nullgpu.missing():
        pytest.skip(reason)
    return nullgpu.NullGPU(make_once("nullgpu", nullgpu.build))


@pytest.fixture(scope="session")
def triton_interprets():
    """Skips where there is no Triton, or one whose interpreter cannot read the numbers of this numpy."""
    pytest.importorskip("triton")
    import numpy
    if version("triton") < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of triton {version('triton')} does not run with numpy {numpy.__version__}")


@pytest.fixture(scope="session")
def interpreter(triton_interprets):
    """A process whose Triton interprets. The first import of Triton decides it, and in this process that may be
    past."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(abs, 0).result()  # it has started, with that environment
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield pool


@pytest.fixture(autouse=True)
def own_base_dir(tmp_path, monkeypatch):
    """No test touches the user's own files."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    yield
    if "torch" in sys.modules:  # training rounds denormal numbers to zero, in this process too
        sys.modules["torch"].set_flush_denormal(False)
