"""One side of bench.tokenizer, in a process of its own: trains and encodes with the `rustbpe` of the Python it runs in, or with tiktoken.

    PYTHON bench/tokenizer_peer.py '{"engine": "rustbpe", "paths": ["a.txt"], "vocab_size": 8192, "pattern": "...", "threads": 2}'

Needs nothing of our own, so that it runs beside another package named rustbpe. Reads one word a line, "train" or "encode" (tiktoken:
"encode" alone, with the merges in the file "ranks"), and answers each with a line of JSON: wall and CPU seconds, what it did it to, and a
hash of the result.
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
    """Documents of text files, plain or gzipped: they end at lines that hold `separator` alone and are cut every `cap` characters."""
    texts = []
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            documents = file.read().split(f"{separator}\n")
        texts += [document[i:i + cap] for document in documents for i in range(0, len(document), cap)]
    return texts


class Side:
    """Trains and encodes when told."""

    def __init__(self, job: dict):
        self.job, self.texts = job, read_texts(job["paths"])
        if job["engine"] == "tiktoken":
            import tiktoken
            ranks = {bytes.fromhex(token): rank for token, rank in json.loads(Path(job["ranks"]).read_text())}
            enc = tiktoken.Encoding("bench", pat_str=job["pattern"], mergeable_ranks=ranks, special_tokens={})
            self.encode_all = lambda: enc.encode_ordinary_batch(self.texts, num_threads=job["threads"])

    def train(self) -> list[tuple[bytes, int]]:
        """Train anew; the tokenizer serves the encoding that follows."""
        import rustbpe
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(self.texts), self.job["vocab_size"], pattern=self.job["pattern"])
        self.encode_all = lambda: tokenizer.batch_encode(self.texts)
        self.encode_flat = getattr(tokenizer, "batch_encode_flat", None)
        return tokenizer.get_mergeable_ranks()

    def do(self, word: str) -> dict:
        """Run one command; the hash is taken after the clock has stopped."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = {"train": self.train, "encode": lambda: self.encode_all(), "flat": lambda: self.encode_flat(self.texts)}[word]()
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
    """Answer the words on standard input."""
    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])  # before rustbpe starts its threads
    side = Side(job)
    print(json.dumps({"documents": len(side.texts), "bytes": sum(len(text.encode()) for text in side.texts)}), flush=True)
    for word in sys.stdin:
        print(json.dumps(side.do(word.strip())), flush=True)


if __name__ == "__main__":
    sys.path = [path for path in sys.path if not path.rstrip("/").endswith("/bench")]  # python puts our own folder first
    main(json.loads(sys.argv[1]))
