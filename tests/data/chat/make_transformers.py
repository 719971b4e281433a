"""Write transformers.json: what `transformers` renders for small templates that use each feature templates use.

Run it where transformers is installed: python tests/data/chat/make_transformers.py
"""

import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

USER = {"role": "user", "content": 'What is <b>5 & 7</b>, José? 你好 🙂 it\'s "fine"\n'}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}],
}
CHAT = [
    {"role": "system", "content": "  Be brief.  "},
    USER,
    {"role": "assistant", "content": "<think>hm</think>\n\n12"},
    {"role": "user", "content": "Sure?"},
]
PARTS = [{"type": "text", "text": "look "}, {"type": "text", "text": "here"}]
PARTS_CHAT = [{"role": "user", "content": PARTS}]
SAID = [*CHAT, {"role": "assistant", "content": "Yes: 12"}]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather, °C & <wind>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": ["string", "null", "string"]},
        "unit": {"enum": ["C", 3, "F"]},
        "area": {"type": "object", "properties": {"Lat": {"type": "Number"}}, "required": ["Lat"]},
        "any": {},
    },
    "required": ["city"],
}
SCHEMAS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}, {"type": "other"}]
THOUGHTS = ("reasoning_content", "thinking", "reasoning")

# name: (template, arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "special_tokens": ("[{{ bos_token }}|{{ eos_token }}|{{ unk_token }}]", {"messages": [USER]}),
    "tojson": ("{{ messages | tojson }}", {"messages": CHAT}),
    "tojson_options": (
        "{{ tools | tojson(indent=2) }}\n{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}"
        "{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2.5, true, none] | tojson }}",
        {"messages": [USER], "tools": TOOLS},
    ),
    "blocks_are_trimmed": (
        "head\n    {% for m in messages %}\n  {{ m.role }}\n    {%- if loop.last %}\n\n  end\n    {%- endif %}\n"
        "    {# a comment #}\n  {%+ if true %}kept{% endif +%}\n{% endfor %}\ntail\n\n",
        {"messages": CHAT},
    ),
    "loop_controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}",
        {"messages": CHAT},
    ),
    "namespace": (
        "{% set ns = namespace(system='', turns=0) %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content | trim %}{% else %}{% set ns.turns = ns.turns + 1 %}{% endif %}{% endfor %}"
        "{{ ns.system }} {{ ns.turns }}",
        {"messages": CHAT},
    ),
    "macro": (
        "{% macro turn(m, open='<', close='>') -%}\n    {{ open ~ m['role'] ~ close }}{{ caller() if caller }}\n"
        "{%- endmacro %}{% for m in messages %}{{ turn(m, open='[') }}{% endfor %}"
        "{% call turn(messages[0]) %}!{% endcall %}",
        {"messages": CHAT},
    ),
    "generation": (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\n{% set a = m.content %}\n"
        "{{ a }}{{ loop.index }}{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}\n{% endfor %}[{{ a }}]",
        {"messages": CHAT},
    ),
    "strings": (
        "{% set text = messages[2].content %}{{ text.split('</think>')[-1].lstrip('\\n') }}|{{ text[:7] | upper }}|"
        "{{ 'b' in 'abc' }}|{{ messages[::-1][0].role }}|{{ '%s-%s' % (1, 2) }}|{{ '{}!{x}'.format(1, x=2) }}|"
        "{{ text.startswith('<think>') and not text.endswith('x') }}|{{ \"it's\" | replace(\"'\", '\"') }}|"
        "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}|{{ none }}|{{ true }}|{{ 1 if false }}|{{ missing }}|é\n",
        {"messages": CHAT},
    ),
    "filters": (
        "{{ messages | map(attribute='role') | join(',') }}|{{ messages | selectattr('role', 'equalto', 'user') | "
        "list | length }}|{{ messages[0].items() | list }}|{{ {'b': 1, 'a': 2} | dictsort }}|{{ ' x ' | trim }}|"
        "{{ missing | default('d') }}|{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | "
        "first }}|{{ '<b>' | e }}|{{ 'a\nb' | indent(2) }}|{{ dict(a=1).a }}|{{ range(3) | sum }}|"
        "{{ 'aaa bbb' | wordwrap(3) }}|{{ '<i>x</i>' | striptags }}|{{ {'a': 1} | pprint }}",
        {"messages": CHAT},
    ),
    "tests": (
        "{{ tools is none }}{{ documents is none }}{{ documents is defined }}{{ other is defined }}"
        "{{ messages is iterable and messages is not string and messages is not mapping }}{{ messages[0] is mapping }}"
        "{{ 'a' is string }}{{ 3 is divisibleby 3 }}",
        {"messages": CHAT},
    ),
    "tools": (
        "{% if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% if not loop.last %}, {% endif %}"
        "{% endfor %}{% endif %}{% for m in messages %}{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}{% endfor %}'
        "{% elif m.content is not none %}{{ m.content }}{% endif %}{% endfor %}",
        {"messages": [USER, CALL, {"role": "tool", "content": "21"}], "tools": TOOLS},
    ),
    "documents_and_variables": (
        "{% for d in documents %}{{ d.title }}: {{ d.text }};{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
        "{{ level | tojson }}",
        {
            "messages": [USER],
            "documents": [{"title": "T", "text": "body"}],
            "enable_thinking": False,
            "level": {"a": [1, None]},
        },
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p['type'] }}>{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}",
        {"messages": [{"role": "user", "content": PARTS}, *CHAT]},
    ),
    "only_parts": (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}"
        "{% endif %}{% endfor %}\n{% endfor %}",
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *PARTS_CHAT]},
    ),
    "calls_without_content": (
        "{% for m in messages %}{% if m.content is not string %}<call>{% for c in m.tool_calls %}"
        "{{ c['function'] | tojson }}{% endfor %}{% else %}[{{ m.role }}{{ ' ' + m.name if m.name is defined }}]"
        "{{ m.content + '.' }}{% endif %}{% endfor %}",
        {
            "messages": [
                USER,
                CALL,
                {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "call00001"},
            ]
        },
    ),
    "schemas": (  # as gpt-oss, Qwen3-Coder, Apertus and MiniMax print tools
        "{% macro kind(spec, depth=0) %}{% if spec.type is defined and spec.type is sequence and spec.type is not "
        "string %}{{ spec.type | map('string') | unique | sort | join(' | ') }}{% elif spec.type == 'object' %}{ "
        "{% for name, one in spec.properties.items() %}{% if not loop.first %}, {% endif %}{{ name }}"
        "{{ '?' if name not in (spec.required or []) }}: {{ kind(one, depth + 1) }}{% else %}any{% endfor %} }"
        "{% elif spec['enum'] is defined %}{{ spec['enum'] | map('tojson') | reject('equalto', '3') | join('|') }}"
        "{% else %}{{ spec.get('type', 'any') | string | lower }}{% endif %}{% endmacro %}"
        "{% for tool in tools if tool.function is defined %}{% set text %}{{ tool.function.name }}({{ "
        "kind(tool.function.parameters) }}){% endset %}{{ text | trim | safe }}{% endfor %}"
        "{{ [3, depth | default('2') | int] | min }}{{ tools[0].function | items | list | length }}"
        "{% filter upper %}{{ true is boolean }} {{ absent is undefined }} {{ (1 == 1) is true }}{% endfilter %}",
        {"messages": [USER], "tools": SCHEMAS},
    ),
    "tools_by_another_name": (  # as SmolLM3 reads them, which transformers gives if asked by that name
        "{% for tool in (xml_tools or [])[:] %}{{ tool | string }}{% endfor %}{{ messages[0].content }}",
        {"messages": [USER], "xml_tools": TOOLS},
    ),
    "turns": (  # as Qwen3.5, GLM-4.6, Gemma 4 and Mistral tell turns apart
        "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}+{% endif %}"
        "{% if m.role not in ['user', 'assistant', 'system', 'tool'] %}{{ raise_exception('no role') }}{% endif %}"
        "{{ m.get('content', '').replace('<think>', '').strip('\n').rstrip() }}"
        "{% for c in m.tool_calls | default([]) %}{% for k, v in c.function.arguments | items %}"
        "<{{ k }}>{{ v | string if v is not string else v }}</{{ k }}>{% endfor %}{% endfor %}"
        "{% if loop.nextitem is defined and loop.nextitem.role != m.role %}<end>\n{% endif %}{% endfor %}",
        {"messages": [*CHAT, CALL | {"content": ""}, {"role": "tool", "content": "21"}, USER]},
    ),
    "reasoning": (  # gpt-oss reads "thinking", most others "reasoning_content"
        "{% for m in messages %}{% if m.thinking is defined %}[{{ m.thinking }}]{% endif %}"
        "{% if m.reasoning_content is string %}({{ m.reasoning_content }}){% endif %}{{ m | list | join(',') }};"
        "{% endfor %}",
        {"messages": [USER, *({"role": "assistant", "content": "12", name: "hm"} for name in THOUGHTS), USER]},
    ),
    "continue": (CHATML, {"messages": SAID, "continue_final_message": True}),
    "continue_ends_like_a_mark": (
        CHATML,
        {"messages": [USER, {"role": "assistant", "content": "im_end"}], "continue_final_message": True},
    ),
    "continue_keeps_blanks": (
        CHATML,
        {"messages": [USER, {"role": "assistant", "content": " The end \n"}], "continue_final_message": True},
    ),
    "continue_trimmed": (
        CHATML.replace("m.content", "m.content | trim"),
        {"messages": [USER, {"role": "assistant", "content": " The end \n"}], "continue_final_message": True},
    ),
    "continue_trimmed_then_a_line": (
        CHATML.replace("m.content", "m.content | trim ~ '\n'"),
        {"messages": [USER, {"role": "assistant", "content": "The end \n"}], "continue_final_message": True},
    ),
    "continue_parts": (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}<end>{% endfor %}",
        {
            "messages": [*PARTS_CHAT, {"role": "assistant", "content": PARTS}],
            "continue_final_message": True,
        },
    ),
    "generation_prompt": (
        "{{ messages[-1].role }}{% if add_generation_prompt %}<assistant>{% else %}.{% endif %}",
        {"messages": CHAT, "add_generation_prompt": True},
    ),
    "special_token_as_variable": ("{{ bos_token }}", {"messages": [USER], "bos_token": "<mine>"}),
}


def main() -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    cases = []
    for name, (template, arguments) in CASES.items():
        options = {"add_generation_prompt": False, **arguments}
        messages = options.pop("messages")
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        cases.append({"name": name, "template": template, "messages": messages, "options": options, "text": text})
    document = {
        "origin": f"transformers {transformers.__version__} apply_chat_template, jinja2 {jinja2.__version__}",
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "cases": cases,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    Path(__file__).with_name("transformers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
