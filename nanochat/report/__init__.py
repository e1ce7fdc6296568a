"""The report card of a run, from its logs. `python -m nanochat.report generate` writes it."""

from nanochat.report.card import generate, main, reset

__all__ = ["generate", "main", "reset"]
