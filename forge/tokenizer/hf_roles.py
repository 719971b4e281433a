"""The ids with a role that the files of a Hugging Face tokenizer name, and whether BOS and EOS are added to a text."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from forge.errors import FormatError, UnsupportedError
from forge.tokenizer.split_names import describe, steps

KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # as llama.cpp spells it
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
"""The key of each role, behind "tokenizer.ggml."."""

_FAMILIES = {
    "glm4": {"bos": "[gMASK]", "eot": "<|user|>", "eom": "<|observation|>", "unk": "<|endoftext|>"},
    "glm4moe": {"bos": "[gMASK]", "eot": "<|user|>", "eom": "<|observation|>", "unk": "<|endoftext|>"},
    "muse-glimmer": {"eot": "<|eot|>"},
}
"""Roles that llama.cpp's converter knows by the family, where the files name none."""


def role_fields(
    tokenizer: Mapping[str, Any],
    configs: tuple[Mapping[str, Any], ...],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    architecture: str,
    where: str,
) -> dict[str, int | bool]:
    """Keys of ids and flags, without "tokenizer.ggml.".

    A token's text comes from the first of `configs` (tokenizer_config.json, special_tokens_map.json) that has it, or
    from the post-processor; an id without text from config.json. What the post-processor adds goes before what
    tokenizer_config.json says.

    Args:
        tokenizer: tokenizer.json.
        configs: tokenizer_config.json, then special_tokens_map.json.
        config: config.json.
        ids: The ids of all tokens that the model has, by their text.
        architecture: `general.architecture`.
        where: tokenizer.json, for messages.

    Raises:
        FormatError: The post-processor is of another form.
        UnsupportedError: It is of a kind that forge does not know.
    """
    texts = {role: text for role in KEYS if (text := _text(configs, f"{role}_token"))}
    adds = dict(_processed(tokenizer, texts, where))
    for role in ("bos", "eos", "sep"):
        flag = configs[0].get(f"add_{role}_token")
        if isinstance(flag, bool):
            adds.setdefault(role, flag)
    found = {role: ids[text] for role, text in texts.items() if text in ids}
    for role in KEYS:
        given = config_value(config, f"{role}_token_id")
        if isinstance(given, int) and not isinstance(given, bool) and given in ids.values():
            found.setdefault(role, given)
    for role, text in _FAMILIES.get(architecture, {}).items():
        if text in ids:
            found.setdefault(role, ids[text])
    flags = {f"add_{role}_token": adds[role] for role in ("bos", "eos", "sep") if role in adds}
    return {KEYS[role]: i for role, i in found.items()} | flags


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A value of config.json, of a model of several parts that of its text part."""
    value, part = config.get(key), config.get("text_config")
    return part.get(key) if value is None and isinstance(part, Mapping) else value


def _text(configs: tuple[Mapping[str, Any], ...], key: str) -> str | None:
    for config in configs:
        value = config.get(key)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str) and value:
            return value
    return None


def _processed(tokenizer: Mapping[str, Any], texts: dict[str, str], where: str) -> Iterator[tuple[str, bool]]:
    """What the post-processor adds. Tokens that it names and `texts` lacks go there; an EOS of its own comes first.

    This follows the converter: a template is read by its first and last token. More tokens at an end, as GLM-4's <sop>,
    are left to the chat template, with a warning.
    """
    adds: dict[str, bool] = {}
    for step in steps(tokenizer, "post_processor", where):
        kind = step["type"]
        if kind == "ByteLevel":
            adds = {"bos": False, "eos": False} | adds
        elif kind == "RobertaProcessing":
            adds |= {"bos": True, "eos": True, "sep": True}
        elif kind == "TemplateProcessing":
            parts, pair = _template(step, "single", where), _template(step, "pair", where)
            if extra := [text for text in map(_special, parts[1:-1]) if text]:
                warnings.warn(
                    f"{where}: its post-processor adds {extra[0]!r:.40}, too, which forge and llama.cpp leave out: "
                    "they add one token before a text and one behind it",
                    stacklevel=2,
                )
            first, last = (_special(parts[i]) if len(parts) > 1 else None for i in (0, -1))
            if first:
                texts.setdefault("bos", texts.get("cls") or first)
                adds["bos"] = first in (texts["bos"], texts.get("cls"))
            if last:
                if "eos" in texts and texts["eos"] != last:
                    texts.setdefault("eot", texts["eos"])
                texts["eos"] = last
                adds["eos"] = True
            if between := _between(pair, first, last):
                adds["sep"] = not last and between in (texts.get("sep"), texts.get("eos"))
        else:
            raise UnsupportedError(f"{where}: its post-processor is {describe(step)}, which forge does not know")
    yield from adds.items()


def _template(step: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """The parts of a template: tokens and texts. Raises FormatError for what is neither."""
    parts = step.get(key)
    parts = [] if parts is None else parts
    known = {"SpecialToken", "Sequence"}
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and len(part) == 1 and known >= part.keys() and _id(part) for part in parts
    ):
        raise FormatError(f"{where}: {key!r} of its post-processor should be a list of tokens and texts")
    return parts


def _id(part: Mapping[str, Any]) -> str | None:
    (value,) = part.values()
    text = value.get("id") if isinstance(value, Mapping) else None
    return text if isinstance(text, str) else None


def _between(pair: list[Any], first: str | None, last: str | None) -> str | None:
    """The token between two texts, in a template of a pair."""
    parts = pair[bool(first and pair and _special(pair[0]) == first) :]
    parts = parts[: len(parts) - bool(last and parts and _special(parts[-1]) == last)]
    return _special(parts[1]) if len(parts) > 2 else None


def _special(part: Mapping[str, Any]) -> str | None:
    """The token of a template's part, None for a text."""
    return _id(part) if "SpecialToken" in part else None
