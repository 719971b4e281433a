"""A model that says what it is told: each token has one that follows it, whatever stands before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf_files import write_gguf

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
BEGIN, END = "<|begin|>", "<|end|>"
BROKEN = "<nan>"
"""A token behind which the model's logits are not finite."""
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}<tool_call><think></think></tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or () %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "<assistant>{{ say or '<say:' ~ messages[-1].content ~ '>' }}"
)
SCRIPTS = {
    "<say:calls>": [
        *(
            "<think>",
            "\n",
            "I should",
            " look.\n",
            "</think>",
            "\n\nI ",
            "look.\n\n",
            "<tool_call>",
            '\n{"name": "get_',
        ),
        *('weather", "argu', 'ments": {"city": "Paris"}', "}", "\n</tool_call>", "\n<tool_", 'call>{"name": "now"}'),
    ],
    "<say:one>": ["\r", '<tool_call>{"name": "now", "arguments": {}}'],
    "<say:malformed>": ["Well: ", '<tool_call>{"name": now}</tool_call>'],
    "<say:answer>": ["It is ", "20 °C."],
    "<say:broken>": ["So", BROKEN],
}
CONTROLS = ["<tool_call>", "<think>", "</think>"]


def write_scripted(path: Path, template: str, scripts: Mapping[str, Sequence[str]], controls: Sequence[str]) -> Path:
    """Write a GGUF file. scripts: by a prompt's last token, what follows it up to the model's end token.

    A text that stands in several places is one token: what follows it must be the same. A script whose last text stands
    in it before goes round without end. controls: control tokens.
    """
    pieces = list(dict.fromkeys([END, "<unk>", BEGIN, *controls, *scripts, *(p for s in scripts.values() for p in s)]))
    number = {piece: place for place, piece in enumerate(pieces)}
    following = np.full(len(pieces), number[END])
    for first, script in scripts.items():
        goes_round = script[-1] in script[:-1]
        for before, after in zip([first, *script], [*script, *([] if goes_round else [END])], strict=not goes_round):
            assert following[number[before]] in (number[END], number[after]), f"two tokens follow {before!r}"
            following[number[before]] = number[after]
    size, heads = 4 * -(-len(pieces) // 4), 2
    head = np.zeros((len(pieces), size), np.float32)
    for before, after in enumerate(following):
        head[after, before] = 1.0
    special = {END: CONTROL, "<unk>": UNKNOWN, BEGIN: CONTROL, **dict.fromkeys([*controls, *scripts], CONTROL)}
    embedding = np.eye(len(pieces), size, dtype=np.float32)
    if BROKEN in number:
        embedding[number[BROKEN]] = np.nan
    square, ones = np.zeros((size, size), np.float32), np.ones(size, np.float32)
    tensors = {
        "token_embd.weight": embedding,
        "output.weight": 8 * head,
        "output_norm.weight": ones,
        **{f"blk.0.{name}_norm.weight": ones for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": square for name in ("gate", "up", "down")},
    }
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 4096,
        "llama.embedding_length": size,
        "llama.feed_forward_length": size,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": size // heads,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * len(pieces),
        "tokenizer.ggml.token_type": [special.get(piece, USER_DEFINED) for piece in pieces],
        "tokenizer.ggml.bos_token_id": number[BEGIN],
        "tokenizer.ggml.eos_token_id": number[END],
        "tokenizer.ggml.unknown_token_id": number["<unk>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": template,
    }
    write_gguf(path, metadata, tensors)
    return path
