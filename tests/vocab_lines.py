"""Lines that try tokenizers: `LINES`, the same ones everywhere, for `scripts/make_vocab_goldens.py` and its tests."""

import random
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

NUM_LINES = 2048
BLOCK = 16
"""Lines whose ids share one digest of a golden."""
DIGEST = 4
"""Characters of a digest."""

_TEXT = """
Hello world the quick brown fox jumps over lazy dogs HTTPServer camelCase XMLHttpRequest naïve café Äpfel Straße
l'été déjà œuvre ¿Cómo está? mañana São Paulo ação Ünlü İstanbul'da ısı çığ Việt Nam tiếng người Łódź źdźbło
Привет мир ёлка Київ їжак Καλημέρα κόσμε ἄνθρωπος שלום עולם مرحبا بالعالم العربية فارسی۔ اردو، नमस्ते हिन्दी বাংলা
தமிழ் తెలుగు ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ සිංහල สวัสดีชาวโลก ที่นี่ ລາວ ភាសាខ្មែរ မြန်မာ བོད་སྐད་ ქართული Հայերեն አማርኛ
你好世界 人工智能，模型。 繁體中文！ ひらがな カタカナ 日本語の文 ﾊﾝｶｸ 한국어 안녕하세요 ㄱㄴㄷ ㄅㄆㄇ 𠮷野家
ｆｕｌｌ １２３ ꧠꩠ ⼀⼈ 𝒜𝓁𝓅𝒽𝒶 ᏣᎳᎩ 𐐀𐐨 ǅ ǆ ʰʲ ﬁ ﬀ ª º ⅷ Ⅻ ½ ¾ ² ³ ٣٤٥ १२३ ๑๒ 𝟘𝟙 ① ㊀
"""
_WORDS = _TEXT.split()
_CODE = (
    *("def f(x: int) -> int:\n    return x**2  # ok!!\n", "for (int i=0; i<n; ++i) { a[i] += b[i]; }\n\n\n"),
    *('{"a": [1, 2.5e-3, null], "b": {"c": "d\\n"}}', "SELECT * FROM t WHERE id=1234567 AND x<>'it''s';"),
    *('<div class="x">&nbsp;<b>hi</b></div>\n', 'if [ -f /usr/bin/env ]; then\n\techo "$HOME"\nfi\r\n'),
    *("\\begin{align} x_{1}^2 &= \\frac{a}{b} \\\\\n", 'fn main() { println!("{:?}", vec![1u8; 4]); }'),
    *("- [ ] **bold** _it_ ~~no~~ `code`\n| a | b |\n|---|---|\n", "import os\r\nimport sys\r\n\r\n\tclass A(B):\r\n"),
    *("https://example.org/a/b?c=d&e=%20f#g", "user.name+tag@mail.example.com", "C:\\Windows\\System32\\*.dll"),
    *("0xDEADBEEF 1_000_000 3.14159e+00 -17 +1 1,234,567.89 12:34:56 2024-01-31", "a->b::c!=d===e<=f>>=g||h&&i"),
)
_CONTRACTIONS = (
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'T",
    "'RE",
    "'Ve",
    "'M",
    "'lL",
    "'D",
    "’s",
    "'x",
    "'",
)
_EMOJI = ("😀", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "❤️", "☂", "⚡️", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "™", "©", "🫠", "♂️")
_NAMES = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "<unk>", "<|channel|>", "<|channel>"),
    *("<sentinel:12>", "IMGIMGABCDZ", "IMGIMGABCDEZ", "<tool_call>", "[e~[", "<｜end▁of▁sentence｜>", "<0x0A>", "▁the"),
)
_MARKS = tuple("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + tuple(
    "…。，、！？；：“”‘’—·«»¿¡§¶†‰€£¥±×÷≤≠∑√∞←→■●★♪。｜～﹏︰〿﻿"
)
_BLANKS = (
    " ",
    "  ",
    "   ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    " \n",
    "\n ",
    "\t\t",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u2028",
    "\x0b",
    "\x0c",
    "\x85",
)
_OTHERS = (
    "\x00",
    "\x01",
    "\x07",
    "\x1b[0m",
    "\x7f",
    "\u200b",
    "\u200d",
    "\u2060",
    "\ufeff",
    "\ufffd",
    "\ufffd\ufffd",
    "\ue000",
    "\u0301",
    "\u0308",
    "\u20e3",
)
_RANGES = (  # assigned characters of Unicode 14 and before
    *((0x21, 0x7F), (0xA1, 0x250), (0x250, 0x2B0), (0x300, 0x370), (0x391, 0x3A2), (0x3A3, 0x400), (0x400, 0x530)),
    *((0x5D0, 0x5EB), (0x620, 0x660), (0x660, 0x66A), (0x904, 0x93A), (0x93A, 0x970), (0xE01, 0xE3B), (0x10D0, 0x10FF)),
    *((0x1100, 0x1200), (0x1E00, 0x1F00), (0x2010, 0x2028), (0x2030, 0x205F), (0x20A0, 0x20C0), (0x2100, 0x218C)),
    *((0x2190, 0x2400), (0x2460, 0x2500), (0x3001, 0x3040), (0x3041, 0x3097), (0x30A0, 0x3100), (0x4E00, 0x9FA6)),
    *(
        (0xAC00, 0xD7A4),
        (0xFF01, 0xFFBF),
        (0x10400, 0x10450),
        (0x1D400, 0x1D455),
        (0x1D7CE, 0x1D800),
        (0x1F600, 0x1F650),
    ),
    *((0x20000, 0x2A6D7), (0x20000, 0x20100)),
)
_RUNS = (
    "a",
    "A",
    "aB",
    "1",
    "12",
    " ",
    "\n",
    "\t",
    "\r\n",
    " \n",
    "!",
    "=",
    "_",
    "-",
    "中",
    "é",
    "😀",
    "e\u0301",
    "ी",
    "٣",
    "ab ",
    "/",
    "'s",
)


