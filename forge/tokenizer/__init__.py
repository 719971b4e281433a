"""Text to token ids and back, from GGUF metadata."""

from forge.tokenizer.stream import StreamDecoder
from forge.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
