"""Fused operations, each beside a plain PyTorch twin that defines it."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def triton_kernels(name: str) -> ModuleType | None:
    """The module of that name in nanochat.kernels.triton, or None where there is no Triton."""
    try:
        return import_module(f"nanochat.kernels.triton.{name}")
    except ImportError:
        return None
