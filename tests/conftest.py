"""Markers, and the shared data that some tests use where it is present."""

import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    os.environ["NANOCHAT_DTYPE"] = "float32"  # its tolerances hold on every CPU; for processes that tests start, too
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


def _cuda() -> bool:
    import torch
    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and sample data; $NANOCHAT_SHARED or ../shared."""
    folder = Path(os.environ.get("NANOCHAT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set NANOCHAT_SHARED")
    return folder


@pytest.fixture(scope="session")
def triton_interprets():
    """Skips where there is no Triton, or one whose interpreter cannot read the numbers of this numpy."""
    pytest.importorskip("triton")
    import numpy
    if version("triton") < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of triton {version('triton')} does not run with numpy {numpy.__version__}")


@pytest.fixture(scope="session")
def interpreter(triton_interprets):
    """A process whose Triton interprets: that is settled when Triton is first imported, which in this one may have happened already."""
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
