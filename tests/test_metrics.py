"""Metrics: names and labels of the design, histograms fed in bulk, adapters in flight, and what a step costs."""

import dataclasses
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.adapters.records import AdapterInfo, AdapterState
from server.engine.step_stats import RoutingStats, StepStats
from server.metrics import AdapterUsage, BatchHistogram, Metrics

STEP = StepStats(
    step_s=0.02,
    num_prompt_tokens=100,
    num_generated_tokens=5,
    num_cached_tokens=32,
    num_running=3,
    num_waiting=2,
    num_preempted=1,
    kv_usage_ratio=0.25,
    num_drafted_tokens=7,
    num_accepted_tokens=4,
    routing=RoutingStats(gate_mass=((0, 1.0), (1, 60.5), (2, 40.0), (9, 3.0)), entropies=(0.0, 0.69, 0.05)),
)


def value(metrics: Metrics, name: str, /, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"lora_mixer_{name}", labels)


def test_one_step_feeds_every_engine_metric() -> None:
    metrics = Metrics()
    metrics.observe_step(STEP, {1: "gsm8k", 2: "mbpp"})
    metrics.observe_step(STEP, {1: "gsm8k", 2: "mbpp"})
    assert value(metrics, "prompt_tokens_total") == 2 * (100 + 32)
    assert value(metrics, "generation_tokens_total") == 10
    assert value(metrics, "prefix_cache_hit_tokens_total") == 64
    assert value(metrics, "draft_tokens_total") == 14
    assert value(metrics, "accepted_draft_tokens_total") == 8
    assert value(metrics, "preemptions_total") == 2
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "step_seconds_count") == 2
    assert value(metrics, "adapter_gate_mass_total", adapter="gsm8k") == 121
    assert value(metrics, "adapter_gate_mass_total", adapter="mbpp") == 80
    assert value(metrics, "routing_entropy_count") == 6
    assert value(metrics, "routing_entropy_sum") == pytest.approx(2 * 0.74)


def test_gate_mass_of_slots_without_a_name_makes_no_series() -> None:
    metrics = Metrics()
    metrics.observe_step(STEP, {1: "gsm8k"})
    body, _ = metrics.render()
    series = [
        sample.labels["adapter"]
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.name == "lora_mixer_adapter_gate_mass_total"
    ]
    assert series == ["gsm8k"]


def test_batch_histogram_counts_like_prometheus() -> None:
    histogram = BatchHistogram("h", "help", (0.1, 0.5, 1.0))
    histogram.observe([0.0, 0.1, 0.11, 0.5, 2.0])
    histogram.observe([0.7])
    (family,) = histogram.collect()
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "h_bucket"}
    assert buckets == {"0.1": 2, "0.5": 4, "1.0": 5, "+Inf": 6}  # a value on a bound belongs below it
    assert {s.name: s.value for s in family.samples if s.name != "h_bucket"} == {
        "h_count": 6,
        "h_sum": pytest.approx(3.41),
    }


def test_adapters_in_flight_move_from_waiting_to_running_and_away() -> None:
    usage = AdapterUsage()
    usage.enter(["a", "b"])
    usage.enter(["b"])
    assert usage.names() == ([], ["a", "b"])
    usage.start(["a", "b"])
    assert usage.names() == (["a", "b"], ["b"])
    usage.leave(["b"], was_running=False)
    usage.leave(["a", "b"], was_running=True)
    assert usage.names() == ([], [])


def test_requests_tokens_and_loads_are_counted() -> None:
    metrics = Metrics()
    metrics.count_finished("auto", "stop", 1.5)
    metrics.count_rejection("model_not_found")
    metrics.count_load("ready", 3.0)
    metrics.count_evictions(2)
    metrics.count_reload("loaded", 0.5)
    metrics.count_wait("leased", 0.25)
    metrics.observe_first_token(0.2)
    metrics.observe_tokens(0.3, 3)
    assert value(metrics, "requests_total", model="auto", finish_reason="stop") == 1
    assert value(metrics, "request_latency_seconds_sum") == 1.5
    assert value(metrics, "requests_rejected_total", reason="model_not_found") == 1
    assert value(metrics, "adapter_loads_total", outcome="ready") == 1
    assert value(metrics, "adapter_load_seconds_count") == 1
    assert value(metrics, "adapter_evictions_total") == 2
    assert value(metrics, "adapter_reloads_total", outcome="loaded") == 1
    assert value(metrics, "adapter_reload_seconds_sum") == 0.5
    assert value(metrics, "adapter_waits_total", outcome="leased") == 1
    assert value(metrics, "adapter_wait_seconds_sum") == 0.25
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.3)


def test_scraped_state_is_read_when_it_is_scraped() -> None:
    metrics = Metrics()
    adapter = AdapterInfo(
        "a",
        AdapterState.READY,
        "org/a",
        digest="d1",
        rank=8,
        routed=True,
        traffic_alarm=True,
        resident=True,
        memory_bytes=300,
    )
    adapters = [adapter, dataclasses.replace(adapter, name="b", resident=False)]
    running = [4]
    metrics.watch(
        num_running=lambda: running[0],
        num_waiting=lambda: 7,
        num_waiting_for_adapters=lambda: 5,
        adapters=lambda: adapters,
        max_adapters=64,
    )
    labels = {"name": "a", "digest": "d1", "revision": "", "rank": "8", "state": "READY", "routed": "true"}
    assert value(metrics, "adapter_info", **labels) == 1
    assert (value(metrics, "running_requests"), value(metrics, "waiting_requests")) == (4, 7)
    assert (value(metrics, "adapter_traffic_alarm", adapter="a"), value(metrics, "adapter_excluded", adapter="a")) == (
        1,
        0,
    )
    adapters[0] = dataclasses.replace(adapter, exclusion={"share": 0.9})
    assert value(metrics, "adapter_excluded", adapter="a") == 1
    assert value(metrics, "requests_waiting_for_adapters") == 5
    assert (value(metrics, "adapters_resident"), value(metrics, "adapter_memory_bytes")) == (1, 300)
    adapters.clear()
    running[0] = 0
    assert value(metrics, "adapter_info", **labels) is None
    assert value(metrics, "running_requests") == 0


def test_lora_requests_info_has_the_shape_that_gateways_read() -> None:
    metrics = Metrics()
    metrics.watch(
        num_running=lambda: 0, num_waiting=lambda: 0, num_waiting_for_adapters=lambda: 0, adapters=list, max_adapters=8
    )
    metrics.usage.enter(["b"])
    metrics.usage.enter(["a"])
    metrics.usage.start(["a"])
    shown = value(metrics, "lora_requests_info", max_lora="8", running_lora_adapters="a", waiting_lora_adapters="b")
    assert shown == pytest.approx(time.time(), abs=5)


def test_two_apps_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.count_finished("auto", "stop", 1.0)
    assert value(second, "requests_total", model="auto", finish_reason="stop") is None


def test_rendered_text_parses() -> None:
    metrics = Metrics()
    metrics.observe_step(STEP, {1: "gsm8k"})
    body, content_type = metrics.render()
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert {"lora_mixer_requests", "lora_mixer_routing_entropy", "lora_mixer_lora_requests_info"} <= names
    assert content_type.startswith("text/plain")
