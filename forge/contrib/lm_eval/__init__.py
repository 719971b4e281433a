"""forge as a model of EleutherAI's lm-evaluation-harness. Importing this registers it there as "forge".

Source of the interface: `lm_eval.api.model`, and docs/model_guide.md of the harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from forge.errors import ChatTemplateError, ParameterError
from forge.llm import LLM
from forge.loading import load

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    hint = f"forge.contrib.lm_eval needs lm-evaluation-harness ({error}): pip install lm_eval"
    raise ImportError(hint, name=error.name) from None

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request's two texts, if it is to be cached, and the ids of prompt and continuation."""
_AT_ONCE = 256
"""Pairs that are scored between two reports of progress."""
_ADAPTER = "adapter"


class ForgeLM(TemplateLM):
    """A model that forge runs, for the harness: ``--model forge --model_args pretrained=PATH``.

    Requests run together in the engine's batches. `batch_size` and `max_batch_size` of the harness are not used;
    `max_sequences` limits how many run at once.

    Args:
        pretrained: What `forge.load` takes: a name, a path, `hf:owner/repo:QUANT`. Or an `LLM` that is loaded.
        adapter: The file or directory of a LoRA adapter, which all requests have.
        max_length: Most tokens of a prompt and its continuation: `context` of `forge.load`.
        prefix_token_id: What scored texts stand behind that have no context. None = BOS, or EOS where there is none.
        max_gen_toks: Most tokens of an answer where a task does not say it.
        device: As of `forge.load`. None = "auto".
        batch_size: Not used.
        max_batch_size: Not used.
        **settings: Further keywords of `forge.load`: quantize, dtype, max_sequences, chat_template, ...
    """

    def __init__(
        self,
        pretrained: str | PathLike[str] | LLM,
        *,
        adapter: str | PathLike[str] | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LLM):
            given = {"adapter": adapter, "max_length": max_length} | settings
            for name in [name for name, value in given.items() if value is not None]:
                raise ParameterError(f"{name}: the model is loaded already: give it to forge.load", parameter=name)
            self.llm = pretrained
        else:
            adapters = None if adapter is None else {_ADAPTER: adapter}
            device = device or "auto"
            self.llm = load(pretrained, device=device, context=max_length, adapters=adapters, **settings)
        self.adapter = None if adapter is None else _ADAPTER
        self._source = self.llm.path if isinstance(pretrained, LLM) else pretrained
        self.max_length, self.max_gen_toks = self.llm.context, max_gen_toks
        self._prefix = prefix_token_id

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """EOS. Raises ParameterError for a model without one."""
        if (found := self.llm.tokenizer.eos_id) is None:
            raise ParameterError("prefix_token_id must be given: the model has neither BOS nor EOS", parameter="model")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        for found in (self._prefix, self.llm.tokenizer.bos_id):
            if found is not None:
                return found
        return self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. None = with the BOS that the model wants, unless the text begins with it."""
        if add_special_tokens is None:
            return self.llm.encode_prompt(string)
        return self.llm.tokenizer.encode(string, add_special=add_special_tokens, parse_special=True)

    def tok_decode(self, ids: Sequence[int]) -> str:
        """The text of ids that continue another text, without control tokens."""
        stream = self.llm.tokenizer.streamer(continues=True)
        control = self.llm.tokenizer.control_ids
        return "".join([stream.push(i) for i in ids if i not in control]) + stream.flush()

    @property
    def tokenizer_name(self) -> str:
        """What requests are cached under that were made with this tokenizer and its templates."""
        return fspath(self._source).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of a template: True = the model's own, a string = the one of that name. None for False."""
        if chat_template is False or chat_template is None:
            return None
        there = self.llm.tokenizer.chat_templates
        if isinstance(chat_template, str) and chat_template not in there:
            names = ", ".join(there) or "none"
            raise ParameterError(
                f"chat_template {chat_template!r:.60} is not there, but: {names}", parameter="chat_template"
            )
        if isinstance(chat_template, str):
            return there[chat_template]
        return None if self.llm.chat_template is None else self.llm.chat_template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that the model sees of a conversation. A template that refuses it is asked without the system's."""
        options: dict[str, Any] = {"continue_final_message": not add_generation_prompt}
        try:
            return self.llm.render_chat(chat_history, **options)
        except ChatTemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self.llm.render_chat(others, **options)

    # Likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is the greedy one. Long contexts lose their beginning.

        Those of the same context are scored together, so that it is computed once.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), requests[i][1]))
        with tqdm(total=len(order), desc="forge: loglikelihood", disable=disable_tqdm) as bar:
            for part in _parts(order, _AT_ONCE):
                pairs = [self._fitting(*requests[i][1:]) for i in part]
                contexts, continuations = zip(*pairs, strict=True)
                scores = self.llm.score(list(contexts), list(continuations), adapter=self.adapter)
                for i, score in zip(part, scores, strict=True):
                    found[i] = score.logprob, score.is_greedy
                    if (texts := requests[i][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[i])
                bar.update(len(part))
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of a context that fits beside its continuation, whose last id needs no place."""
        if len(continuation) > self.max_length:
            message = f"a continuation has {len(continuation)} tokens, and {self.max_length} fit"
            raise ParameterError(message, parameter="max_length", hint="load with a larger max_length")
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows of the model's length that each token is in once."""
        texts: list[str] = [request.args[0] for request in requests]
        windows: list[Pair] = []
        counts: list[int] = []
        for text in texts:
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own: list[Pair] = [(None, *make_disjoint_window(pair)) for pair in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each prompt, up to the first of its stop strings. Requests with other settings run together."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found = [""] * len(requests)
        most = 8 * self.llm.engine.runner.max_sequences
        with tqdm(total=len(requests), desc="forge: generate_until", disable=disable_tqdm) as bar:
            for group in groups.values():
                sampling = self._sampling(requests[group[0]].args[1])
                room = self.max_length - sampling["max_tokens"]
                group.sort(key=lambda i: -len(prompts[i]))  # alike ones end together
                for part in _parts(group, most):
                    cut_prompts = [prompts[i][-room:] for i in part]
                    answers = self.llm.generate(cut_prompts, adapter=self.adapter, **sampling)
                    for i, answer in zip(part, answers, strict=True):
                        found[i] = _before(self.tok_decode(answer.ids), sampling["stop"])
                        self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    bar.update(len(part))
        return found

    def _sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `LLM.generate` for a task's. Those that are no fields of `SamplingParams` are errors there."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        stop = [text for text in kwargs.pop("until") if text]
        num_tokens = kwargs.pop("max_gen_toks")
        if num_tokens >= self.max_length:
            raise ParameterError(
                f"max_gen_toks is {num_tokens}, and {self.max_length} tokens are all that fit",
                parameter="max_gen_toks",
                hint="use fewer, or a larger max_length",
            )
        if not kwargs.pop("do_sample"):
            kwargs["temperature"] = 0.0
        return {**kwargs, "stop": stop, "max_tokens": num_tokens}

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {"model_device": self.llm.device, "model_quantize": self.llm.quantize, "model_notes": self.llm.notes}


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


if "forge" not in model_registry:
    model_registry.register("forge", target=ForgeLM)
