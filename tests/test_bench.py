"""The benchmark's figures against hand-computed ones; which load it makes, and in which order."""

import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from server.bench.cases import Plan, model_of, run_plan
from server.bench.figures import generation_figures, percentile, prefill_figures, ratio_lines
from server.bench.load import Answer, Job, Load, checked, closed_loop, open_loop
from server.errors import ConfigError
from tests.bench_fakes import FakeTarget


def answer(sent_s: float, first_s: float, gaps_s: Sequence[float] = (), error: str | None = None) -> Answer:
    """An answer whose first token came at `first_s`, the others after the given gaps."""
    times = [first_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    return Answer(sent_s, tuple(times), error)


async def lines_of(target: FakeTarget, plan: Plan) -> list[dict[str, Any]]:
    return [line async for line in run_plan(target, plan, lambda _: None)]


class TestFigures:
    def test_decode_rate_leaves_out_the_time_to_the_first_tokens(self) -> None:
        load = Load(wall_s=3.0, answers=(answer(0, 1.0, [0.5] * 4), answer(0, 1.0, [0.5] * 4)))
        first = Load(wall_s=1.0, answers=(answer(0, 1.0), answer(0, 1.0)))
        figures = generation_figures(load, first, concurrency=2)
        assert figures["decode_tok_s"] == pytest.approx(2 * (5 - 1) / (3.0 - 1.0))
        assert figures["end_to_end_tok_s"] == pytest.approx(2 * 5 / 3.0, abs=0.01)
        assert figures["tokens"] == 10
        assert figures["requests"] == 2
        assert figures["failures"] == 0

    def test_latencies_are_from_sending_and_between_tokens(self) -> None:
        load = Load(wall_s=9.0, answers=(answer(0.0, 0.010, [0.004, 0.006]), answer(1.0, 1.030, [0.008])))
        figures = generation_figures(load, None, concurrency=None)
        assert figures["ttft_ms_p50"] == pytest.approx(20.0)
        assert figures["ttft_ms_p99"] == pytest.approx(10 + 0.99 * 20)
        assert figures["itl_ms_p50"] == pytest.approx(6.0)
        assert figures["itl_ms_p99"] == pytest.approx(8 - 0.02 * 2)
        assert figures["decode_tok_s"] is None

    def test_failed_requests_count_as_failures_and_not_as_speed(self) -> None:
        load = Load(wall_s=2.0, answers=(answer(0, 1.0, [0.5] * 3), answer(0, 1.0, [0.5], error="broken")))
        figures = generation_figures(load, Load(1.0, (answer(0, 1.0),)), concurrency=2)
        assert figures["failures"] == 1
        assert figures["first_failure"] == "broken"
        assert figures["tokens"] == 4
        assert figures["decode_tok_s"] is None

    def test_no_answer_at_all_gives_no_numbers(self) -> None:
        figures = generation_figures(Load(0.0, (Answer(0, (), "down"),)), None, concurrency=1)
        assert figures["end_to_end_tok_s"] is None
        assert figures["ttft_ms_p50"] is None
        assert figures["itl_ms_p99"] is None

    def test_prefill_rate_is_prompt_tokens_over_time_to_one_token(self) -> None:
        assert prefill_figures(Load(0.5, (answer(0, 0.5),)), 1024)["prefill_tok_s"] == 2048
        assert prefill_figures(Load(0.5, (Answer(0, (), "no"),)), 1024)["prefill_tok_s"] is None

    @pytest.mark.parametrize("percent", [0, 1, 37.5, 50, 99, 100])
    def test_percentiles_are_the_statistics_module_s(self, percent: float) -> None:
        values = [3.0, 1.0, 4.0, 1.5, 9.0]
        cuts = statistics.quantiles(values, n=1000, method="inclusive")
        expected = [min(values), *cuts, max(values)][round(percent * 10)]
        assert percentile(values, percent) == pytest.approx(expected)
        assert percentile([], percent) is None


class TestRatios:
    def line(self, policy: str, repeat: int, decode: float | None, **other: Any) -> dict[str, Any]:
        facts = {"kind": "generation", "mode": "fake", "concurrency": 8, "prompt_tokens": 64, "new_tokens": 128}
        return {**facts, "policy": policy, "repeat": repeat, "decode_tok_s": decode, **other}

    def test_a_ratio_is_taken_within_each_repeat(self) -> None:
        results = [
            self.line("base", 0, 100.0), self.line("routed", 0, 90.0),
            self.line("routed", 1, 40.0), self.line("base", 1, 50.0),
            self.line("base", 2, 10.0), self.line("routed", 2, 7.0),
        ]  # fmt: skip
        (line,) = ratio_lines(results)
        assert line["case"] == "routed/base"
        assert line["kind"] == "ratio"
        assert line["of"] == "generation"
        assert line["concurrency"] == 8
        assert line["decode_tok_s_ratio"] == {"median": 0.8, "min": 0.7, "max": 0.9, "repeats": 3}

    def test_repeats_without_a_figure_are_left_out(self) -> None:
        results = [self.line("base", 0, 100.0), self.line("routed", 0, None), self.line("routed", 1, 10.0)]
        assert ratio_lines(results) == []

    def test_sizes_are_never_mixed_and_open_loops_have_no_ratio(self) -> None:
        results = [
            self.line("base", 0, 100.0), self.line("routed", 0, 90.0, concurrency=1),
            self.line("base", 0, 1.0, concurrency=None), self.line("routed", 0, 1.0, concurrency=None),
        ]  # fmt: skip
        assert ratio_lines(results) == []


class TestLoad:
    async def test_a_closed_loop_keeps_every_client_busy_and_no_more(self) -> None:
        target = FakeTarget()
        jobs = [Job("m", (1, 2), 3, "salt")] * 10
        load = await closed_loop(target, jobs, num_clients=4)
        assert len(load.answers) == 10
        assert target.most_running == 4
        assert all(len(answer.token_s) == 3 for answer in load.answers)
        assert load.wall_s >= max(answer.token_s[-1] for answer in load.answers) - min(a.sent_s for a in load.answers)

    async def test_an_open_loop_sends_everything_at_seeded_times(self) -> None:
        target = FakeTarget()
        load = await open_loop(target, [Job("m", (1,), 2, "salt")] * 6, requests_per_s=500.0, seed=3)
        sent = sorted(answer.sent_s for answer in load.answers)
        assert len(sent) == 6
        assert load.wall_s >= sent[-1] - sent[0] > 0

    def test_too_few_tokens_are_a_failure(self) -> None:
        job = Job("m", (1,), 3, "salt")
        assert checked(answer(0, 1, [1, 1]), job).error is None
        assert checked(answer(0, 1, [1]), job).error == "2 tokens instead of 3"
        assert checked(answer(0, 1, error="broken"), job).error == "broken"


class TestPlan:
    async def test_policies_take_turns_and_each_repeat_starts_with_another(self) -> None:
        plan = Plan(concurrency=(1, 2), new_tokens=4, prompt_tokens=3, repeat=2, prefill=5)
        lines = await lines_of(FakeTarget(), plan)
        assert [line["case"] for line in lines] == [
            "base c1", "pinned c1", "routed c1", "base c2", "pinned c2", "routed c2",
            "base prefill", "pinned prefill", "routed prefill",
            "pinned c1", "routed c1", "base c1", "pinned c2", "routed c2", "base c2",
            "pinned prefill", "routed prefill", "base prefill",
        ]  # fmt: skip
        assert [line["repeat"] for line in lines] == [0] * 9 + [1] * 9

    async def test_all_policies_get_the_same_seeded_prompts_under_salts_of_their_own(self) -> None:
        target = FakeTarget()
        await lines_of(target, Plan(policies=("base", "routed"), concurrency=(2,), new_tokens=2, repeat=1))
        full = [job for job in target.jobs if job.max_tokens == 2]
        assert {len(job.prompt_token_ids) for job in full} == {64}
        assert full[0].prompt_token_ids == full[2].prompt_token_ids != full[1].prompt_token_ids
        assert all(0 <= token < target.vocab_size for job in full for token in job.prompt_token_ids)
        assert len({job.salt for job in target.jobs}) == len(target.jobs) / 2
        other = FakeTarget()
        await lines_of(other, Plan(policies=("base",), concurrency=(2,), new_tokens=2, repeat=1, seed=1))
        assert other.jobs[-1].prompt_token_ids not in {job.prompt_token_ids for job in target.jobs}

    def test_models_by_policy(self) -> None:
        target = FakeTarget()
        assert [model_of("base", index, target) for index in range(2)] == ["base-model"] * 2
        assert [model_of("routed", index, target) for index in range(2)] == ["auto"] * 2
        assert [model_of("pinned", index, target) for index in range(3)] == ["a", "b", "a"]
        mixed = [model_of("mixed", index, target) for index in range(6)]
        assert mixed == ["base-model", "a", "auto", "base-model", "b", "auto"]

    async def test_several_requests_per_client(self) -> None:
        plan = Plan(policies=("base",), concurrency=(2,), new_tokens=4, requests_per_client=3, repeat=1)
        (line,) = await lines_of(FakeTarget(), plan)
        assert line["requests"] == 6
        assert line["tokens"] == 24

    async def test_an_open_loop_replaces_the_closed_ones(self) -> None:
        plan = Plan(policies=("base",), new_tokens=2, rate=1000.0, num_requests=5, repeat=1)
        (line,) = await lines_of(FakeTarget(), plan)
        assert line["case"] == "base open-loop"
        assert line["concurrency"] is None
        assert line["requests_per_s"] == 1000.0
        assert line["requests"] == 5
        assert line["decode_tok_s"] is None

    async def test_adapter_policies_without_adapters_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="pinned, routed need adapters"):
            await lines_of(FakeTarget(adapters=()), Plan())
