"""/metrics: numbers for Prometheus, by the names that vLLM gives them, with the prefix forge_."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from forge.engine import EngineStats
from forge.outputs import Timings

_GAUGES = {
    "num_requests_running": ("running", "Answers that are computed now."),
    "num_requests_waiting": ("waiting", "Answers that wait for room."),
    "kv_cache_pages_used": ("pages_used", "Pages of the KV cache that are not free."),
    "kv_cache_pages": ("pages_total", "All pages of the KV cache."),
}
"""By name: the field of `EngineStats`, and the help text."""
_COUNTERS = {
    "num_preemptions": ("preemptions", "Times that an answer gave up its pages for an older one."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("generated_tokens", "Tokens that were generated."),
    "prefix_cache_queries": ("prefix_asked_tokens", "Tokens of prompts that were looked for in the prefix cache."),
    "prefix_cache_hits": ("prefix_hit_tokens", "Those of them that were found."),
    "prefix_cache_evictions": ("prefix_evictions", "Pages of the prefix cache that something else needed."),
}
_LATENCY = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stats: EngineStats | None = None
        self._queue_time = self._histogram("request_queue_time", "From a request to its first step.", _LATENCY)
        self._first_token = self._histogram("time_to_first_token", "From a request to its first token.", _LATENCY)
        self._per_token = self._histogram("time_per_output_token", "Between two tokens, on average.", _PER_TOKEN)
        self._registry.register(self)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"forge_{name}_seconds", help, registry=self._registry, buckets=buckets)

    def add(self, timings: Timings) -> None:
        """Count one answer that has ended. One without any token has no times."""
        self._queue_time.observe(timings.queue_ms / 1000)
        if timings.completion_tokens:
            self._first_token.observe(timings.prefill_ms / 1000)
        if timings.completion_tokens > 1:
            self._per_token.observe(timings.decode_ms / 1000 / (timings.completion_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine has counted. Called by the registry."""
        if self._stats is None:
            return
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (field, help) in table.items():
                value = getattr(self._stats, field)
                if isinstance(value, int):
                    yield kind(f"forge_{name}", help, value)
                    continue
                family = kind(f"forge_{name}", help, labels=["kind"])
                for layers, one in value.items():
                    family.add_metric([layers], one)
                yield family

    def text(self, stats: EngineStats) -> bytes:
        """All numbers, in Prometheus' text format."""
        self._stats = stats
        return generate_latest(self._registry)
