"""Decoding: many rows at once through one model. `Engine` is the way in."""

from nanochat.engine.batch import Batch, invariant_rows
from nanochat.engine.engine import Engine
from nanochat.engine.row import Row, scored

__all__ = ["Batch", "Engine", "Row", "invariant_rows", "scored"]
