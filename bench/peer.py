"""Times the `nanochat.gpt` of another checkout, a peer. `run_peer` runs this file there, in a process of its own.

    cd PEER && PYTHONPATH=. python .../bench/peer.py '{"what": "pass", "shape": {...}, "B": 16, "T": 256, "steps": 5,
                                                       "warmup": 2, "threads": 2, "device": "cpu"}'

what: "pass" is forward and backward of the loss; "forward" is the losses of an evaluation; "generate" is greedy
decoding of B sequences with one prompt of T tokens, through the engine of the peer where it has one. That process
imports nothing of this checkout. The last line that it prints is JSON: a list of {"how", "parameters", "seconds"}, for
"generate" also with "prefill_seconds", or of {"how", "error"}.
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


def run_peer(peer: str, what: str, shape, B: int, T: int, *, steps: int, warmup: int, device: str) -> list[dict]:
    """Time another checkout.

    Args:
        peer: its folder.
        what: "pass", "forward" or "generate".
        shape: a GPTConfig.
        B, T: sequences, and tokens of each.
        steps: timed steps.
        warmup: steps before them.
        device: type of the device.

    Returns:
        The list that the process printed, with the name of the folder as "peer".

    Raises:
        UserError: where the checkout has no nanochat.gpt or fails.
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
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"the peer in {folder} did not run: {lines[-1]}")
    return [{"peer": folder.name, **found} for found in json.loads(done.stdout.strip().splitlines()[-1])]


# ---- runs in the other checkout

def build(shape: dict, device: str):
    """The GPT of the peer in our shape, as far as its config has the fields: float32 weights, no matrix of zeros."""
    import torch

    from nanochat.gpt import GPT, GPTConfig
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    with torch.device("meta"):  # as its training does; many cannot be built otherwise
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
    """A tokenizer for an engine that never stops: no token ends a sequence."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def columns(model, prompt: list[int], B: int, new: int):
    """Generate `new` greedy tokens for each of B sequences; yield once for each token of all sequences.

    Uses the engine of the peer, or the `generate` of its model where it has no engine.
    """
    import torch
    try:
        from nanochat.engine import Engine
    except ImportError:
        if B > 1:
            raise RuntimeError("it has no engine, and its model generates one sequence") from None
        parameters = inspect.signature(model.generate).parameters
        length = "max_tokens" if "max_tokens" in parameters else "max_new_tokens"
        ids = prompt if "tokens" in parameters else torch.tensor([prompt], device=next(model.parameters()).device)
        yield from model.generate(ids, **{length: new}, temperature=0)
        return
    yield from Engine(model, Endless()).generate(prompt, num_samples=B, max_tokens=new, temperature=0)


def timed(model, job: dict, context) -> dict:
    """The seconds of each step of the job."""
    import torch
    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    ids = torch.randint(job["shape"]["vocab_size"], (job["B"], job["T"] + 1), device=job["device"])
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def once() -> None:
        for p in model.parameters():
            p.grad = None
        if job["what"] == "forward":
            accepted = inspect.signature(model.forward).parameters
            options = {"loss_reduction": "none"} if "loss_reduction" in accepted else {}
            with context, torch.no_grad():
                model(inputs, targets, **options)
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
    """Run a job in float32 and under bfloat16 autocast. A way that fails gives its error."""
    import torch
    torch.set_num_threads(job["threads"])
    model, rows = build(job["shape"], job["device"]), []
    ways = {"float32 eager": contextlib.nullcontext(),
            "bfloat16 autocast eager": torch.autocast(job["device"], torch.bfloat16)}
    for how, context in ways.items():
        try:
            parameters = sum(p.numel() for p in model.parameters())
            rows.append({"how": how, "parameters": parameters, **timed(model, job, context)})
        except (RuntimeError, AssertionError, TypeError, StopIteration, AttributeError) as error:
            rows.append({"how": how, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
    return rows


if __name__ == "__main__":
    sys.path = [path for path in sys.path if not path.rstrip("/").endswith("/bench")]  # python puts our folder first
    print(json.dumps(main(json.loads(sys.argv[1]))))
