"""Train and encode with the `rustbpe` of the running Python, or with tiktoken: one process of bench.tokenizer.

    PYTHON bench/tokenizer_peer.py \\
        '{"engine": "rustbpe", "paths": ["a.txt"], "vocab_size": 8192, "pattern": "...", "threads": 2}'

Imports nothing of this project, so that it runs with another package named rustbpe. Reads one command per line:
"train", "encode", or "flat" for our batch_encode_flat. tiktoken can only encode, with the merges of the file "ranks".
Answers each command with a line of JSON: wall and CPU seconds, and size and hash of the result.
"""

import array
import gzip
import hashlib
import json
import os
import sys
import time
from pathlib import Path


def read_texts(paths: list[str], separator: str = "<|doc|>", cap: int = 10_000) -> list[str]:
    """Read the documents of text files, plain or gzipped.

    Args:
        paths: the files, in UTF-8.
        separator: a line that holds only this ends a document.
        cap: longer documents are cut into pieces of this many characters.
    """
    texts = []
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            documents = file.read().split(f"{separator}\n")
        texts += [document[i:i + cap] for document in documents for i in range(0, len(document), cap)]
    return texts


class Peer:
    """One tokenizer and its texts."""

    def __init__(self, job: dict):
        self.job, self.texts = job, read_texts(job["paths"])
        if job["engine"] == "tiktoken":
            import tiktoken
            ranks = {bytes.fromhex(token): rank for token, rank in json.loads(Path(job["ranks"]).read_text())}
            enc = tiktoken.Encoding("bench", pat_str=job["pattern"], mergeable_ranks=ranks, special_tokens={})
            self.encode_all = lambda: enc.encode_ordinary_batch(self.texts, num_threads=job["threads"])

    def train(self) -> list[tuple[bytes, int]]:
        """Train a new tokenizer; later commands encode with it."""
        import rustbpe
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(self.texts), self.job["vocab_size"], pattern=self.job["pattern"])
        self.encode_all = lambda: tokenizer.batch_encode(self.texts)
        self.encode_flat = getattr(tokenizer, "batch_encode_flat", None)
        return tokenizer.get_mergeable_ranks()

    def do(self, word: str) -> dict:
        """Run one command and measure it. The hash of the result is computed after the clock has stopped."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = {"train": self.train, "encode": lambda: self.encode_all(),
                  "flat": lambda: self.encode_flat(self.texts)}[word]()
        answer = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if word == "train":
            result = [(bytes(token).hex(), rank) for token, rank in result]
            if self.job.get("ranks"):
                Path(self.job["ranks"]).write_text(json.dumps(result))
            return {**answer, "size": len(result), "hash": hashlib.sha256(repr(result).encode()).hexdigest()}
        rows = [result[0]] if word == "flat" else [array.array("I", row).tobytes() for row in result]
        digest = hashlib.sha256()
        for row in rows:
            digest.update(row)
        return {**answer, "size": sum(map(len, rows)) // 4, "hash": digest.hexdigest()}


def main(job: dict) -> None:
    """Answer the commands on standard input."""
    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])  # rustbpe reads it when it starts its threads
    peer = Peer(job)
    size = sum(len(text.encode()) for text in peer.texts)
    print(json.dumps({"documents": len(peer.texts), "bytes": size}), flush=True)
    for word in sys.stdin:
        print(json.dumps(peer.do(word.strip())), flush=True)


if __name__ == "__main__":
    # Python puts this folder first, where tokenizer.py and others would hide packages of the same name
    sys.path = [path for path in sys.path if not path.rstrip("/").endswith("/bench")]
    main(json.loads(sys.argv[1]))
