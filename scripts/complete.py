"""Continue a prompt with a base model.

    python -m scripts.complete -p "The capital of France is"
    python -m scripts.complete -p "Once upon a time" --temperature=0.8 --max-tokens=200 --num-samples=3
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.cli import COUNT, PENALTY, ROWS, SEED, TEMPERATURE, TOP_K, TOP_P, flag, parse, run_main
from nanochat.distributed import init_ranks
from nanochat.engine import Engine
from nanochat.loading import load_for_decoding
from nanochat.request import COMPLETE_CLI as DEFAULTS
from nanochat.tokenizer.stream import StreamDecoder


@dataclass
class Config:
    """Flags of complete."""

    prompt: str = flag("", "text to continue; unset starts a new document", short="p")
    max_tokens: int = flag(DEFAULTS.max_tokens, "tokens to write at most", within=COUNT)
    num_samples: int = flag(1, "how many continuations", within=ROWS)
    temperature: float = flag(DEFAULTS.temperature, "0 takes the most likely token each time; higher is more varied",
                              within=TEMPERATURE)
    top_k: int = flag(DEFAULTS.top_k, "sample from this many of the most likely tokens; 0 = all", within=TOP_K)
    top_p: float = flag(DEFAULTS.top_p, "sample from the most likely tokens that together have this probability",
                        within=TOP_P)
    repetition_penalty: float = flag(DEFAULTS.repetition_penalty, "above 1 makes tokens seen before less likely",
                                     within=PENALTY)
    seed: int = flag(DEFAULTS.seed, "of the random numbers", within=SEED)
    source: str = flag("base", "which model: base, mid, sft, rl, or a folder")
    model_tag: str = flag("", "which of its models; unset takes the only or the deepest one")
    quantize: Literal["none", "int8"] = flag("none", "int8: weights of 8 bits, faster on a CPU, a little less exact")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")


def main(argv: Sequence[str] | None = None) -> None:
    """Write to stdout as the tokens come, whole characters only. Raises UserError for what the user can correct."""
    config = parse(Config, argv, __doc__)
    device = init_ranks(config.device_type).device
    model, tokenizer, _ = load_for_decoding(config.source, device, model_tag=config.model_tag or None,
                                            quantize=config.quantize)
    ids = tokenizer.encode(config.prompt, prepend=tokenizer.get_bos_token_id())
    engine = Engine(model, tokenizer)
    options = dict(max_tokens=config.max_tokens, temperature=config.temperature, top_k=config.top_k or None,
                   top_p=config.top_p, repetition_penalty=config.repetition_penalty, seed=config.seed)
    if config.num_samples != 1:
        for row in engine.generate_batch(ids, config.num_samples, **options)[0]:
            print(f"{config.prompt}{tokenizer.decode(row[len(ids):])}\n---")
        return
    decoder = StreamDecoder(tokenizer, types=())
    sys.stdout.write(config.prompt)
    for (token,), _ in engine.generate(ids, **options):
        if token in engine.stops:
            break
        new = decoder.feed(token)
        sys.stdout.write(new.rest + new.text)
        sys.stdout.flush()
    print(decoder.finish())


if __name__ == "__main__":
    run_main(main)
