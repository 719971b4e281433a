"""Turning ids into text as they come."""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Text of a sequence of ids, given one at a time; what was returned is never taken back.

    Bytes of a character that is not complete yet are held. The strings that `push` returns, followed by that of
    `flush`, are exactly `Tokenizer.decode` of the same ids. Made by `Tokenizer.streamer`: `opening_id` is not shown
    where it comes first (an added BOS), and `strips_space` takes one space off what follows (an added prefix).
    """

    def __init__(self, token_bytes: Callable[[int], bytes], opening_id: int | None, strips_space: bool) -> None:
        self._token_bytes = token_bytes
        self._opening_id = opening_id
        self._strips_space = strips_space
        self._opening = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes, maybe empty. Raises TokenizerError for an id outside the vocabulary."""
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
        """What is held at the end: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", True)
