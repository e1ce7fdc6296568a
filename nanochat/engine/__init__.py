"""Decoding: many rows at once through one model. `Engine` is the way in."""

from nanochat.engine.batch import ROWS_TOGETHER, Batch
from nanochat.engine.engine import Engine
from nanochat.engine.row import Row, scored

__all__ = ["ROWS_TOGETHER", "Batch", "Engine", "Row", "scored"]
