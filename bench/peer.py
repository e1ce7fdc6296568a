"""Times forward and backward of the `nanochat.gpt` that stands first on PYTHONPATH: bench.train starts this in a checkout beside ours.

    cd PEER && PYTHONPATH=. python .../bench/peer.py '{"shape": {...}, "B": 16, "T": 256, "steps": 5, "warmup": 2, "threads": 2,
                                                       "device": "cpu"}'

Needs nothing of our own. The last line printed is JSON: a list of {"how", "parameters", "pass_seconds"} or {"how", "error"}.
"""

import contextlib
import dataclasses
import json
import sys
import time


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


def main(job: dict) -> list[dict]:
    """Time it in float32 and under bfloat16 autocast; a way that fails is told with its error."""
    import torch
    torch.set_num_threads(job["threads"])
    model = build(job["shape"], job["device"])
    ids = torch.randint(job["shape"]["vocab_size"], (job["B"], job["T"] + 1), device=job["device"])
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    rows = []
    ways = {"float32 eager": contextlib.nullcontext(), "bfloat16 autocast eager": torch.autocast(job["device"], torch.bfloat16)}
    for how, context in ways.items():
        seconds = []
        try:
            for _ in range(job["warmup"] + job["steps"]):
                for p in model.parameters():
                    p.grad = None
                wait()
                start = time.perf_counter()
                with context:
                    loss = model(inputs, targets)
                loss.backward()
                wait()
                seconds.append(time.perf_counter() - start)
        except (RuntimeError, AssertionError, TypeError) as error:
            rows.append({"how": how, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            continue
        rows.append({"how": how, "parameters": sum(p.numel() for p in model.parameters()), "pass_seconds": seconds[job["warmup"]:]})
    return rows


if __name__ == "__main__":
    sys.path = [path for path in sys.path if not path.rstrip("/").endswith("/bench")]  # python puts our own folder first
    print(json.dumps(main(json.loads(sys.argv[1]))))
