"""A model's tokenizer, from the metadata of its GGUF file. Token ids are llama.cpp's."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from operator import index
from typing import Any, Protocol, Self

import numpy as np

from forge.errors import TokenizerError, UnsupportedError
from forge.keywords import keywords
from forge.tokenizer import bpe
from forge.tokenizer.masks import Literals
from forge.tokenizer.partition import Partition
from forge.tokenizer.pretokenizers import DEFAULT, RULES, Rule
from forge.tokenizer.spm import SPACE, LineBPEEncoder, SPMEncoder
from forge.tokenizer.stream import StreamDecoder
from forge.tokenizer.vocab import SPECIAL, Fields, TokenType, Vocabulary, read_vocabulary

_HTML = (
    "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|hr|li|ul|ol|a|img"
)
_HTML += "|html|body|span|div|iframe|footer"
_MARKER = re.compile(rf"(?!</?(?:{_HTML})>)(?:<.+>|\[.+\])", re.DOTALL)
"""Matches user-defined tokens that are markers, such as <tool_call>. gemma's HTML tags are text."""

_MAX_SUPPRESSED = 4096
"""Each request carries them. Files know some dozens."""


class _Encoder(Protocol):
    def encode(self, text: str, prefix: str = "") -> Iterable[list[int]]: ...


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    Attributes:
        vocab_size: V, the number of tokens.
        bos_id: Id of the BOS token. None if the model has none.
        eos_id: Id of the EOS token. None if the model has none.
        eog_ids: Ids that end a text.
        suppressed_ids: Ids that the model must not write, such as places for images.
        add_bos: Whether `encode` adds the BOS token.
        add_eos: Whether `encode` adds the EOS token.
        chat_template: The model's chat template, Jinja source. None if it has none.
        chat_templates: All chat templates by name. `chat_template` is the one named "default".
    """

    def __init__(self, metadata: Mapping[str, Any], *, source: str) -> None:
        fields = Fields(metadata, source)
        model = fields.text("tokenizer.ggml.model")
        if model is None:
            raise fields.error("tokenizer.ggml.model is missing")
        if model not in ("gpt2", "llama", "gemma4"):
            raise UnsupportedError(
                f"{source}: tokenizer.ggml.model is {model!r:.60}; forge knows 'gpt2', 'llama' and 'gemma4'"
            )
        self._is_spm = model == "llama"
        self._space_prefix = self._is_spm and fields.flag("add_space_prefix", True)
        pre = "gemma4" if model == "gemma4" else fields.text("tokenizer.ggml.pre") or ""
        rule = DEFAULT if self._is_spm else _rule(pre, fields, source)
        self._spells_spaces = self._is_spm or not rule.stages
        self._vocabulary = read_vocabulary(fields)
        self.vocab_size = len(self._vocabulary.pieces)
        self.eog_ids = self._vocabulary.end_ids
        self.suppressed_ids = fields.ids("suppress_tokens", self.vocab_size, _MAX_SUPPRESSED)

        def role(name: str, spm_default: int) -> int | None:
            key = f"{name}_token_id"
            is_default = self._is_spm and spm_default < self.vocab_size and not fields.has(key)
            return spm_default if is_default else fields.token_id(key, self.vocab_size)

        self._encoder: _Encoder
        if self._is_spm:
            scores = fields.numbers("scores", "fiu", self.vocab_size)
            if scores is None:
                raise fields.error("tokenizer.ggml.scores is missing")
            if np.isnan(scores).any():
                raise fields.error("tokenizer.ggml.scores holds NaN")
            self._encoder = SPMEncoder(self._vocabulary.ids, scores, role("unknown", 0))
        elif not rule.stages:
            merges = fields.strings("merges")
            self._encoder = LineBPEEncoder(self._vocabulary.ids, merges, rule.keeps_line_ends)
        else:
            try:
                self._encoder = bpe.BPEEncoder(self._vocabulary.ids, fields.strings("merges"), rule)
            except ValueError as error:
                raise fields.error(f"in tokenizer.ggml.merges {error}") from None

        self.bos_id, self.eos_id = role("bos", 1), role("eos", 2)
        default_bos = (self._is_spm or rule.add_bos) and self.bos_id is not None
        add_bos = fields.flag("add_bos_token", default_bos) or (rule.always_bos and default_bos)
        add_eos = fields.flag("add_eos_token", False)
        for name, adds, token_id in (("bos", add_bos, self.bos_id), ("eos", add_eos, self.eos_id)):
            if adds and token_id is None and not fields.has(f"{name}_token_id"):
                raise fields.error(f"tokenizer.ggml.add_{name}_token is set without a {name}_token_id")
        self.add_bos = add_bos and self.bos_id is not None
        self.add_eos = add_eos and self.eos_id is not None
        self.chat_templates = _chat_templates(fields)
        self.chat_template = self.chat_templates.get("default")
        self._text_literals, self._all_literals = _literals(self._vocabulary, pre, fields)
        self._markers: dict[str, Literals] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, source: str) -> Self:
        """Build from the key-value pairs of a GGUF file; `source` is its name, for messages.

        Raises FormatError for a damaged vocabulary, UnsupportedError for a kind of tokenizer that forge does not have.
        Warns (UserWarning, one line) where a byte-level vocabulary does not name its split rule. Keys: docs/gguf.md of
        ggml.
        """
        return cls(metadata, source=source)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, such as BOS and `<|im_start|>`: in texts for people they are left out."""
        return frozenset(np.flatnonzero(np.isin(self._vocabulary.types, SPECIAL)).tolist())

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(len(piece) for piece in self._vocabulary.pieces)

    @keywords()
    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any Unicode text. User-defined tokens in it are always tokens.
            add_special: Whether to add the BOS and EOS that the model wants.
            parse_special: Whether control tokens such as `<|im_start|>` in the text are tokens. False = they are text.

        Raises:
            TokenizerError: The text is no Unicode: it holds lone surrogates.
        """
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        ids += self._encode(text, self._all_literals if parse_special else self._text_literals, {})
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    @keywords()
    def encode_prompt(self, text: str, unmask: Mapping[int, int] | None = None) -> list[int]:
        """Token ids of a text that a model is to continue: the rule of all methods of `LLM`.

        Names of control tokens in it are tokens. It begins with the model's BOS: one is added unless it is there
        already, as in what chat templates write. No EOS is added, as nothing could follow.

        Args:
            text: Any Unicode text.
            unmask: The table of `ChatTemplate.render_masked`.

        Raises:
            TokenizerError: The text is no Unicode: it holds lone surrogates.
        """
        ids = self._encode(text, self._all_literals, unmask or {})
        bos = self.bos_id if self.add_bos else None
        return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that goes on behind others: as `encode_prompt`, without BOS and without a first space.

        Raises TokenizerError for a text that is no Unicode.
        """
        return self._encode(text, self._all_literals, {}, continues=True)

    def begins_with_bos(self, text: str) -> bool:
        """Whether a text begins with the model's BOS, so that `encode_prompt` adds none."""
        return self.add_bos and next(self._all_literals(text), None) == self.bos_id

    def markers(self, template: str) -> Literals:
        """Names of tokens that a user's text must not become in chats with `parse_special=False`.

        Control tokens, and user-defined ones in brackets, such as <tool_call>, or that the template's source holds.
        Runs of blanks and HTML, as gemma has them, stay tokens.
        """
        found = self._markers.get(template)
        if found is None:
            pieces, types = self._vocabulary.pieces, self._vocabulary.types
            names = [pieces[i] for i in np.flatnonzero(np.isin(types, SPECIAL))]
            user_defined = (pieces[i] for i in np.flatnonzero(types == TokenType.USER_DEFINED))
            names += [name for name in user_defined if _MARKER.fullmatch(name) or name in template]
            found = Literals(names)
            self._markers = {template: found}  # kept for the last template alone
        return found

    def _encode(
        self, text: str, literals: Partition, unmask: Mapping[int, int], *, continues: bool = False
    ) -> list[int]:
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode is a {type(text).__name__}; give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate at character {error.start}; decode it as UTF-8"
            ) from None
        ids: list[int] = []
        after_token = not continues
        for fragment in literals(text):
            if isinstance(fragment, int):
                ids.append(fragment)
                after_token = True
                continue
            prefix = SPACE if self._space_prefix and after_token else ""
            after_token = False
            if not unmask:
                for part in self._encoder.encode(fragment, prefix):
                    ids += part
                continue
            found = self._encode_text(prefix + fragment.translate(unmask))
            if not self.control_ids.isdisjoint(found):  # merging formed a new token of its characters
                pieces = re.split(f"([{re.escape(''.join(map(chr, unmask)))}])", prefix + fragment)
                found = [i for piece in pieces if piece for i in self._encode_text(piece.translate(unmask))]
            ids += found
        return ids

    def _encode_text(self, text: str) -> list[int]:
        return [i for part in self._encoder.encode(text) for i in part]

    @keywords()
    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Control tokens are shown as their names, and bytes that are no UTF-8 as U+FFFD.

        It undoes `encode`. So a leading BOS is not shown if the model adds one, and one leading space is removed if the
        model adds one.

        Args:
            ids: Token ids.

        Raises:
            TokenizerError: An id is outside the vocabulary.
        """
        stream = self.streamer()
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def streamer(self, *, continues: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time.

        `continues` = the ids continue a text, so a leading space is kept.
        """
        if continues:
            return StreamDecoder(self.token_bytes, None, False)
        return StreamDecoder(self.token_bytes, self.bos_id if self.add_bos else None, self._space_prefix)

    def token_bytes(self, id: int) -> bytes:
        """Bytes that a token adds to a text, as UTF-8 that may be incomplete.

        A control token gives its name, as in `decode`; an unused token gives nothing. Raises TokenizerError for an id
        outside the vocabulary.
        """
        piece, kind = self._token(id)
        if kind in SPECIAL or kind == TokenType.USER_DEFINED:
            return piece.encode()
        if kind == TokenType.BYTE:
            return bytes([int(piece[3:5], 16)])
        if kind != TokenType.NORMAL:
            return b""
        return piece.replace(SPACE, " ").encode() if self._spells_spaces else bpe.piece_bytes(piece)

    def token_text(self, id: int) -> str:
        r"""A token for displays: its text, with \xff for bytes that are no UTF-8 alone; an unused token's name."""
        return self.token_bytes(id).decode("utf-8", "backslashreplace") or self._token(id)[0]

    def _token(self, id: int) -> tuple[str, int]:
        try:
            position = index(id)
        except TypeError:
            raise TokenizerError(f"{id!r:.60} is no token id; give integers") from None
        if not 0 <= position < self.vocab_size:
            raise TokenizerError(f"token id {position} is outside the vocabulary of {self.vocab_size} tokens")
        return self._vocabulary.pieces[position], int(self._vocabulary.types[position])


