"""The split rule of each `tokenizer.ggml.pre`: how BPE cuts text into words before it merges bytes or characters.

A rule is a list of stages. A stage cuts every piece of the stage before it: each match of its pattern becomes a piece,
and so does the text between two matches. A lookahead sees the end of a piece as the end of the text. Names, patterns
and flags follow llama.cpp, the authority for token ids, even if the `tokenizer.json` of a model differs.
"""

from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers


def _any(*alternatives: str) -> str:
    return "|".join(alternatives)


# Alternatives of patterns.
_SUFFIX = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_DIGIT = r"\p{N}"
_DIGITS = r"\p{N}{1,3}"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATH_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LINES = r"\s*[\r\n]+"
_BLANKS = r"\s+(?!\S)|\s+"
# Capital letters, then small letters. Letters beyond ASCII count as both.
_CAMEL = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"

# Whole stages.
_GPT2 = _any("'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", _BLANKS)
_LLAMA3 = _any(_SUFFIX, _WORD, _DIGITS, _MARKS, _LINES, _BLANKS)
_QWEN2 = _any(_SUFFIX, _WORD, _DIGIT, _MARKS, _LINES, _BLANKS)
_GPT4O = _any(f"{_CAMEL}(?:{_SUFFIX})?", f"{_CAPITALS}(?:{_SUFFIX})?", _DIGITS, _PATH_MARKS, _LINES, _BLANKS)
_DEEPSEEK3_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = _any(_DEEPSEEK3_WORDS, r" ?[\p{P}\p{S}]+[\r\n]*", _LINES, _BLANKS)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_ASIAN = r"[一-龥ࠀ-一가-퟿&&\S]+"
_HAN = r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"

# Digits in threes from the right. The text before a number stays with its first group. One lookahead to the end of the
# number would do the same in quadratic time; the three stages take linear time.
_DIGITS_FROM_RIGHT = (r"[^\p{N}]+\p{N}*|\p{N}+", r"(?<=\p{N})(?:\p{N}{3})+\z", r"(?<![^\p{N}])\p{N}{3}")

_DEEPSEEK_LLM_LETTERS = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}"
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}"
    r"\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}"
    r"\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}"
    r"\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}"
    r"\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}"
    r"\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}"
    r"\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}"
    r"\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}"
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}"
    r"\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}"
    r"\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """The split rule of a family of BPE vocabularies, and its defaults for keys that a file lacks."""

    stages: tuple[str, ...]
    """None = the pieces are text with ▁ for spaces, merged a line at a time, and not bytes spelled as characters."""
    ignore_merges: bool = False
    """Whether a word that is a token is taken whole, even if no merges lead to it."""
    add_bos: bool = False
    always_bos: bool = False
    """Whether BOS is added even if the file says that it is not."""
    joins_next: bool = False
    """Whether the second-last stage leaves the text behind a match attached to it."""
    keeps_line_ends: bool = False
    """Whether a run of line feeds that is a token is taken whole, even if no merges lead to it."""

    def splitter(self) -> pre_tokenizers.PreTokenizer:
        """The rule as a pre-tokenizer, whose last stage spells bytes as characters."""
        behaviors = ["isolated"] * len(self.stages)
        if self.joins_next:
            behaviors[-2] = "merged_with_next"
        stages = [pre_tokenizers.Split(Regex(s), b) for s, b in zip(self.stages, behaviors, strict=True)]
        return pre_tokenizers.Sequence([*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _rule(*stages: str, **flags: bool) -> Rule:
    return Rule(stages, **flags)


DEFAULT = _rule(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
"""For files that name no rule."""

_llama3 = _rule(_LLAMA3)

_FAMILIES: dict[str, Rule] = {
    "default": DEFAULT,
    "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe modern-bert gigachat "
    "a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4": _rule(_GPT2),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _rule(_DIGIT, _GPT2),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": replace(
        _llama3, ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": _llama3,
    "glm4 glm5": replace(_llama3, ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2 bailingmoe bailingmoe2 "
    "llada-moe": _rule(_QWEN2),
    "qwen35": _rule(
        _any(_SUFFIX, _MARKED_WORD, _DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES, _BLANKS),
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _rule(_DIGITS, _CJK, _DEEPSEEK3),
    "spark2_5": _rule(
        _DIGITS,
        _CJK,
        _any(_DEEPSEEK3_WORDS, r" ?[\p{P}\p{S}]+", r"[\r\n]", _BLANKS),
        _DIGIT,
    ),
    "deepseek-llm": _rule(
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟、-。]+", r"\s+\z", _ASIAN, r"\p{N}+"
    ),
    "deepseek-coder": _rule(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, _DIGIT),
    "falcon": _rule(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "poro-chat bloom gpt3-finnish": _rule(_BLOOM),
    "viking": _rule(_BLOOM, _DIGIT),
    "tekken": _rule(
        _any(_CAMEL, _CAPITALS, _DIGIT, _PATH_MARKS, _LINES, _BLANKS),
        ignore_merges=True,
        add_bos=True,
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _rule(_GPT4O),
    "granite-embed-multi-97m": _rule(_GPT4O.replace(r"[\p{L}&&", r"[\p{L}\p{M}&&"), ignore_merges=True),
    "chameleon": _rule(
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        _DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
        add_bos=True,
    ),
    "superbpe": _rule(r"\p{N}+", r"(?:[0-9]{3})+(?![0-9])", "[0-9]{3}(?=[0-9]{3})", joins_next=True),
    "seed-coder": _rule(_any(_SUFFIX, _WORD, _DIGIT, r" ?[^\s\p{L}\p{N}]+", _LINES, _BLANKS)),
    "ufakzeka": _rule(_any(_WORD, _DIGIT, _MARKS, _LINES, _BLANKS)),
    "laguna": _rule(r"[^\n]+|\n+", _QWEN2),
    "exaone-moe": _rule(
        _any(
            _SUFFIX,
            r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            _DIGIT,
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            _LINES,
            _BLANKS,
        )
    ),
    "jais-2": _rule(
        _any(
            *(_SUFFIX, _WORD, _DIGITS, _MARKS, _LINES),
            *(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)),
            *(r"\s{1,2}(?!\S)", r"\s"),
        )
    ),
    "minicpm5": _rule(
        _DIGITS,
        _any(_SUFFIX, _WORD, r"\p{N}+", _MARKS, _LINES, _BLANKS),
        ignore_merges=True,
    ),
    "youtu": _rule(
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
        _any(f"{_MARKED_WORD}(?:{_SUFFIX})?", _DIGIT, _PATH_MARKS, _LINES, _BLANKS),
        ignore_merges=True,
    ),
    "tiny_aya cohere2moe": _rule(
        *_DIGITS_FROM_RIGHT, _any(f"{_MARKED_WORD}(?:{_SUFFIX})?", _DIGITS, _PATH_MARKS, _LINES, _BLANKS)
    ),
    "afmoe": _rule(
        *_DIGITS_FROM_RIGHT, r"[一-鿿㐀-䶿\x{8C48}-\x{FAFF}぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+", _DEEPSEEK3
    ),
    "kimi-k2": _rule(
        _any(
            f"[{_HAN}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_SUFFIX})?",
            *(_DIGITS, _MARKS, _LINES, _BLANKS),
        )
    ),
    "gemma4 granite-embed-multi-311m": _rule(add_bos=True, always_bos=True, keeps_line_ends=True),
    "sarvam-moe": _rule(),
}

RULES: dict[str, Rule] = {name: rule for names, rule in _FAMILIES.items() for name in names.split()}
"""The rules by name. llama.cpp also knows whitespace, for an encoder that forge does not run."""