def _lines() -> list[str]:
    source = random.Random(20)

    def below(limit: int) -> int:
        return int(source.random() * limit)  # the sequence of random() is the same in all versions of Python

    def one(of: Sequence[str]) -> str:
        return of[below(len(of))]

    def digits() -> str:
        return "".join(one("0123456789") for _ in range(1 + below(14)))

    def character() -> str:
        first, end = _RANGES[below(len(_RANGES))]
        return chr(first + below(end - first))

    kinds: tuple[Callable[[], str], ...] = (
        lambda: one(_WORDS),
        lambda: one(_WORDS),
        lambda: one(_WORDS) + one(_CONTRACTIONS),
        digits,
        lambda: one(_MARKS),
        lambda: "".join(one(_MARKS) for _ in range(1 + below(4))),
        lambda: one(_EMOJI),
        lambda: one(_NAMES),
        lambda: one(_OTHERS),
        character,
        lambda: "".join(character() for _ in range(1 + below(6))),
        lambda: one(_CODE),
    )
    joints = ("", "", " ", " ", " ", one)

    def joint() -> str:
        found = joints[below(len(joints))]
        return found if isinstance(found, str) else one(_BLANKS)

    lines = [*_WORDS, *_CODE, *(word + end for word in ("I", "you", "DON", "x1") for end in _CONTRACTIONS)]
    lines += [f"{one(_WORDS)}{end}{word}" for end in _CONTRACTIONS for word in ("and", "The", "12", "été", "Ж")]
    lines += [run * count for run in _RUNS for count in (2, 3, 4, 5, 7, 64, 700)]
    lines += [
        f"{run * (1 + below(9))}{one(_WORDS)}{run * below(9)}{one(_RUNS) * below(9)}" for run in _RUNS for _ in "ab"
    ]
    lines += [" ".join(one(_WORDS) for _ in range(4 + below(9))) for _ in range(200)]
    while len(lines) < NUM_LINES:
        lines.append("".join(kinds[below(len(kinds))]() + joint() for _ in range(1 + below(10))))
    return lines


LINES = _lines()


def digests(ids: Sequence[Sequence[int]]) -> str:
    """Three bytes of BLAKE2 for the ids of each BLOCK lines, in Base64."""
    blocks = (ids[i : i + BLOCK] for i in range(0, len(ids), BLOCK))
    hashes = (blake2b(repr([list(line) for line in block]).encode(), digest_size=3).digest() for block in blocks)
    return b64encode(b"".join(hashes)).decode()


def end_metadata(case: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a vocabulary of the tokens and types of a case. Its eos is the first of them, with the id 3."""
    keys = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"], "eos_token_id": 3}
    keys |= {"tokens": ["a", "b", "ab", *case["tokens"]], "token_type": [1, 1, 1, *case["types"]]}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
