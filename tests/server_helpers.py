"""A real server for tests: python -m scripts.chat_web in its own process, with two tiny models."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from tests.conftest import ROOT
from tests.helpers import small_model

TEXT = "the cat sat on the mat, 2+2 = 4 and so on, né 日本. " * 3
CONTEXT = {"sft": 128, "base": 4096}  # base: for answers that take seconds
PATIENCE = 90  # seconds until a test gives up


def make_models(folder: Path, context: dict[str, int] = CONTEXT) -> None:
    """A base directory with a tokenizer and the models sft and base, of these contexts.

    None ends an answer by itself at a small top_k.
    """
    tokenizer = RustBPETokenizer.train_from_iterator([TEXT], 290)
    tokenizer.save(folder / "tokenizer")
    for stage, name in (("sft", "chatsft_checkpoints"), ("base", "base_checkpoints")):
        model = small_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=context[stage], n_layer=2)
        with torch.no_grad():
            for special in SPECIAL_TOKENS:
                model.lm_head.weight[tokenizer.encode_special(special)] = 0
        save_checkpoint(folder / name / "d2", 5, model.state_dict(), {"model_config": model.config})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base directory with models; test files import it under this name."""
    folder = tmp_path_factory.mktemp("server")
    make_models(folder)
    return folder


class Running:
    """A running server."""

    def __init__(self, folder: Path, *flags: str, **environment: str):
        command = [sys.executable, "-m", "scripts.chat_web", "--device-type=cpu", "--port=0", "--top-k=5", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, "NANOCHAT_BASE_DIR": str(folder), "OMP_NUM_THREADS": "1",
                                             **environment})
        self.lines: list[str] = []
        self._found: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._found.get(timeout=PATIENCE)
        assert self.url, "the server did not start:\n" + "".join(self.lines)
        self.processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving at "):
                self._found.put(line.split()[2])
        self._found.put("")

    def metrics(self, **headers: str) -> dict[str, float]:
        """Return its counters."""
        lines = httpx.get(self.url + "/metrics", headers=headers).raise_for_status().text.splitlines()
        values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in values}

    def wait(self, what: str, true) -> None:
        """Wait until true() returns true. what: for the message of a failure."""
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, f"waited in vain for: {what}"
            time.sleep(0.03)

    def wait_for_metric(self, name: str, value: float, **headers: str) -> None:
        """Wait until a counter has a value."""
        self.wait(f"{name} {value}", lambda: self.metrics(**headers)[name] == value)

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def all_gone(self) -> bool:
        """Return whether all processes it started with have ended."""
        return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self.processes)

    def stop(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
