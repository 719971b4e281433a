"""Write harmony.json: how openai-harmony reads answers of gpt-oss, and the prompt that it writes for conversations.

It needs openai-harmony, and its vocabulary in a file: TIKTOKEN_ENCODINGS_BASE=FOLDER python make_harmony.py
"""

import json
from pathlib import Path
from typing import Any

from openai_harmony import HarmonyEncodingName, Role, StreamableParser, load_harmony_encoding

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
NEXT = "<|start|>assistant"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'
ANSWERS = [
    f"{ANALYSIS}I think.\n\nSo.<|end|>{NEXT}{FINAL}Yes: é🙂 <b>\n",
    f"{FINAL}Yes.",
    f"{ANALYSIS}One.<|end|>{NEXT}{ANALYSIS}Two.<|end|>{NEXT}{FINAL}Three.",
    f"{ANALYSIS}I look.<|end|>{NEXT}{CALL}<|call|>",
    f"{ANALYSIS}I look.<|end|>{NEXT} to=functions.get_weather<|channel|>commentary json<|message|>"
    '{"city": "Paris", "days": 2}<|call|>',
    " to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
    f"{ANALYSIS}Plan.<|end|>{NEXT}<|channel|>commentary<|message|>I will look.<|end|>{NEXT}{CALL}<|call|>",
    f"{CALL}<|end|>{NEXT}<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{}}<|call|>",
    f"{ANALYSIS}Never ends",
    f"{FINAL}Never ends: <| and <|endx|> {{",
    f'{FINAL}{{"city": "Paris"}}',
    "<|channel|>analysis to=browser.search<|message|>cats<|call|>",
    f"{ANALYSIS}<|end|>{NEXT}{FINAL}",
]


def messages_of(encoding: Any, text: str) -> list[dict[str, Any]]:
    parser = StreamableParser(encoding, Role.ASSISTANT)
    for token in encoding.encode(text, allowed_special="all"):
        parser.process(token)
    parser.process_eos()
    return [
        {"channel": one.channel, "recipient": one.recipient, "text": "".join(part.text for part in one.content)}
        for one in parser.messages
    ]


def main() -> None:
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    found = [{"text": text, "messages": messages_of(encoding, text)} for text in ANSWERS]
    Path(__file__).with_name("harmony.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
