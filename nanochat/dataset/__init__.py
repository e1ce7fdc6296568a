"""Pretraining text on disk: the shards, how they are made, and the documents in them.

`python -m nanochat.dataset --help` says how to get some text.
"""

from nanochat.dataset.documents import Documents, iter_documents, shard_paths
from nanochat.dataset.shards import data_dir

__all__ = ["Documents", "data_dir", "iter_documents", "shard_paths"]
