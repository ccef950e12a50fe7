"""Prometheus metrics: what is counted, and how events of engine, registry and HTTP surface feed it.

One `Metrics` per app with its own registry, nothing global. Labels only ever hold names that this server serves or
words from fixed sets, so no client can create series. Called from the engine thread and the event loop.
"""

import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from server.adapters.records import AdapterInfo
from server.engine.step_stats import RoutingStats, StepStats

PREFIX = "lora_mixer_"

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LOAD_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
ENTROPY_BUCKETS_NATS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 1.1, 1.4, 1.8, 2.3, 3.0)
"""ln 2 = 0.69 is an even mix of two adapters, ln 8 = 2.08 of eight."""


class AdapterUsage:
    """Which adapters in-flight choices may use, split by whether their first token is out. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: Tally[str] = Tally()
        self._running: Tally[str] = Tally()

    def enter(self, adapters: Iterable[str]) -> None:
        """A choice was queued."""
        self._move(adapters, None, self._waiting)

    def start(self, adapters: Iterable[str]) -> None:
        """Its first token is out."""
        self._move(adapters, self._waiting, self._running)

    def leave(self, adapters: Iterable[str], *, was_running: bool) -> None:
        """It ended."""
        self._move(adapters, self._running if was_running else self._waiting, None)

    def names(self) -> tuple[list[str], list[str]]:
        """Sorted names (running, waiting)."""
        with self._lock:
            return sorted(+self._running), sorted(+self._waiting)

    def _move(self, adapters: Iterable[str], source: Tally[str] | None, target: Tally[str] | None) -> None:
        with self._lock:
            for name in adapters:
                if source is not None:
                    source[name] -= 1
                    if source[name] <= 0:
                        del source[name]
                if target is not None:
                    target[name] += 1


class BatchHistogram:
    """A histogram fed with many values at once: one lock and one bisection per value, cheap enough for every step."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._lock = Lock()

    def observe(self, values: Sequence[float]) -> None:
        """Add every value."""
        with self._lock:
            self._sum += sum(values)
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1

    def collect(self) -> Iterable[Metric]:
        """The series, as prometheus_client asks for them."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets, cumulative = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)


class _ScrapedState:
    """Gauges that are read when they are scraped, so that they are never stale."""

    def __init__(self, usage: AdapterUsage) -> None:
        self._usage = usage
        self.num_running: Callable[[], int] = lambda: 0
        self.num_waiting: Callable[[], int] = lambda: 0
        self.num_waiting_for_adapters: Callable[[], int] = lambda: 0
        self.adapters: Callable[[], Sequence[AdapterInfo]] = tuple
        self.max_adapters = 0

    def collect(self) -> Iterable[Metric]:
        running, waiting, lacking = self.num_running(), self.num_waiting(), self.num_waiting_for_adapters()
        yield GaugeMetricFamily(PREFIX + "running_requests", "Sequences being computed", running)
        yield GaugeMetricFamily(PREFIX + "waiting_requests", "Sequences queued", waiting)
        yield GaugeMetricFamily(PREFIX + "requests_waiting_for_adapters", "Requests in line for memory", lacking)
        info = GaugeMetricFamily(
            PREFIX + "adapter_info",
            "1 for every registered adapter",
            labels=("name", "digest", "revision", "rank", "state", "routed"),
        )
        adapters = self.adapters()
        for adapter in adapters:
            facts = (adapter.digest, adapter.revision, adapter.rank)
            shown = ["" if fact is None else str(fact) for fact in facts]
            info.add_metric([adapter.name, *shown, str(adapter.state), str(adapter.routed).lower()], 1)
        yield info
        yield _flags(
            "adapter_traffic_alarm",
            "1 while an adapter captures far more of the recent routed traffic than its even share",
            {adapter.name: adapter.traffic_alarm for adapter in adapters},
        )
        yield _flags(
            "adapter_excluded",
            "1 while auto leaves an adapter out since it took more than its max_gate_share of the routed traffic",
            {adapter.name: adapter.exclusion is not None for adapter in adapters},
        )
        sizes = [adapter.memory_bytes for adapter in adapters if adapter.resident]
        yield GaugeMetricFamily(PREFIX + "adapters_resident", "Adapters in memory", len(sizes))
        yield GaugeMetricFamily(PREFIX + "adapter_memory_bytes", "Memory of the adapters in it", sum(sizes))
        requests = GaugeMetricFamily(
            PREFIX + "lora_requests_info",
            "Adapters that requests in flight may use, for the Gateway API inference extension; value = Unix time",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running_names, waiting_names = self._usage.names()
        requests.add_metric([str(self.max_adapters), ",".join(running_names), ",".join(waiting_names)], time.time())
        yield requests


def _flags(name: str, documentation: str, values: Mapping[str, bool]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, documentation, labels=("adapter",))
    for adapter, value in values.items():
        family.add_metric([adapter], float(value))
    return family


class Metrics:
    """All metrics of one app."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(PREFIX + name, documentation, labels, registry=registry)

        def histogram(name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(PREFIX + name, documentation, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Finished choices (n of one request: n times)", ("model", "finish_reason"))
        self._rejected = counter("requests_rejected", "Requests refused, by error code", ("reason",))
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens, computed or from the prefix cache")
        self._generation_tokens = counter("generation_tokens", "Tokens generated")
        self._cached_tokens = counter("prefix_cache_hit_tokens", "Prompt tokens taken from the prefix cache")
        self._drafted_tokens = counter("draft_tokens", "Tokens guessed ahead (server.speculative_tokens)")
        self._accepted_tokens = counter("accepted_draft_tokens", "Those of them that were right")
        self._preemptions = counter("preemptions", "Sequences that lost their K/V blocks to others for a while")
        self._gate_mass = counter(
            "adapter_gate_mass", "Sum over tokens of the gate weight, averaged over routed layers", ("adapter",)
        )
        self._loads = counter("adapter_loads", "Adapter registrations that ended", ("outcome",))
        self._load_s = histogram("adapter_load_seconds", "From registration to its end", LOAD_BUCKETS_S)
        self._evictions = counter("adapter_evictions", "Adapters that left memory for others")
        self._reloads = counter("adapter_reloads", "Adapters read again from disk for requests", ("outcome",))
        self._reload_s = histogram("adapter_reload_seconds", "Reading and checking one again", STEP_BUCKETS_S)
        self._waits = counter("adapter_waits", "Requests that waited for adapters to be in memory", ("outcome",))
        self._wait_s = histogram("adapter_wait_seconds", "From a request's first try to its end", LOAD_BUCKETS_S)
        self._first_token_s = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token", FIRST_TOKEN_BUCKETS_S
        )
        self._token_gap_s = histogram(
            "inter_token_latency_seconds", "Between two tokens of one choice", TOKEN_GAP_BUCKETS_S
        )
        self._request_s = histogram(
            "request_latency_seconds", "From the request's arrival to the end of a choice", REQUEST_BUCKETS_S
        )
        self._step_s = histogram("step_seconds", "One engine step", STEP_BUCKETS_S)
        self._kv_usage = Gauge(
            PREFIX + "kv_cache_usage_ratio", "Share of the K/V blocks in use after the last step", registry=registry
        )
        self._entropy = BatchHistogram(
            PREFIX + "routing_entropy",
            "Entropy of a routed token's gate share over adapters, in nats",
            ENTROPY_BUCKETS_NATS,
        )
        self._is_paused = False
        self.usage = AdapterUsage()
        self._state = _ScrapedState(self.usage)
        registry.register(self._entropy)
        registry.register(self._state)

    def watch(
        self,
        *,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        num_waiting_for_adapters: Callable[[], int],
        adapters: Callable[[], Sequence[AdapterInfo]],
        max_adapters: int,
    ) -> None:
        """Say where the gauges that are read at scrape time come from."""
        self._state.num_running, self._state.num_waiting = num_running, num_waiting
        self._state.num_waiting_for_adapters = num_waiting_for_adapters
        self._state.adapters, self._state.max_adapters = adapters, max_adapters

    @contextmanager
    def without_steps(self) -> Iterator[None]:
        """Steps inside are not counted: those of the warm-up, which no client asked for."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def observe_step(self, stats: StepStats, slot_names: Mapping[int, str]) -> None:
        """Count one engine step; on the engine thread, so kept to a few microseconds."""
        if self._is_paused:
            return
        self._step_s.observe(stats.step_s)
        self._kv_usage.set(stats.kv_usage_ratio)
        # Both, as vLLM counts them: cached tokens are then a share of the prompt's. Each of n samples has its own.
        self._prompt_tokens.inc(stats.num_prompt_tokens + stats.num_cached_tokens)
        self._generation_tokens.inc(stats.num_generated_tokens)
        self._cached_tokens.inc(stats.num_cached_tokens)
        self._drafted_tokens.inc(stats.num_drafted_tokens)
        self._accepted_tokens.inc(stats.num_accepted_tokens)
        self._preemptions.inc(stats.num_preempted)
        self._observe_routing(stats.routing, slot_names)

    def _observe_routing(self, routing: RoutingStats, slot_names: Mapping[int, str]) -> None:
        for slot, mass in routing.gate_mass:
            if (name := slot_names.get(slot)) is not None:
                self._gate_mass.labels(name).inc(mass)
        if routing.entropies:
            self._entropy.observe(routing.entropies)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token_s.observe(seconds)

    def observe_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` more tokens of one choice came `seconds` after its last one."""
        for _ in range(num_tokens):
            self._token_gap_s.observe(seconds / num_tokens)

    def count_finished(self, model: str, finish_reason: str, latency_s: float) -> None:
        """One choice ended; `model` is a served name, never a client's text."""
        self._requests.labels(model, finish_reason).inc()
        self._request_s.observe(latency_s)

    def count_rejection(self, reason: str) -> None:
        """One request was refused; `reason` is the default code of an error class, or `internal_error`."""
        self._rejected.labels(reason).inc()

    def count_load(self, outcome: str, seconds: float) -> None:
        """One registration ended; `outcome` is `ready`, `cancelled` or the code of an error class."""
        self._loads.labels(outcome).inc()
        self._load_s.observe(seconds)

    def count_evictions(self, count: int) -> None:
        self._evictions.inc(count)

    def count_reload(self, outcome: str, seconds: float) -> None:
        """One adapter was read again, or could not be; see `ResidencyObserver`."""
        self._reloads.labels(outcome).inc()
        self._reload_s.observe(seconds)

    def count_wait(self, outcome: str, seconds: float) -> None:
        """One request no longer waits for adapters; see `ResidencyObserver`."""
        self._waits.labels(outcome).inc()
        self._wait_s.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """(body, content type) of GET /metrics."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
