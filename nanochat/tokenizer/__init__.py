"""Text and conversations to token ids and back.

`get_tokenizer()` loads the tokenizer of the base directory; `RustBPETokenizer` trains, loads and saves any.
"""

from nanochat.tokenizer.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    tokenizer_dir,
)

__all__ = ["SPECIAL_TOKENS", "SPLIT_PATTERN", "RustBPETokenizer", "get_token_bytes", "get_tokenizer", "tokenizer_dir"]
