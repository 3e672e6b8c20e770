"""Tokenizers: text to ids and back without loss, and the number of bytes behind every id."""

from hybridlm.data.tokenizer.create import byte_tokenizer, load_tokenizer, symbol_tokenizer, train_bpe
from hybridlm.data.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "byte_tokenizer", "load_tokenizer", "symbol_tokenizer", "train_bpe"]
