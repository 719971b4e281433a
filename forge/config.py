"""Frozen settings of models, engines and requests. No arrays, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from forge.keywords import (
    biases,
    check_bool,
    check_integer,
    check_real,
    functions,
    items,
    keywords,
    refusal,
    texts,
    warn_renamed,
)

RopeStyle = Literal["neox", "interleaved"]
Activation = Literal["silu", "gelu", "gelu_erf", "xielu"]
NormKind = Literal["rms", "layer"]
RouterScores = Literal["softmax", "sigmoid"]
Dtype = Literal["f32", "f16"]
Progress = Callable[[str, int, int | None], None]
"""Called with the name of a stage, how much of it is done, and its total, or None where that is not known."""
Pooling = Literal["mean", "last"]
MAX_LOGPROBS = 100
"""Most alternatives whose log probabilities a request may ask for."""
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1000
"""Longest stop string. Each new piece of text is compared with all stop strings while all other requests wait."""
MAX_STOP_TOKEN_IDS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    The angle of pair i at position p is ``p * base**(-2i/dim) * frequency_scale / factors[i]``; cos and sin are
    multiplied by `magnitude`. YaRN blends scaled and unscaled frequencies between two correction dimensions.
    Sources: arXiv:2104.09864 (RoPE), arXiv:2309.00071 (YaRN), arXiv:2402.13753 (LongRoPE).
    """

    style: RopeStyle
    dim: int
    """Number of rotated components of each head. The others pass through. 0 = there is no rotation (NoPE)."""
    base: float = 10_000.0
    frequency_scale: float = 1.0
    """1 / factor of linear scaling, and of the interpolated part of YaRN."""
    factors: tuple[float, ...] | None = None
    """Divisors of the dim/2 frequencies: ``rope_freqs`` of llama3, the short or long factors of longrope."""
    magnitude: float = 1.0
    yarn_betas: tuple[float, float] | None = None
    """(fast, slow), the turns within the original context between which YaRN blends. None = no YaRN."""
    yarn_rounds: bool = True
    """Whether YaRN blends from a whole pair to a whole pair."""
    original_context: int = 0
    """Positions of the training before the context was extended. YaRN and `query_growth` need it."""
    query_growth: float = 0.0
    """b of Mistral 3: a query at p is scaled by 1 + b * ln(1 + floor((p + query_offset) / original_context))."""
    query_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A model's mixture of experts: a router scores them for each token, and the best compute it, weighted by scores.

    Attributes:
        count: Experts of a layer.
        used: Experts that compute a token.
        width: Components inside an expert.
        shared_width: Components inside the shared expert, which computes every token. 0 = there is none.
        scores: "softmax" over all experts, or "sigmoid" of each.
        renormalizes: Weights are divided by their sum: with softmax, the softmax of the chosen experts alone.
        scale: Factor of the weights.
        groups: Of so many groups, the `used_groups` with the largest sums of two scores are chosen first.
    """

    count: int
    used: int
    width: int
    shared_width: int = 0
    scores: RouterScores = "softmax"
    renormalizes: bool = True
    scale: float = 1.0
    groups: int = 1
    used_groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The numbers of one model, read from its file and completed by its architecture's row in `models/arch.py`.

    Attributes:
        arch: GGUF's name of the architecture, such as "llama".
        num_layers: Number of blocks.
        width: E, the components of the residual stream.
        num_heads: H, query heads.
        layer_kv_heads: G of each layer, key and value heads; H / G query heads share one.
        layer_head_dims: D of each layer, components of one head.
        layer_ffn_widths: F of each layer, components inside the feed-forward.
        vocab_size: V, rows of the embedding.
        context_length: Positions the model was trained for.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm).
        norm_eps: Number that is added to the variance before the root.
        activation: "silu", "gelu" (tanh form), "gelu_erf" or "xielu".
        attention_scale: Factor of the scores, before soft cap and mask.
        ropes: The distinct rotary embeddings of the model. Where q and k are normed behind their rotation, the last one
            rotates nothing.
        layer_ropes: Index into `ropes` for each layer.
        layer_windows: W of each layer. 0 = a query sees all positions up to its own. Else it sees the W latest of them
            (sliding window), or in a family with chunks (Llama 4) those in its own chunk of W positions.
        layer_kv: The layer whose keys and values each layer reads: itself, or an earlier one, and has none of its own.
        per_layer_width: P, numbers of the embedding that each layer has of its own. 0 = there is none.
        num_gates: Gates of a layer's attention results: H, or H * D. 0 = there are none.
        attention_softcap: The scores become cap * tanh(score / cap). 0 = no cap.
        final_softcap: The logits become cap * tanh(logit / cap). 0 = no cap.
        embedding_scale: Factor of the embeddings.
        experts: The mixture of experts. None = the model is dense.
        layer_experts: Whether each layer has it. Empty = none has.
        residual_scale: Factor of what each mixer and feed-forward adds to the stream.
        stream_scale: The residual stream x is held as x / stream_scale.
        logit_scale: Factor of the logits, before their soft cap.
        qkv_clamp: Queries, keys and values are cut to [-qkv_clamp, qkv_clamp] before their norms. 0 = they are not.
        is_parallel: Attention and feed-forward both read the stream before the layer.
        has_learned_positions: A table of `context_length` vectors is added to the embeddings.
        xielu: For each layer alpha_n and alpha_p (before softplus), beta and eps of its activation xIELU.
    """

    arch: str
    num_layers: int
    width: int
    num_heads: int
    layer_kv_heads: tuple[int, ...]
    layer_head_dims: tuple[int, ...]
    layer_ffn_widths: tuple[int, ...]
    vocab_size: int
    context_length: int
    norm: NormKind
    norm_eps: float
    activation: Activation
    attention_scale: float
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int, ...]
    layer_kv: tuple[int, ...]
    per_layer_width: int = 0
    num_gates: int = 0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    experts: ExpertsConfig | None = None
    layer_experts: tuple[bool, ...] = ()
    residual_scale: float = 1.0
    stream_scale: float = 1.0
    logit_scale: float = 1.0
    qkv_clamp: float = 0.0
    is_parallel: bool = False
    has_learned_positions: bool = False
    xielu: tuple[tuple[float, ...], ...] = ()

    @property
    def num_experts(self) -> int:
        """Experts of a layer that has some; 0 in a dense model."""
        return self.experts.count if self.experts else 0

    @property
    def num_kv_heads(self) -> int:
        """The most KV heads of a layer."""
        return max(self.layer_kv_heads)

    @property
    def head_dim(self) -> int:
        """The most components of a head."""
        return max(self.layer_head_dims)

    @property
    def ffn_width(self) -> int:
        """The widest feed-forward."""
        return max(self.layer_ffn_widths)


