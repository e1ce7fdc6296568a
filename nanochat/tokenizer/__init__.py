"""Text and conversations to token ids and back. `RustBPETokenizer` is the way in."""

from nanochat.tokenizer.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    tokenizer_dir,
)

__all__ = ["SPECIAL_TOKENS", "SPLIT_PATTERN", "RustBPETokenizer", "get_token_bytes", "get_tokenizer", "tokenizer_dir"]
