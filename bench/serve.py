"""The server under load: throughput, time to the first token, memory, and whether answers are the same as alone.

    python -m bench.serve                                    # a d4 with random weights, 64 clients for 60 seconds
    python -m bench.serve --seconds=10 --clients=16 --json=serve.json

It starts real servers (scripts.chat_web) and measures four things. Some requests are sent one at a time. Then many
clients send the same requests in random order, each the next one when the last is answered; every answer is compared
with the one given alone. Then the time to the first token is measured while other rows are decoded. Last comes a chat
of several turns, with and without the prefix cache.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench.measure import (
    command_line,
    json_flag,
    median,
    provenance,
    provenance_line,
    random_model,
    table,
    write_results,
)
from nanochat.checkpoint import save_checkpoint
from nanochat.cli import COUNT, DEPTH, POSITIVE, ROWS, Range, flag, parse, run_main
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.small_world import documents
from nanochat.tokenizer import RustBPETokenizer

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """Flags of bench.serve."""

    depth: int = flag(4, "layers of the model", within=DEPTH)
    vocab_size: int = flag(2048, "tokens it knows", within=Range(1, 1 << 24))
    clients: int = flag(64, "clients at once", within=ROWS)
    seconds: float = flag(60.0, "seconds that they send requests", within=POSITIVE)
    requests: int = flag(48, "different requests", within=COUNT)
    max_tokens: int = flag(64, "tokens of an answer", within=COUNT)
    max_rows: int = flag(64, "answers decoded together (the server's flag)", within=ROWS)
    busy: int = flag(16, "rows decoded while first tokens are timed", within=ROWS)
    turns: int = flag(10, "turns of the chat", within=COUNT)
    words: int = flag(110, "words of a turn's question", within=COUNT)
    quantize: str = flag("none", "int8 serves with 8-bit weights")
    json: str = json_flag()


class ServerProcess:
    """A server in a process of its own, on a free port."""

    def __init__(self, folder: Path, *flags: str):
        self.log = open(folder / "server.log", "ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.chat_web", "--source=base", "--port=0", *flags], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, "NANOCHAT_BASE_DIR": str(folder)})
        for line in self.process.stdout:
            if line.startswith("serving at "):
                self.url = line.split()[2]
                return
        raise UserError(f"the server did not start:\n{(folder / 'server.log').read_text()[-2000:]}")

    def memory(self) -> int:
        """Return the resident memory of its processes, in bytes."""
        import psutil
        me = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def make_model(config: Config, folder: Path) -> str:
    """Save a model with random weights and its tokenizer in a base directory. Return text to make prompts of."""
    texts = list(islice(documents(), 2000))
    tokenizer = RustBPETokenizer.train_from_iterator(texts, config.vocab_size)
    tokenizer.save(folder / "tokenizer")
    shape = GPTConfig.from_depth(config.depth, sequence_len=2048, vocab_size=tokenizer.get_vocab_size())
    save_checkpoint(folder / "base_checkpoints" / f"d{config.depth}", 1, random_model(shape, "cpu").state_dict(),
                    {"model_config": shape})
    return " ".join(texts)


async def ask(client: Any, body: dict[str, Any]) -> tuple[int, str, int]:
    """Send a request. Return (status, answer, its number of tokens)."""
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return response.status_code, response.text, 0
    answer = response.json()
    return 200, answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


async def first_token(client: Any, path: str, body: dict[str, Any]) -> tuple[float, str]:
    """Send a streamed request. Return (seconds to the first piece of text, the whole text)."""
    began, first, text = time.perf_counter(), None, ""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise UserError(f"the server answered {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", []):
                    piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    if piece and first is None:
                        first = time.perf_counter() - began
                    text += piece
    return first if first is not None else time.perf_counter() - began, text


async def load(config: Config, server: ServerProcess, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Send requests one at a time, then from all clients at once. Return the counts and speeds of both."""
    import httpx
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        await ask(client, bodies[0])
        began, alone = time.perf_counter(), []
        for body in bodies:
            alone.append(await ask(client, body))
        alone_seconds = time.perf_counter() - began
        if any(status != 200 for status, _, _ in alone):
            raise UserError(f"a request alone was answered {next(answer for answer in alone if answer[0] != 200)}")
        count = {"answers": 0, "tokens": 0, "refused": 0, "errors": 0, "different": 0}
        memory, until = [server.memory()], time.perf_counter() + config.seconds

        async def one(number: int) -> None:
            chance = random.Random(number)
            while time.perf_counter() < until:
                i = chance.randrange(len(bodies))
                status, text, tokens = await ask(client, bodies[i])
                count["answers"] += status == 200
                count["tokens"] += tokens
                count["refused"] += status == 429
                count["errors"] += status not in (200, 429)
                count["different"] += status == 200 and text != alone[i][1]
                if status == 429:
                    await asyncio.sleep(0.5)

        async def watch() -> None:
            while time.perf_counter() < until:
                await asyncio.sleep(min(5.0, config.seconds / 4))
                memory.append(server.memory())

        began = time.perf_counter()
        await asyncio.gather(watch(), *(one(i) for i in range(config.clients)))
        seconds = time.perf_counter() - began
        memory.append(server.memory())
        speed_alone = sum(tokens for _, _, tokens in alone) / alone_seconds
        return {**count, "seconds": seconds, "tokens_per_second": count["tokens"] / seconds,
                "alone_tokens_per_second": speed_alone,
                "ratio": count["tokens"] / seconds / speed_alone, "memory": memory}


