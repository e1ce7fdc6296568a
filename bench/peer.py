"""Times the `nanochat.gpt` of another checkout: `ask` here starts this file there, in a process of its own.

    cd PEER && PYTHONPATH=. python .../bench/peer.py '{"what": "pass", "shape": {...}, "B": 16, "T": 256, "steps": 5, "warmup": 2,
                                                       "threads": 2, "device": "cpu"}'

what: "pass" is forward and backward of the loss; "forward" is the losses of an evaluation; "generate" is greedy decoding of B rows behind a
prompt of T tokens, through its engine where it has one. Needs nothing of our own there. The last line printed is JSON: a list of
{"how", "parameters", "seconds"}, for "generate" with "prefill_seconds" too, or of {"how", "error"}.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def ask(peer: str, what: str, shape, B: int, T: int, *, steps: int, warmup: int, device: str) -> list[dict]:
    """Have the checkout `peer` timed; returns what it says, with the name of its folder as "peer". Raises UserError where it cannot be.

    shape: a GPTConfig. steps, warmup: timed ones, and those before.
    """
    import torch

    from nanochat.errors import UserError
    folder = Path(peer).expanduser().resolve()
    if not (folder / "nanochat" / "gpt.py").is_file():
        raise UserError(f"--peer={peer}: there is no nanochat/gpt.py in {folder}; name the top folder of a checkout.")
    job = {"what": what, "shape": dataclasses.asdict(shape), "B": B, "T": T, "steps": steps, "warmup": warmup,
           "threads": torch.get_num_threads(), "device": device}
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder)})
    if done.returncode:
        raise UserError(f"the peer in {folder} did not run: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no word'}")
    return [{"peer": folder.name, **found} for found in json.loads(done.stdout.strip().splitlines()[-1])]


# --- in the other checkout ---------------------------------------------------------------------------------------------

def build(shape: dict, device: str):
    """The peer's GPT of our shape, as far as its config knows the fields: float32 weights, none of them zero."""
    import torch

    from nanochat.gpt import GPT, GPTConfig
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    with torch.device("meta"):  # as its own training does: many checkouts cannot be built otherwise
        model = GPT(GPTConfig(**{name: value for name, value in shape.items() if name in known and value is not None}))
    model.to_empty(device=device)
    model.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.float()
            if not p.isfinite().all() or p.abs().max() < 1e-3 or p.abs().max() > 1e3:  # zero, or never initialised
                p.normal_(std=0.5 * p.shape[-1] ** -0.5)
    return model


class Endless:
    """A tokenizer's place in an engine: no token ends a row."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def columns(model, prompt: list[int], B: int, new: int):
    """Yield something for each of `new` greedy tokens of B rows: through the peer's engine, else through its model's own generate."""
    import torch
    try:
        from nanochat.engine import Engine
    except ImportError:
        if B > 1:
            raise RuntimeError("it has no engine, and its model generates one row") from None
        given = inspect.signature(model.generate).parameters
        length = "max_tokens" if "max_tokens" in given else "max_new_tokens"
        ids = prompt if "tokens" in given else torch.tensor([prompt], device=next(model.parameters()).device)
        yield from model.generate(ids, **{length: new}, temperature=0)
        return
    yield from Engine(model, Endless()).generate(prompt, num_samples=B, max_tokens=new, temperature=0)


def timed(model, job: dict, context) -> dict:
    """The seconds of what is asked for."""
    import torch
    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    ids = torch.randint(job["shape"]["vocab_size"], (job["B"], job["T"] + 1), device=job["device"])
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def once() -> None:
        for p in model.parameters():
            p.grad = None
        if job["what"] == "forward":
            each = {"loss_reduction": "none"} if "loss_reduction" in inspect.signature(model.forward).parameters else {}
            with context, torch.no_grad():
                model(inputs, targets, **each)
        else:
            with context:
                loss = model(inputs, targets)
            loss.backward()

    seconds, total = [], job["warmup"] + job["steps"]
    if job["what"] == "generate":
        with context, torch.inference_mode():
            steps = columns(model, inputs[0].tolist(), job["B"], total + 1)
            for _ in range(total + 1):
                wait()
                start = time.perf_counter()
                next(steps)
                wait()
                seconds.append(time.perf_counter() - start)
        return {"prefill_seconds": seconds[0], "seconds": seconds[1 + job["warmup"]:]}
    for _ in range(total):
        wait()
        start = time.perf_counter()
        once()
        wait()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[job["warmup"]:]}


def main(job: dict) -> list[dict]:
    """Time it in float32 and under bfloat16 autocast; a way that fails is told with its error."""
    import torch
    torch.set_num_threads(job["threads"])
    model, rows = build(job["shape"], job["device"]), []
    ways = {"float32 eager": contextlib.nullcontext(), "bfloat16 autocast eager": torch.autocast(job["device"], torch.bfloat16)}
    for how, context in ways.items():
        try:
            rows.append({"how": how, "parameters": sum(p.numel() for p in model.parameters()), **timed(model, job, context)})
        except (RuntimeError, AssertionError, TypeError, StopIteration, AttributeError) as error:
            rows.append({"how": how, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
    return rows


if __name__ == "__main__":
    sys.path = [path for path in sys.path if not path.rstrip("/").endswith("/bench")]  # python puts our own folder first
    print(json.dumps(main(json.loads(sys.argv[1]))))
