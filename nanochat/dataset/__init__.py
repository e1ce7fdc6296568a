"""Text on disk: shards, where they come from, and the documents in them. `python -m nanochat.dataset` gets some."""

from nanochat.dataset.documents import Documents, iter_documents, shard_paths
from nanochat.dataset.shards import data_dir

__all__ = ["Documents", "data_dir", "iter_documents", "shard_paths"]