async def while_busy(config: Config, server: ServerProcess, bodies: list[dict[str, Any]]) -> list[float]:
    """Return the seconds to the first token of new requests while other rows are decoded."""
    import httpx
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        async def busy(body: dict[str, Any]) -> None:
            while True:
                await first_token(client, "/v1/completions", {**body, "max_tokens": 1500})

        long = [asyncio.ensure_future(busy(body)) for body in (bodies * config.busy)[:config.busy]]
        await asyncio.sleep(2)
        seconds = [(await first_token(client, "/v1/completions", {**body, "max_tokens": 4}))[0] for body in bodies[:12]]
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        return seconds


async def chat(config: Config, server: ServerProcess, words: list[str]) -> list[float]:
    """Return the seconds to the first token at each turn of a chat."""
    import httpx
    messages, seconds = [], []
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        for turn in range(config.turns):
            messages.append({"role": "user", "content": " ".join(words[turn * config.words:(turn + 1) * config.words])})
            took, text = await first_token(client, "/v1/chat/completions", {
                "messages": messages, "max_tokens": 32, "temperature": 0.8, "seed": turn, "top_k": 50})
            seconds.append(took)
            messages.append({"role": "assistant", "content": text})
            await asyncio.sleep(1.0)  # the user reads; the server fills its prefix cache
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the flags say. Raises UserError for what the user can correct."""
    config = parse(Config, argv, __doc__)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        words = make_model(config, Path(name)).split()
        bodies = []
        for seed in range(config.requests):
            begin, length = chance.randrange(len(words) - 200), chance.randint(5, 60)
            bodies.append({"prompt": " ".join(words[begin:begin + length]), "max_tokens": config.max_tokens,
                           "seed": seed, "temperature": 1.0, "top_k": 50})
        flags = [f"--max-rows={config.max_rows}", f"--quantize={config.quantize}"]
        with ServerProcess(Path(name), *flags, "--prefix-mb=0") as server:
            loaded = asyncio.run(load(config, server, bodies))
            waited = asyncio.run(while_busy(config, server, bodies))
            cold = [asyncio.run(chat(config, server, words[1000 * i:])) for i in range(3)]
        with ServerProcess(Path(name), *flags) as server:
            warm = [asyncio.run(chat(config, server, words[1000 * i:])) for i in range(3)]
    turns = [(median(column), median(kept)) for column, kept in zip(zip(*cold), zip(*warm))]
    memory = [f"{n / 1e6:,.0f}" for n in loaded["memory"]]
    lines = [["one request at a time", f"{loaded['alone_tokens_per_second']:,.0f} tokens/s"],
             [f"{config.clients} clients at once",
              f"{loaded['tokens_per_second']:,.0f} tokens/s = {loaded['ratio']:.1f}×"],
             ["answers", f"{loaded['answers']:,} in {loaded['seconds']:.0f} s"],
             ["of them different from alone", loaded["different"]],
             ["refused (429); errors", f"{loaded['refused']}; {loaded['errors']}"],
             ["memory of the server, MB, from start to end", ", ".join([*memory[:2], "…", *memory[-2:]])],
             [f"first token with {config.busy} rows decoded, median and largest",
              f"{median(waited):.2f} s, {max(waited):.2f} s"]]
    about = provenance(command_line("bench.serve", argv))
    print(f"{provenance_line(about)}\nd{config.depth}, V {config.vocab_size:,}, quantize {config.quantize}, "
          f"answers of {config.max_tokens} tokens, at most {config.max_rows} rows\n\n"
          + table(["the server under load", ""], lines) + "\n\n"
          + table(["first token of a chat's turn", *(str(i + 1) for i in range(len(turns)))],
                  [["everything computed, ms", *(f"{1e3 * plain:.0f}" for plain, _ in turns)],
                   ["with the prefix cache, ms", *(f"{1e3 * kept:.0f}" for _, kept in turns)],
                   ["ratio", *(f"{plain / kept:.1f}×" for plain, kept in turns)]]), flush=True)
    rows = [{"turn": i + 1, "computed": plain, "kept": kept} for i, (plain, kept) in enumerate(turns)]
    write_results(config.json, about, config, rows, load=loaded, first_token_busy=waited)


if __name__ == "__main__":
    run_main(main)
