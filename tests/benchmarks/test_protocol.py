"""What peers are asked: the same prompts as ours, flags that survive the command line, the definition of the rate."""

import argparse
import json

import pytest

from benchmarks.peers import gemm_chain_runner, llama_cpp_runner, ours_runner
from benchmarks.peers.protocol import (
    Workload,
    add_workload_flags,
    check_lengths,
    decode_rate,
    flags_of,
    measure,
    prompts,
    workload_from,
)
from server.bench.cases import Plan, run_plan
from server.cli import build_parser
from tests.bench_fakes import FakeTarget


def parse(*argv: str) -> Workload:
    parser = argparse.ArgumentParser()
    add_workload_flags(parser)
    return workload_from(parser.parse_args(argv))


async def test_peers_get_the_very_prompts_of_our_benchmark() -> None:
    target = FakeTarget()
    target.vocab_size = 49_152
    plan = Plan(policies=("base",), concurrency=(8,), new_tokens=2, repeat=1)
    async for _ in run_plan(target, plan, lambda _: None):
        pass
    assert [list(job.prompt_token_ids) for job in target.jobs[-8:]] == prompts(8, 64, seed=0)


def test_a_workload_survives_the_command_line() -> None:
    assert parse() == Workload()
    workload = Workload(prompt_tokens=7, new_tokens=9, batches=(2, 5), prefill=0, seed=3)
    assert parse(*flags_of(workload)) == workload


@pytest.mark.parametrize(
    "flags", [["--new-tokens", "1"], ["--batches", "1,1"], ["--batches", "0"], ["--prefill", "-1"]], ids=str
)
def test_workloads_that_cannot_be_measured_are_wrong_usage(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2


def test_the_decode_rate_is_without_the_first_tokens() -> None:
    assert decode_rate(8, 128, first_s=1.0, all_s=5.0) == 8 * 127 / 4.0
    assert decode_rate(8, 128, first_s=1.0, all_s=1.0) is None


def test_every_batch_is_warmed_up_then_timed_with_one_and_with_all_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int, int]] = []

    def generate(ids: list[list[int]], new_tokens: int) -> None:
        calls.append((len(ids), len(ids[0]), new_tokens))

    measure("case", generate, Workload(batches=(1, 4), new_tokens=16, prefill=100))
    assert calls == [(1, 64, 4), (1, 64, 1), (1, 64, 16), (4, 64, 4), (4, 64, 1), (4, 64, 16), (1, 100, 1), (1, 100, 1)]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kind"], line["batch"], line["new_tokens"]) for line in lines] == [
        ("generation", 1, 16),
        ("generation", 4, 16),
        ("prefill", 1, 1),
    ]


def test_a_peer_that_stops_early_is_refused() -> None:
    check_lengths([[1, 2], [3, 4]], 2)
    with pytest.raises(SystemExit, match="asked for 2 tokens per prompt, got 1"):
        check_lengths([[1, 2], [3]], 2)


def test_our_own_runner_asks_the_benchmark_for_the_same_and_turns_its_policies() -> None:
    workload = Workload(new_tokens=9, batches=(1, 3), prefill=100, seed=5)
    command = ours_runner.bench_command("adapters.yaml", workload, shift=1)
    flags = build_parser().parse_args(command[command.index("bench") :])
    assert flags.policies == ("pinned", "routed", "base")
    assert (flags.concurrency, flags.new_tokens, flags.prompt_tokens) == ((1, 3), 9, 64)
    assert (flags.prefill, flags.seed, flags.repeat) == (100, 5, 1)
    without = ours_runner.bench_command("adapters.yaml", Workload(prefill=0), shift=0)
    assert "--prefill" not in without


async def test_our_lines_are_put_into_the_peers_words() -> None:
    plan = Plan(policies=("routed",), concurrency=(2,), new_tokens=4, repeat=1, prefill=10)
    lines = [ours_runner.translated(line) async for line in run_plan(FakeTarget(), plan, lambda _: None)]
    assert [line["case"] for line in lines] == ["routed", "routed"]
    assert (lines[0]["kind"], lines[0]["batch"], lines[0]["new_tokens"]) == ("generation", 2, 4)
    assert (lines[1]["kind"], lines[1]["prompt_tokens"]) == ("prefill", 10)


def test_llama_cpp_is_told_the_workload_and_its_rows_are_read() -> None:
    flags = llama_cpp_runner.batched_flags(Workload(batches=(1, 8)))
    assert flags[flags.index("-npl") + 1] == "1,8"
    assert int(flags[flags.index("-c") + 1]) == 8 * (64 + 128)
    output = 'noise\n{"pp": 64, "tg": 128, "pl": 8, "t_pp": 1.0, "t_tg": 4.0}\nmore noise\n'
    (line,) = llama_cpp_runner.generation_lines(llama_cpp_runner.json_lines(output))
    assert line["decode_tok_s"] == 8 * 128 / 4.0
    assert line["end_to_end_tok_s"] == 8 * 128 / 5.0
    assert (line["batch"], line["prompt_tokens"], line["new_tokens"]) == (8, 64, 128)


def test_the_gemm_chain_has_the_model_s_fused_shapes() -> None:
    config = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    layer, num_layers, head = gemm_chain_runner.shapes(config)
    assert layer == [(576, 960), (576, 576), (576, 3072), (1536, 576)]
    assert num_layers == 30
    assert head == (576, 49152)


def test_a_step_is_repeated_and_its_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 10.0, 11.0, 20.0, 25.0, 30.0, 31.5])
    monkeypatch.setattr("benchmarks.peers.gemm_chain_runner.time.perf_counter", lambda: next(clock))
    assert gemm_chain_runner.median_step_s(lambda: None, min_seconds=2.0) == 1.5
