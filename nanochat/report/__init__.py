"""The report of a run, from its logs. `python -m nanochat.report generate` writes it."""

from nanochat.report.writing import generate, reset

__all__ = ["generate", "reset"]
