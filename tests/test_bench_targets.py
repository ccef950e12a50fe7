"""`bench` against a real engine and server with a scripted model: exact counts, lines, facts and exit codes."""

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from server import __version__, cli
from server.bench.cases import Plan, run_plan
from server.bench.command import report
from server.bench.facts import OtherLoad, config_digest
from server.bench.in_process import InProcessTarget
from server.bench.load import Job
from server.bench.over_http import HttpTarget
from server.config import AdapterSpec, ServerConfig, ServerSettings
from server.errors import LoraMixerError
from server.machine import machine_facts, version_facts
from tests.api.fakes import BASE_NAME, Harness
from tests.bench_fakes import FakeTarget
from tests.cli_isolation import isolated_cli


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with isolated_cli(monkeypatch):
        yield


class TestReport:
    async def test_one_line_per_case_then_ratios_each_with_all_facts(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        facts = {"versions": version_facts(), "machine": machine_facts(), "config_digest": "abc"}
        with (tmp_path / "out.jsonl").open("a") as copy:
            plan = Plan(concurrency=(1, 2), new_tokens=8, repeat=1)
            assert await report(FakeTarget(), plan, facts, copy) == 0
        output = capsys.readouterr()
        lines = [json.loads(line) for line in output.out.splitlines()]
        assert (tmp_path / "out.jsonl").read_text() == output.out
        cases = [line for line in lines if line["kind"] == "generation"]
        assert len(cases) == 6
        expected = {
            "case", "mode", "policy", "concurrency", "prompt_tokens", "new_tokens", "decode_tok_s", "end_to_end_tok_s",
            "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "failures",
            "versions", "machine", "config_digest",
        }  # fmt: skip
        assert all(expected <= line.keys() for line in cases)
        assert all(line["tokens"] == line["concurrency"] * 8 for line in cases)
        assert {line["case"] for line in lines} - {line["case"] for line in cases} <= {"pinned/base", "routed/base"}
        assert output.err.startswith("bench: warm-up: base c1\n")

    async def test_a_failed_request_is_told_and_exits_with_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        plan = Plan(policies=("base",), concurrency=(1,), new_tokens=8, repeat=1)
        assert await report(FakeTarget(missing_tokens=3), plan, {}) == 1
        line = json.loads(capsys.readouterr().out)
        assert line["failures"] == 2  # the run with one token, and the run itself
        assert line["first_failure"] == "5 tokens instead of 8"


class TestTargets:
    """Both targets against the real engine with a scripted model."""

    def in_process(self, harness: Harness) -> InProcessTarget:
        return InProcessTarget(
            harness.engine,
            cast("Any", harness.registry),
            base_model=BASE_NAME,
            adapters=list(harness.registry.infos),
            vocab_size=260,
        )

    async def test_in_process_counts_every_token_and_leaves_no_lease(self) -> None:
        harness = Harness()
        harness.engine.start()
        try:
            plan = Plan(policies=("base", "pinned", "routed", "mixed"), concurrency=(1, 5), new_tokens=9, repeat=1)
            lines = [line async for line in run_plan(self.in_process(harness), plan, lambda _: None)]
        finally:
            harness.engine.stop()
        assert [line["failures"] for line in lines] == [0] * 8
        assert [line["tokens"] for line in lines] == [9] * 4 + [45] * 4
        assert all(line["mode"] == "in-process" for line in lines)
        assert harness.registry.num_open_leases == 0
        # Per policy and size: warm-up, one token, all tokens.
        assert len(harness.registry.leases) == 4 * 3 * (1 + 5)
        slots = [sequence.plan.slots for sequence in harness.runner.seen if len(sequence.plan.slots) == 1]
        assert {slot for (slot,) in slots} == {1, 2, 3}, "pinned requests take every adapter"

    async def test_in_process_failures_are_answers(self) -> None:
        harness = Harness()
        harness.runner.fail_after = 2
        harness.engine.start()
        try:
            target = self.in_process(harness)
            broken = await target.generate(Job("auto", (1, 2), 5, "salt"))
            unknown = await target.generate(Job("nobody", (1, 2), 5, "salt"))
            too_long = await target.generate(Job("auto", (1,) * 600, 5, "salt"))
        finally:
            harness.engine.stop()
        assert len(broken.token_s) == 2
        assert broken.error == "the model step failed (RuntimeError)"
        assert unknown.error == "The model 'nobody' does not exist."
        assert too_long.error is not None
        assert harness.registry.num_open_leases == 0

    async def test_over_http_counts_every_token(self) -> None:
        harness = Harness()
        with harness.serve() as client:
            async with await HttpTarget.connect(str(client.base_url), None) as target:
                assert target.base_model == BASE_NAME
                assert target.adapters == ["gsm8k", "mbpp", "sst2"]
                target.vocab_size = 260
                plan = Plan(policies=("base", "mixed"), concurrency=(3,), new_tokens=9, repeat=1, prefill=20)
                lines = [line async for line in run_plan(target, plan, lambda _: None)]
            harness.settle()
        assert [line["failures"] for line in lines] == [0] * 4
        assert [line["tokens"] for line in lines[:2]] == [27, 27]
        assert {line["mode"] for line in lines} == {"http"}
        assert {sequence.params.temperature for sequence in harness.runner.seen} == {0.0}

    async def test_over_http_failures_are_answers(self) -> None:
        harness = Harness()
        harness.runner.fail_after = 2
        with harness.serve() as client:
            async with await HttpTarget.connect(str(client.base_url), None) as target:
                broken = await target.generate(Job("auto", (1, 2), 5, "salt"))
                unknown = await target.generate(Job("nobody", (1, 2), 5, "salt"))
            harness.settle()
        assert len(broken.token_s) == 2
        assert broken.error is not None
        assert unknown.error is not None
        assert unknown.error.startswith("status 404: ")

    async def test_a_server_that_is_not_there_is_told(self) -> None:
        with pytest.raises(LoraMixerError, match="did not list its models"):
            await HttpTarget.connect("http://127.0.0.1:9", None)


class TestFacts:
    def test_versions_and_machine_are_named(self) -> None:
        assert version_facts()["lora_mixer"] == __version__
        assert re.match(r"\d+\.\d+", version_facts()["torch"])
        machine = machine_facts()
        assert 1 <= machine["cores"] <= (os.cpu_count() or 1)
        assert machine["cpu_model"]

    def test_the_digest_follows_settings_and_adapters_but_not_folders(self) -> None:
        config = ServerConfig(adapters=(AdapterSpec(name="a", source="x"),), root=Path("/one"))
        digest = config_digest(config, ["d1", "d2"])
        assert re.fullmatch("[0-9a-f]{16}", digest)
        assert config_digest(config.model_copy(update={"root": Path("/two")}), ["d2", "d1"]) == digest
        assert config_digest(config, ["d1", "d3"]) != digest
        assert config_digest(config.model_copy(update={"server": ServerSettings(block_size=8)}), ["d1", "d2"]) != digest

    def test_own_work_is_not_others(self) -> None:
        others = OtherLoad()
        deadline_s = time.monotonic() + 0.1
        while time.monotonic() < deadline_s:
            pass
        cores = others.cores()
        assert cores is None or 0 <= cores <= (os.cpu_count() or 1) + 0.5


class TestCommand:
    def test_over_http_from_the_command_line(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        harness = Harness()
        harness.runner.step_s = 0.002
        with harness.serve() as client:
            argv = [
                "bench",
                "--url",
                str(client.base_url),
                "--policies",
                "base,routed",
                "--concurrency",
                "2",
                "--repeat",
                "1",
            ]
            status = cli.main([*argv, "--new-tokens", "6", "--json-out", str(tmp_path / "out.jsonl")])
            harness.settle()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert status == 1, "the fake model knows fewer tokens than prompts are drawn from"
        assert all("token" in line["first_failure"] for line in lines)

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--policies", "base,fast"], "'fast' is none of base, pinned, routed, mixed"),
            (["--policies", "base,base"], "names a value twice"),
            (["--concurrency", "1,0"], "at least 1"),
            (["--new-tokens", "-3"], "at least 1"),
            (["--rate", "0"], "above 0"),
            (["--rate", "nan"], "above 0"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_bad_flags_are_wrong_usage(
        self, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *flags])
        assert ended.value.code == 2
        assert complaint in capsys.readouterr().err

    def test_prefill_has_a_default_size(self) -> None:
        def parse(*argv: str) -> argparse.Namespace:
            return cli.build_parser().parse_args(["bench", *argv])

        assert parse().prefill is None
        assert parse("--prefill").prefill == 1024
        assert parse("--prefill", "256").prefill == 256

    def test_a_file_that_cannot_be_written_is_told_before_measuring(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        target = tmp_path / "no" / "out.jsonl"
        assert cli.main(["bench", "--url", "http://127.0.0.1:9", "--json-out", str(target)]) == 2
        assert "cannot write --json-out" in capsys.readouterr().err
