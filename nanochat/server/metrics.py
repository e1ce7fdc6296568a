"""GET /metrics: the server's counters in the text format of Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanochat.server.pool import Pool

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

COUNTS = {"prompt_tokens": "tokens of prompts", "cached_tokens": "of these, tokens found in the prefix cache",
          "generated_tokens": "tokens generated", "prefix_lookups": "prompts looked up in the prefix cache",
          "prefix_hits": "of these, prompts with a cached prefix", "cancelled": "rows that were cancelled",
          "errors": "rows that ended in an error", "steps": "steps of the schedulers",
          "restarts": "workers started again"}
GAUGES = {"running": "rows being decoded", "waiting": "rows in the queue or in prefill",
          "rows_max": "rows decoded together at most", "prefix_bytes": "memory of the prefix cache",
          "models": "models loaded", "rows": "rows given to workers that have not ended"}


class Metrics:
    """The counters of a server."""

    def __init__(self, pool: Pool):
        self.registry = CollectorRegistry()
        self.requests = Counter("nanochat_http_requests", "answers to HTTP requests", ["route", "status"],
                                registry=self.registry)
        self.first_token = Histogram("nanochat_first_token_seconds", "from a request to its first token",
                                     buckets=SECONDS, registry=self.registry)
        self.per_token = Histogram("nanochat_token_seconds", "from one token to the next, mean of an answer",
                                   buckets=TOKEN_SECONDS, registry=self.registry)
        self.registry.register(_WorkerCollector(pool))

    def text(self) -> bytes:
        """Return all of them in Prometheus's format."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    """The counts of all workers together."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def collect(self) -> Iterator[Metric]:
        stats = self.pool.stats()
        for name, help in COUNTS.items():
            yield CounterMetricFamily(f"nanochat_{name}", help, value=stats.get(f"{name}_total", 0))
        for name, help in GAUGES.items():
            yield GaugeMetricFamily(f"nanochat_{name}", help, value=stats.get(name, 0))
        lookups = stats.get("prefix_lookups_total", 0)
        yield GaugeMetricFamily("nanochat_prefix_hit_ratio", "prefix_hits / prefix_lookups",
                                value=stats.get("prefix_hits_total", 0) / lookups if lookups else 0)
        yield GaugeMetricFamily("nanochat_workers_ready", "workers that are ready",
                                value=sum(worker.state == "ready" for worker in self.pool.workers))