def _chat_templates(fields: Fields) -> dict[str, str]:
    """Templates by name: `tokenizer.chat_template` is "default", other keys end in the name. No blank ones."""
    templates = fields.texts("tokenizer.chat_template.")
    if default := fields.text("tokenizer.chat_template"):
        templates["default"] = default
    return {name: source for name, source in templates.items() if source.strip()}


def _rule(pre: str, fields: Fields, source: str) -> Rule:
    """The rule of a name. A Hugging Face directory may say another `ignore_merges` than llama.cpp has for the name."""
    if not pre:
        warnings.warn(
            f"{source}: tokenizer.ggml.pre is missing, so text is split by a default rule and answers may be worse; "
            "convert the model again with a current llama.cpp",
            stacklevel=4,
        )
        return DEFAULT
    if pre not in RULES:
        raise UnsupportedError(f"{source}: tokenizer.ggml.pre is {pre!r:.60}, a split rule that forge does not know")
    rule = RULES[pre]
    return replace(rule, ignore_merges=fields.flag("ignore_merges", rule.ignore_merges))


def _literals(vocabulary: Vocabulary, pre: str, fields: Fields) -> tuple[Partition, Partition]:
    """The tokens that are matched literally in text, without and with control tokens.

    A GGUF file does not say which of them swallow blanks: names decide, as in llama.cpp. A Hugging Face directory does.
    """
    types = vocabulary.types
    pieces = vocabulary.pieces
    user_defined = [pieces[i] for i in np.flatnonzero(types == TokenType.USER_DEFINED)]
    control = [pieces[i] for i in np.flatnonzero(np.isin(types, SPECIAL))]
    model_name = (fields.text("general.name") or "").lower()
    strip_left = {"<mask>"} if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") else set()
    strip_right = set[str]()
    if "phi-3" in model_name or "phi3" in model_name:
        strip_right = {*user_defined, *control, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"}

    for name, strip in (("lstrip_token_ids", strip_left), ("rstrip_token_ids", strip_right)):
        strip.update(pieces[i] for i in fields.ids(name, len(pieces), len(pieces)))

    def partition(tokens: list[str]) -> Partition:
        return Partition({token: vocabulary.ids[token] for token in tokens}, strip_left, strip_right)

    return partition(user_defined), partition(user_defined + control)
