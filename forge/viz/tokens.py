"""What pictures of a text share: its ids, and its tokens as people read them."""

from __future__ import annotations

from collections.abc import Iterable

from forge.keywords import refusal
from forge.llm import LLM
from forge.runtime.encoder import Prompt
from forge.runtime.prompts import is_single


def ids_of(llm: LLM, text: Prompt) -> list[int]:
    """The ids of one text, as of a prompt. Raises ParameterError for a list of texts, and for none."""
    if not isinstance(llm, LLM):
        raise refusal("llm", "a model that forge.load gives", llm)
    if not is_single(text, "text"):
        raise refusal("text", "one text: a string, or a list of token ids that is not empty", text)
    ids = llm.encode_prompt(text)
    llm.engine.check_ids(ids)
    return ids


def texts_of(llm: LLM, ids: Iterable[int]) -> list[str]:
    """The text of each token."""
    return [llm.tokenizer.token_text(token) for token in ids]
