"""Liquid-Time nanochat: train your own ChatGPT on a hybrid of short convolutions and attention."""


def __getattr__(name: str):
    if name == "LLM":  # imported when it is asked for: it needs torch, which takes seconds
        from nanochat.llm import LLM
        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