@keywords()
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs. `forge.load` takes it as `engine`.

    Attributes:
        context: Most tokens of one sequence, prompt and completion. None = the model's, cut to what fits in memory.
        memory_fraction: Share of the free memory that weights and KV cache may take.
        cpu_experts: For a mixture of experts that does not fit a GPU: the experts of so many of the first layers stay
            in the host's memory, pinned, and a step copies those that its tokens choose over the link between the two,
            whose speed is then that of the model. More than there are layers = all. On a CPU it changes nothing.
        dtype: Precision of matrix inputs, "f32" or "f16". None = what the device does best: float32 on a CPU, float16
            on a GPU.
        max_sequences: Most sequences that run together, each with room for its whole context as far as memory goes;
            further ones wait. None = up to 256 on a GPU and 64 on a CPU that share room for one whole context, or for
            1,024 (CPU: 512) tokens of each if that is more and memory allows: if they need more, the youngest wait.
        max_step_tokens: Most tokens of one step. A longer prompt is computed in chunks of this size. None = what suits
            the device and fits: up to 8,192 on a GPU (2,048 with sliding windows), 512 on a CPU.
        max_prefill_tokens: Most prompt tokens, of all sequences together, of a step in which others decode. A smaller
            number lets less time pass between the tokens of those, and computes prompts more slowly. None = on a GPU
            what keeps a step near 50 ms by the times of the steps before it, and more where many requests come at
            once; on a CPU 64.
        page_size: P, positions of a page of the KV cache.
        prefix_caching: Whether a prompt that begins like an earlier prompt or answer takes over the full pages that
            still hold its keys and values, and computes the rest. It takes no memory on the device: pages without an
            owner stay until they are needed. It takes some 10 bytes of the host's memory for each position, and what
            is computed in fewer rows may round differently. False = each prompt is computed whole, as for measuring.
        graphs: Whether decode steps on a GPU are replayed as graphs. False = their kernels are launched one by one.
            N = every Nth replay is compared with its launches, and from a difference on there are no graphs. None = as
            the variable FORGE_GRAPHS says: 0, 1, check:N; True where it is not set.
        deterministic: The same request gives the same tokens and log probabilities, to the bit, on the same device:
            alone or in any batch, its prompt whole or in chunks, and after a preemption. Slower: docs/determinism.md.
    """

    context: int | None = None
    memory_fraction: float = 0.9
    cpu_experts: int = 0
    dtype: Dtype | None = None
    max_sequences: int | None = None
    max_step_tokens: int | None = None
    max_prefill_tokens: int | None = None
    page_size: int = 64
    prefix_caching: bool = True
    graphs: bool | int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_integer("context", self.context, 1, optional=True)
        check_integer("max_sequences", self.max_sequences, 1, optional=True)
        check_integer("max_step_tokens", self.max_step_tokens, 1, optional=True)
        check_integer("max_prefill_tokens", self.max_prefill_tokens, 1, optional=True)
        check_integer("page_size", self.page_size, 1)
        check_integer("cpu_experts", self.cpu_experts, 0)
        check_bool("prefix_caching", self.prefix_caching)
        if not isinstance(self.graphs, bool):
            check_integer("graphs", self.graphs, 1, optional=True)
        check_bool("deterministic", self.deterministic)
        check_real("memory_fraction", self.memory_fraction, 0, 1, is_open=True)
        if self.dtype is not None and not (isinstance(self.dtype, str) and self.dtype in get_args(Dtype)):
            raise refusal("dtype", f"one of {get_args(Dtype)}", self.dtype)

    @property
    def activations(self) -> Dtype | None:
        """The former name of `dtype`, for one release."""
        warn_renamed("activations", "dtype")
        return self.dtype


@keywords()
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen.

    The steps come in this order: logits processors, logit bias, repetition, presence and frequency penalties,
    temperature, top-k, top-p, min-p, one draw, or the sampler's. The draw depends on the seed, the choice index and the
    position alone: the same request gives the same tokens whatever else runs. Raises ParameterError for a value that
    cannot be used.

    Attributes:
        max_tokens: Most tokens to generate. None = until the context is full.
        temperature: Divisor of the logits. 0 is greedy: the most probable token, the lowest id of equals.
        top_k: Keep the k most probable tokens. 0 = all.
        top_p: Keep the smallest set of most probable tokens whose probabilities reach p.
        min_p: Keep tokens at least min_p times as probable as the most probable one.
        repetition_penalty: Divides positive (multiplies negative) logits of tokens in the prompt or completion.
            arXiv:1909.05858
        presence_penalty: Subtracted once from the logit of each token that was already generated.
        frequency_penalty: Subtracted from the logit of a token for each time that it was already generated.
        logit_bias: Token id -> number that is added to its logit, from -1e6 to 1e6. -inf forbids the token.
        logits_processors: Functions f(ids, logits), called one after the other for each id: with the list of prompt and
            completion ids, and the model's logits float32 (V,) on its device (NumPy or CuPy). Each returns logits like
            them, or None after a change in place. docs/research.md
        sampler: A function f(ids, logits, random) that gives the next id in place of the draw, with a
            `numpy.random.Generator` of its own for each seed, choice and position. Logits are divided by the
            temperature, unless it is 0, and -inf where the limits exclude a token. docs/research.md
        seed: 0 to 2**64 - 1. None = a fresh one for each request.
        n: Number of completions of the same prompt. Their choice indices are 0 to n - 1.
        stop: Texts that end the completion; they are not part of it. At most 64, of at most 1,000 characters each.
        stop_token_ids: Token ids that end the completion like the model's own end tokens.
        ignore_eos: Run to `max_tokens` through the model's end tokens.
        logprobs: Report the log probability of each token, and this many most probable alternatives. None = no report.
        timeout: Seconds after which the request ends with a RequestTimeoutError, running or waiting, before the next
            step. A stream has given by then what there was. None = it may take as long as it takes.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logits_processors: Sequence[Any] = field(default=(), hash=False)
    sampler: Any = field(default=None, hash=False)
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 1, optional=True)
        check_integer("top_k", self.top_k, 0)
        check_integer("n", self.n, 1, 256)
        check_integer("seed", self.seed, 0, 2**64 - 1, optional=True)
        check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        check_real("temperature", self.temperature, 0, 100)
        check_real("top_p", self.top_p, 0, 1, is_open=True)
        check_real("min_p", self.min_p, 0, 1)
        check_real("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_real("presence_penalty", self.presence_penalty, -100, 100)
        check_real("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.timeout is not None:
            check_real("timeout", self.timeout, 0, 1e9, is_open=True)
        check_bool("ignore_eos", self.ignore_eos)
        self._freeze("logits_processors", functions("logits_processors", self.logits_processors, "ids", "logits"))
        if self.sampler is not None:
            functions("sampler", [self.sampler], "ids", "logits", "random")
        self._freeze("logit_bias", biases("logit_bias", self.logit_bias))
        self._freeze("stop", texts("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_CHARACTERS))
        self._freeze("stop_token_ids", items("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        for token in self.stop_token_ids:
            check_integer("stop_token_ids", token, 0)

    @property
    def stop_ids(self) -> Sequence[int]:
        """The former name of `stop_token_ids`, for one release."""
        warn_renamed("stop_ids", "stop_token_ids")
        return self.stop_token_ids

    def _freeze(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def with_bias(params: SamplingParams, bias: Mapping[int, float]) -> SamplingParams:
    """The parameters with these entries in logit_bias, which nobody needs to check: they may be thousands."""
    found = copy(params)
    object.__setattr__(found, "logit_bias", {**params.logit_bias, **bias})
    return found
