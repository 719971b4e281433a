"""The name of the split rule that a `tokenizer.json` describes: from its stages to a name in `pretokenizers.RULES`.

llama.cpp's converter finds the name by a hash of encoded text, which a vocabulary that was extended no longer has. Here
the patterns themselves are compared, after spellings of the same pattern are made one.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from forge.errors import FormatError, UnsupportedError
from forge.tokenizer.pretokenizers import RULES

_GPT2 = RULES["gpt-2"].stages[0]
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
"""Components of a `tokenizer.json`, and what the members of a Sequence are called in each."""
_MAX_SHOWN, _MAX_KEYS = 400, 8
_PUNCTUATION = "punctuation"
"""The stage `Punctuation`: ASCII punctuation and Unicode's, in runs."""

# Spellings of the same pattern, and the one that is compared, in the order in which they are replaced.
_CONTRACTION = "<'s>"
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"\"", '"'),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTION),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTION),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTION),
    ("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _CONTRACTION),
    ("'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])", _CONTRACTION),
    (f"(?:{_CONTRACTION})", _CONTRACTION),
    ("]?+", "]?"),  # possessive: no character that they take could be one of the rest
    ("]++", "]+"),
    ("}++", "}+"),
    ("]*+", "]*"),
    (r"\s*[\r\n]|", r"\s*[\r\n]+|"),  # the blanks before the last line feed hold the others
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"\s{1}", r"\s"),
    (r"|[\n]+", r"|\n+"),
    (r"\s+$", r"\s+\z"),
    # Two ranges hold blanks, which llama.cpp leaves out.
    ("[一-龥ࠀ-一가-퟿]+", r"[一-龥ࠀ-一가-퟿&&\S]+"),
    ("‘-‟\u3000-。", "‘-‟、-。"),
)

# Patterns of published files for which llama.cpp, and so `RULES`, has another text.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASES = rf"{_LEAD}[{_UPPER}]*[{_LOWER}]+@|{_LEAD}[{_UPPER}]+[{_LOWER}]*@"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = _CASES.replace("@", f"{_CONTRACTION}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDS
_NOT_HAN = r"&&[^\p{Han}]"
_KIMI = rf"{_LEAD}[{_UPPER}{_NOT_HAN}]*[{_LOWER}{_NOT_HAN}]+@|{_LEAD}[{_UPPER}{_NOT_HAN}]+[{_LOWER}{_NOT_HAN}]*@"
_PUBLISHED: dict[str, tuple[str, ...]] = {
    "gpt-4o": (_GPT4O,),
    "tekken": (_CASES.replace("@", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDS,),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O),
    "kimi-k2": (
        r"[\p{Han}]+|" + _KIMI.replace("@", f"{_CONTRACTION}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _ENDS,
    ),
    "seed-coder": (rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+" + _ENDS,),
    "youtu": (RULES["youtu"].stages[0], _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "falcon": (_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def split_name(tokenizer: Mapping[str, Any], where: str) -> str:
    """The name for `tokenizer.ggml.pre`, for a byte-level BPE.

    Of names with the same rule it is the first whose `ignore_merges` is the file's, else the first: the caller writes
    what the file says. A pattern whose matches are kept and whose rest is removed is as good as an isolated one, as
    each of these matches any text.

    Args:
        tokenizer: The object in a `tokenizer.json`.
        where: Begins messages.

    Raises:
        UnsupportedError: Text is normalized by more than NFC, which llama.cpp does not, or no rule has these stages.
    """
    for step in steps(tokenizer, "normalizer", where):
        if step.get("type") != "NFC":
            raise UnsupportedError(
                f"{where}: its normalizer is {describe(step)}; forge knows NFC alone for a vocabulary of bytes"
            )
    stages = tuple(filter(None, (_stage(step, where) for step in steps(tokenizer, "pre_tokenizer", where))))
    names = _NAMES.get(stages)
    if names is None:
        found = shown(" then ".join(stage[:_MAX_SHOWN] for stage in stages[:_MAX_SHOWN]), _MAX_SHOWN) or "no pattern"
        raise UnsupportedError(f"{where}: text is split by a rule that forge does not know: {found}")
    ignores = ignores_merges(tokenizer, where)
    return next((name for name in names if RULES[name].ignore_merges == ignores), names[0])


def ignores_merges(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Whether a word that is a token is taken whole. Raises FormatError for what is neither true nor false."""
    model = tokenizer.get("model")
    flag = model.get("ignore_merges") if isinstance(model, Mapping) else None
    if flag is not None and not isinstance(flag, bool):
        raise FormatError(f"{where}: model.ignore_merges should be true or false, not {flag!r:.60}")
    return bool(flag)


def steps(tokenizer: Mapping[str, Any], key: str, where: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a component of a `tokenizer.json`, a key of `_MEMBERS`: none, one step, or a Sequence of steps.

    Raises FormatError for a component, or a member of a Sequence, of another form: it does something that nobody reads.
    """
    component = tokenizer.get(key)
    if component is None:
        return
    if not isinstance(component, Mapping) or not isinstance(component.get("type"), str):
        raise FormatError(f"{where}: its {key} should be an object with a type, not {component!r:.60}")
    if component["type"] != "Sequence":
        yield component
        return
    members = component.get(_MEMBERS[key])
    if not isinstance(members, list) or None in members:
        raise FormatError(f"{where}: the Sequence of its {key} should have a list of {_MEMBERS[key]}")
    for member in members:
        yield from steps({key: member}, key, where)


def shown(text: str, limit: int) -> str:
    """A text of a file for a message: as it is, but with escapes for what does not print, and of bounded length."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)


def describe(step: Mapping[str, Any]) -> str:
    """A step for a message: its type and what it does."""
    more = [f"{shown(key, 40)} {value!r:.60}" for key, value in step.items() if key != "type"]
    return ", ".join([f"{step['type']!r:.40}", *more[:_MAX_KEYS]])


def _stage(step: Mapping[str, Any], where: str) -> str:
    """The pattern of a step, as spelled here. Empty = it splits nothing."""
    kind, behavior = step.get("type"), step.get("behavior")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return _GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind == "Punctuation" and behavior == "Contiguous":
        return _PUNCTUATION
    pattern = step.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping):
        regex, literal = pattern.get("Regex"), pattern.get("String")
        how = (behavior, bool(step.get("invert")))
        if isinstance(literal, str) and how == ("Isolated", False):
            return _spelled(re.escape(literal))
        if isinstance(regex, str) and how in (("Isolated", False), ("Removed", True)):
            return _spelled(regex)
        if isinstance(regex, str) and how == ("MergedWithNext", False):  # superbpe's groups of three digits
            return _spelled(regex)
    raise UnsupportedError(f"{where}: text is split by {describe(step)}, which forge does not know")


def _spelled(pattern: str) -> str:
    pattern = re.sub(r"\\x\{([0-9A-F]{2,5})\}", lambda code: chr(int(code[1], 16)), pattern)
    for other, spelling in _SPELLINGS:
        pattern = pattern.replace(other, spelling)
    return pattern


def _names() -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = {}
    known = [(name, rule.stages) for name, rule in RULES.items() if rule.stages]
    for name, stages in [*_PUBLISHED.items(), *known]:
        found.setdefault(tuple(map(_spelled, stages)), []).append(name)
    return found


_NAMES = _names()
"""The names of each rule by its stages, the usual name first."""
