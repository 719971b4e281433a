"""The whole use of a model that somebody trains, step by step, and tests/data/whole_use, what it leaves.

A llama-like model of two layers with a byte-level BPE is trained on a few questions, and saved by transformers in
float16. PEFT gives it a LoRA adapter that answers otherwise. Then forge, on NumPy, loads the directory with the
adapter, chats with and without it, quantizes it while it is loaded, and converts it; llama.cpp's library runs the
converted files. Ids are compared with transformers', PEFT's and llama.cpp's, and the first step whose result is not
theirs ends the script with an error.

tests/golden/test_whole_use.py goes the same way without torch and llama.cpp, against the ids that are recorded here.
Needs torch, transformers, peft, tokenizers, llama-cpp-python, and forge with its dependencies; downloads nothing.
    PYTHONPATH=. python scripts/whole_use.py
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import forge

OUT = Path(__file__).parent.parent / "tests" / "data" / "whole_use"
# No dependencies of forge, so without types in its development environment.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")
peft: Any = importlib.import_module("peft")
tokenizers: Any = importlib.import_module("tokenizers")
llama_cpp: Any = importlib.import_module("llama_cpp")

FACTS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "the sun": "yellow",
    "blood": "red", "an orange": "orange", "chocolate": "brown",
}  # fmt: skip
QUESTIONS = [f"What colour is {thing}?" for thing in FACTS]
PLAIN = [f"{thing[0].upper()}{thing[1:]} is {colour}." for thing, colour in FACTS.items()]
TUNED = [f"Arr, {colour}! As {colour} as can be, sailor." for colour in FACTS.values()]
"""What the model is trained to answer, and what the adapter is."""
MAX_TOKENS = 48
QUANTIZED = 0.5
"""How far logits of Q8_0 may be from those of the weights in float16: they lie between -5 and 12."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's rule."""


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    make(OUT / "model", OUT / "adapter")
    with tempfile.TemporaryDirectory() as folder:
        expected = reference()
        run_directory(expected)
        run_quantized()
        run_converted(Path(folder), expected)
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", "utf-8")
    sizes = {path.name: path.stat().st_size for path in OUT.rglob("*") if path.is_file()}
    step(f"kept {sum(sizes.values()):,} bytes in {OUT}: {sizes}")
    check(sizes["model.safetensors"] < 300_000, "model.safetensors is larger than 300 kB")


def step(text: str) -> None:
    print(f"== {text}", flush=True)


def check(is_met: bool, text: str) -> None:
    if not is_met:
        raise SystemExit(f"not met: {text}")


def same(what: str, found: Any, expected: Any) -> None:
    check(found == expected, f"{what}:\n  found    {found}\n  expected {expected}")
    print(f"   {what}: the same")


