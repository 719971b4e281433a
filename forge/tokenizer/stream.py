"""Decode ids one at a time."""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Text of ids that are given one at a time. Returned text is final. `Tokenizer.streamer` makes one.

    Bytes of an incomplete character are held back. The strings of all `push` calls and of `flush`, joined, are exactly
    `Tokenizer.decode` of the same ids. A first id that equals `opening_id` (an added BOS) is not shown. `strips_space`
    removes one leading space (an added prefix).
    """

    def __init__(self, token_bytes: Callable[[int], bytes], opening_id: int | None, strips_space: bool) -> None:
        self._token_bytes = token_bytes
        self._opening_id = opening_id
        self._strips_space = strips_space
        self._opening = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes, perhaps empty. Raises TokenizerError for an id outside the vocabulary."""
        data = self._token_bytes(id)
        if self._opening:
            if id == self._opening_id:
                self._opening_id = None
                return ""
            self._opening = False
            if self._strips_space:
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The text held back at the end: U+FFFD for an incomplete character, else empty."""
        return self._utf8.decode(b"", True)
