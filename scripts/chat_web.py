"""Serve a model to browsers and to OpenAI clients.

    python -m scripts.chat_web                                    # the fine-tuned model at http://127.0.0.1:8000
    python -m scripts.chat_web --num-gpus 8 --host 0.0.0.0 --api-key KEY

The page chats with any model that was trained; programs use /v1/chat/completions and /v1/completions (/docs lists their
fields). Only this machine is served unless --host says otherwise. Ctrl-C ends it: running requests have
--shutdown-seconds to finish.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.cli import COUNT, FROM_ZERO, PORT, ROWS, STEP_OR_LAST, TEMPERATURE, TOP_K, Range, flag, parse, run_main
from nanochat.errors import UserError
from nanochat.request import MAX_ANSWERS, MAX_BODY_BYTES, MAX_CHARS, SERVER_CHAT, TIMEOUT_SECONDS


@dataclass
class Config:
    """Flags of chat_web."""

    source: str = flag("sft", "which model is the default: sft, mid, rl, base, a folder, or owner/name on the hub",
                       short="i")
    model_tag: str = flag("", "which of its models; unset takes the only or the deepest one", short="g")
    step: int = flag(-1, "which of its checkpoints; -1 is the last", short="s", within=STEP_OR_LAST)
    temperature: float = flag(SERVER_CHAT.temperature,
                              "default of requests: 0 takes the most likely token each time; higher is more varied",
                              short="t", within=TEMPERATURE)
    top_k: int = flag(SERVER_CHAT.top_k,
                      "default of requests: sample from this many of the most likely tokens; 0 = all",
                      short="k", within=TOP_K)
    max_tokens: int = flag(SERVER_CHAT.max_tokens, "default of chat requests: tokens of an answer at most", short="m",
                           within=COUNT)
    port: int = flag(8000, "to listen on; 0 takes one that is free", short="p", within=PORT)
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 serves the whole network")
    num_gpus: int = flag(1, "GPUs to use, a worker on each", short="n", within=Range(1, 1024))
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    dtype: Literal["", "float32", "bfloat16"] = flag("", "precision to compute in; unset takes the device's best",
                                                     short="d")
    quantize: Literal["none", "int8"] = flag("none", "int8 decodes with weights of 8 bits")
    api_key: str = flag("", "key that requests must send; NANOCHAT_API_KEY does the same and shows in no process list")
    cors: str = flag("", "origins whose pages may use the API, with commas between; * is all")
    allow_host: str = flag("", "names that a server on 127.0.0.1 answers to beside localhost, with commas between")
    log_chats: str = flag("", "file to write every conversation to, a JSON line each; unset writes none")
    max_rows: int = flag(16, "answers decoded together, a worker", within=ROWS)
    max_waiting: int = flag(64, "answers that may wait in the queue, a worker; more get 429", within=FROM_ZERO)
    max_n: int = flag(MAX_ANSWERS, "answers of one request at most", within=ROWS)
    max_chars: int = flag(MAX_CHARS, "characters of a prompt or conversation at most", within=COUNT)
    max_body_bytes: int = flag(MAX_BODY_BYTES, "bytes of a request at most", within=COUNT)
    max_models: int = flag(4, "models that stay loaded, a worker", within=ROWS)
    prefix_mb: int = flag(256, "memory of the prefix cache, a model, in MiB; 0 keeps nothing", within=Range(0, 1 << 30))
    timeout: float = flag(TIMEOUT_SECONDS, "seconds that a request may take", within=Range(above=0, high=1e6))
    shutdown_seconds: float = flag(10.0, "seconds that running requests have to finish at the shutdown",
                                   within=Range(0, 1e6))


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it. Raises UserError for what the user can correct."""
    config = parse(Config, argv, __doc__)
    if config.num_gpus > 1 and config.device_type not in ("", "cuda"):
        raise UserError(f"--num-gpus {config.num_gpus} needs GPUs; "
                        f"with --device-type {config.device_type} there is one worker")
    try:
        from nanochat.server.app import serve
        from nanochat.server.messages import WorkerConfig
        from nanochat.server.serving import ServerConfig
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; the server needs: "
                        "pip install fastapi uvicorn prometheus-client") from error

    if config.dtype:
        os.environ["NANOCHAT_DTYPE"] = config.dtype  # workers inherit it
    worker = WorkerConfig(source=config.source, model_tag=config.model_tag, step=config.step, quantize=config.quantize,
                          max_rows=config.max_rows, max_waiting=config.max_waiting, prefix_bytes=config.prefix_mb << 20,
                          max_models=config.max_models)
    server = ServerConfig(host=config.host, port=config.port, temperature=config.temperature, top_k=config.top_k,
                          max_tokens=config.max_tokens, max_n=config.max_n, max_chars=config.max_chars,
                          max_body_bytes=config.max_body_bytes, timeout=config.timeout,
                          shutdown_seconds=config.shutdown_seconds,
                          api_key=config.api_key or os.environ.get("NANOCHAT_API_KEY", ""), cors=config.cors,
                          allow_host=config.allow_host, log_chats=config.log_chats)
    devices = [f"cuda:{i}" for i in range(config.num_gpus)] if config.num_gpus > 1 else [config.device_type]

    def started(address: str) -> None:
        print(f"serving at {address} (Ctrl-C ends it)", flush=True)
        if config.host not in ("127.0.0.1", "localhost", "::1") and not server.api_key:
            print("everybody who can reach this address can use it: --api-key asks for a key", flush=True)

    print("loading the model ...", flush=True)
    asyncio.run(serve(worker, devices, server, started))


if __name__ == "__main__":
    run_main(main)
