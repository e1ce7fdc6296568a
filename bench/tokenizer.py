"""Measure training and encoding of our rustbpe against PyPI's package of that name and against tiktoken, on your text.

    python -m bench.tokenizer --text books/*.txt.gz --vocab-size=8192 --threads=2
    python -m bench.tokenizer --text books/*.txt.gz --peer-python=other-venv/bin/python

Each tokenizer runs in its own process with the same texts and threads. They alternate, and the best round of each
counts. A line that holds only <|doc|> ends a document; documents are cut at 10,000 characters. If merges or ids differ,
there is no table. `batch_encode` returns lists of ints like the others; `batch_encode_flat` returns one array, which is
what our data loader uses.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import command_line, json_flag, provenance, provenance_line, table, write_results
from nanochat.cli import ROUNDS, Range, flag, parser_of, run_main
from nanochat.errors import UserError
from nanochat.tokenizer import SPLIT_PATTERN

PEER = Path(__file__).with_name("tokenizer_peer.py")


@dataclass
class Config:
    """Flags of bench.tokenizer."""

    vocab_size: int = flag(8192, "tokens, including the 256 bytes, without special tokens", within=Range(256, 1 << 24))
    threads: int = flag(2, "threads of each tokenizer", within=Range(0, 4096))
    rounds: int = flag(3, "times that each is measured; the best counts", within=ROUNDS)
    peer_python: str = flag("", "a Python in which PyPI's rustbpe is installed; unset leaves it out")
    json: str = json_flag()


class PeerProcess:
    """A process of tokenizer_peer.py with one tokenizer. `about` has the number of documents and bytes of its text."""

    def __init__(self, name: str, python: str, job: dict[str, Any]):
        self.name = name
        self.process = subprocess.Popen([python, str(PEER), json.dumps(job)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        """Run the command "train", "encode" or "flat"; return the seconds it took, and size and hash of the result."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} ended early with code {self.process.wait()}; its output is above")
        return json.loads(line)

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()


def measure(paths: list[str], config: Config) -> dict[str, Any]:
    """Return the figures of all rounds of all tokenizers. Raises UserError if their results differ."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"paths": paths, "vocab_size": config.vocab_size, "pattern": SPLIT_PATTERN, "threads": config.threads}
        ranks = str(Path(folder) / "ranks.json")
        processes: list[PeerProcess] = []
        found: dict[str, dict[str, list]] = {"train": {}, "encode": {}}

        def ask(kind: str, process: PeerProcess, word: str, name: str) -> None:
            found[kind].setdefault(name, []).append(process.ask(word))

        def start(name: str, python: str, **more: str) -> PeerProcess:
            processes.append(PeerProcess(name, python, {**job, **more}))
            return processes[-1]
        try:
            ours = start("ours", sys.executable, engine="rustbpe", ranks=ranks)
            if config.peer_python:
                peer = start("the other rustbpe", config.peer_python, engine="rustbpe")
            for _ in range(config.rounds):
                ask("train", ours, "train", "ours")
                if config.peer_python:
                    ask("train", peer, "train", "other rustbpe")
            tiktoken = start("tiktoken", sys.executable, engine="tiktoken", ranks=ranks)
            for _ in range(config.rounds):
                ask("encode", ours, "encode", "ours, batch_encode")
                ask("encode", ours, "flat", "ours, batch_encode_flat")
                if config.peer_python:
                    ask("encode", peer, "encode", "other rustbpe")
                ask("encode", tiktoken, "encode", "tiktoken")
        finally:
            for process in processes:
                process.close()
    for kind, tokenizers in found.items():
        if len({round["hash"] for rounds in tokenizers.values() for round in rounds}) > 1:
            raise UserError(f"the tokenizers disagree in the results of {kind}: {', '.join(tokenizers)}")
    return {"text": ours.about, "rounds": found}


def block(found: dict[str, Any], config: Config, about: dict[str, Any]) -> str:
    """Return the markdown for the results of `measure`. `about` describes the machine."""
    size = found["text"]["bytes"]
    rows = []
    for kind, tokenizers in found["rounds"].items():
        best = {name: min(round["seconds"] for round in rounds) for name, rounds in tokenizers.items()}
        for name, rounds in tokenizers.items():
            cpu = min(round["cpu"] for round in rounds)
            ours = next(iter(best.values()))
            rows.append([kind, name, f"{best[name]:.2f}", f"{cpu:.2f}", f"{size / best[name] / 1e6:.1f}",
                         f"{best[name] / ours:.2f}"])
    tokens = found["rounds"]["train"]["ours"][0]["size"]
    return (f"{found['text']['documents']:,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens, "
            f"{config.threads} threads, best of {config.rounds}; merges and ids are the same for all.\n"
            f"{provenance_line(about)}\n\n"
            + table(["", "engine", "seconds", "CPU seconds", "MB/s", "times ours"], rows, left=(0, 1)))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the flags say, and print a table. Raises UserError for wrong flags or files."""
    parser = parser_of(Config, __doc__ or "")
    parser.add_argument("--text", nargs="+", required=True, metavar="PATH",
                        help="text files in UTF-8, plain or gzipped")
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    paths = [str(Path(path).expanduser().resolve()) for path in flags.pop("text")]
    config = Config(**flags)
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"no file at {path}; --text takes text files")
    if min(config.threads, config.rounds) < 1 or config.vocab_size < 256:
        raise UserError("--threads and --rounds must be at least 1, --vocab-size at least 256")
    about = provenance(command_line("bench.tokenizer", argv))
    found = measure(paths, config)
    print(block(found, config, about), flush=True)
    rows = [{"work": kind, "engine": name, **times} for kind, engines in found["rounds"].items()
            for name, rounds in engines.items() for times in rounds]
    write_results(config.json, about, config, rows, text=found["text"])


if __name__ == "__main__":
    run_main(main)