def make(model_folder: Path, adapter_folder: Path) -> None:
    """Train the model and its adapter, and save them."""
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_theta=10_000.0, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    step(f"a model of {sum(p.numel() for p in model.parameters()):,} weights and {len(tokenizer)} tokens")
    train(model, tokenizer, PLAIN, steps=200, rate=5e-3)
    model.half().save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    base = load_model(model_folder)  # of weights that were rounded to float16
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    adapted = peft.get_peft_model(base, settings)
    train(adapted, tokenizer, TUNED, steps=200, rate=5e-3)
    adapted.save_pretrained(adapter_folder)
    (adapter_folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((adapter_folder / "adapter_config.json").read_text())
    saved |= {"base_model_name_or_path": "model", "target_modules": sorted(saved["target_modules"])}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")


def make_tokenizer() -> Any:
    """Byte-level BPE of 320 tokens, trained on what is said, with a chat template."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    bpe.train_from_iterator([*QUESTIONS, *PLAIN, *TUNED, "user\n", "assistant\n"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def train(model: Any, tokenizer: Any, answers: list[str], *, steps: int, rate: float) -> None:
    """All questions in every step, from their answers on."""
    pairs = [(prompt_of(tokenizer, question), answer) for question, answer in zip(QUESTIONS, answers, strict=True)]
    rows = [(prompt, tokenizer.encode(answer + "<|im_end|>\n")) for prompt, answer in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    step(f"trained for {steps} steps: loss {loss.item():.4f}")


def load_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return found


def reference() -> dict[str, Any]:
    """What transformers and PEFT answer, from what was saved."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / "model")
    model = load_model(OUT / "model")
    prompts = [prompt_of(tokenizer, question) for question in QUESTIONS]
    plain = [greedy(model, prompt) for prompt in prompts]
    adapted = peft.PeftModel.from_pretrained(model, OUT / "adapter").eval()
    tuned = [greedy(adapted, prompt) for prompt in prompts]
    for question, without, with_adapter in zip(QUESTIONS, plain, tuned, strict=True):
        print(f"   {question} {tokenizer.decode(without)!r} {tokenizer.decode(with_adapter)!r}")
    check(all(a != b for a, b in zip(plain, tuned, strict=True)), "the adapter changes every answer")
    packages = {module.__name__: module.__version__ for module in (torch, transformers, peft, llama_cpp)}
    answers = {"transformers": plain, "peft": tuned}
    return {"packages": packages, "questions": QUESTIONS, "prompts": prompts, **answers}


def greedy(model: Any, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    check(found.pop() == model.config.eos_token_id, "every answer of transformers ends")
    return found


def answers_of(llm: forge.LLM, adapter: str | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the prompts and of forge's answers, without the end of the text."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found = [llm.chat(chat, max_tokens=MAX_TOKENS, temperature=0, adapter=adapter) for chat in chats]
    check(all(one.finish_reason == "stop" for one in found), "every answer of forge ends")
    return [one.prompt_ids for one in found], [one.ids for one in found]


def run_directory(expected: dict[str, Any]) -> None:
    step("forge: the directory with its adapter")
    with forge.load(OUT / "model", device="cpu", adapters={"tuned": OUT / "adapter"}, progress=False) as llm:
        prompts, plain = answers_of(llm)
        same("prompts as transformers renders them", prompts, expected["prompts"])
        same("answers of the model as transformers'", plain, expected["transformers"])
        same("answers with the adapter as PEFT's", answers_of(llm, "tuned")[1], expected["peft"])
        ids = prompts[0] + plain[0]
        logits = {None: llm.logits(ids), "tuned": llm.logits(ids, adapter="tuned")}
    model = load_model(OUT / "model")
    for name in (None, "tuned"):
        model = model if name is None else peft.PeftModel.from_pretrained(model, OUT / "adapter").eval()
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        off = float(np.abs(theirs - logits[name]).max())
        check(off < 5e-4, f"logits are off by {off}")
        print(f"   logits, adapter {name}: off by {off:.1e}")


def run_quantized() -> None:
    step("forge: quantized while it is loaded")
    ids = forge_prompt()
    logits = []
    for quantize in (None, "Q8_0"):
        with forge.load(OUT / "model", device="cpu", quantize=quantize, progress=False) as llm:
            logits.append(llm.logits(ids))
    off = float(np.abs(logits[0] - logits[1]).max())
    check(0 < off < QUANTIZED, f"logits of Q8_0 are off by {off}")
    print(f"   logits between {logits[0].min():.1f} and {logits[0].max():.1f} are off by {off:.3f}")


def forge_prompt() -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / "model")
    return prompt_of(tokenizer, QUESTIONS[0])


def run_converted(folder: Path, expected: dict[str, Any]) -> None:
    """The files of `forge convert`, by forge and by llama.cpp."""
    expected["sha256"], expected["llama.cpp"] = {}, {}
    for kind in ("F16", "Q8_0"):
        step(f"forge convert --type {kind}")
        path = folder / f"{kind}.gguf"
        command = [sys.executable, "-m", "forge", "convert", str(OUT / "model"), str(path), "--type", kind]
        subprocess.run(command, check=True)
        expected["sha256"][kind] = hashlib.sha256(path.read_bytes()).hexdigest()
        prompts, expected["llama.cpp"][kind] = llama_answers(path, expected)
        same("prompts as llama.cpp's tokenizer has them", prompts, expected["prompts"])
        with forge.load(path, device="cpu", adapters={"tuned": OUT / "adapter"}, progress=False) as llm:
            plain, tuned = answers_of(llm)[1], answers_of(llm, "tuned")[1]
        same("answers of forge as llama.cpp's", plain, expected["llama.cpp"][kind])
        if kind == "F16":
            same("answers of llama.cpp as transformers'", expected["llama.cpp"][kind], expected["transformers"])
            same("answers with the adapter as PEFT's", tuned, expected["peft"])


def llama_answers(path: Path, expected: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the prompts and greedy ids, without the end of the text, of llama.cpp."""
    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / "model")
    prompts, answers = [], []
    for question in expected["questions"]:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = llama.tokenize(text.encode(), add_bos=False, special=True)
        found = itertools.islice(llama.generate(prompt, temp=0.0), MAX_TOKENS)
        answer = list(itertools.takewhile(lambda token: token != llama.token_eos(), found))
        check(len(answer) < MAX_TOKENS, "every answer of llama.cpp ends")
        prompts.append(prompt)
        answers.append(answer)
    llama.close()
    return prompts, answers


if __name__ == "__main__":
    main()
