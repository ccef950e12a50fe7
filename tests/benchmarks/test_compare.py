"""The driver of a comparison, with peers that only pretend: order, resuming, failures, and what is written."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as driver
from benchmarks.compare import (
    PeerFailedError,
    add_lines,
    build_parser,
    compare,
    new_result,
    prepare,
    resumed,
    run_peer,
    select,
    summarised,
)
from benchmarks.peers.catalogue import Command, Peer, peers
from benchmarks.peers.environments import ROOT, PeerUnavailableError
from benchmarks.peers.protocol import Workload
from benchmarks.results_file import read_json, write_json

COMMAND = Command(["true"])


def peer(name: str, **settings: Any) -> Peer:
    return Peer(name, lambda _: COMMAND, **settings)


def generation(case: str, rate: float) -> dict[str, Any]:
    facts = {"kind": "generation", "batch": 1, "prompt_tokens": 64, "new_tokens": 8}
    return {**facts, "case": case, "decode_tok_s": rate}


def run_of(calls: list[tuple[str, int, int]]) -> Callable[..., list[dict[str, Any]]]:
    def run(who: Peer, _command: Command, workload: Workload, number: int) -> list[dict[str, Any]]:
        calls.append((who.name, number, workload.new_tokens))
        return [{"kind": "start", "case": "x", "versions": {"p": "1"}}, generation("base", 10.0 + number)]

    return run


def test_each_round_starts_with_another_peer_and_slow_ones_generate_less() -> None:
    calls: list[tuple[str, int, int]] = []
    known = [peer("a"), peer("b", new_tokens=24), peer("c")]
    result = new_result(Workload(), rounds=2)
    compare(known, dict.fromkeys("abc", COMMAND), result, run_of(calls), lambda: None)
    assert calls == [("a", 0, 128), ("b", 0, 24), ("c", 0, 128), ("b", 1, 24), ("c", 1, 128), ("a", 1, 128)]
    assert result["versions"]["b: p"] == "1"
    assert "--new-tokens 24" in result["commands"]["b"]


def test_resuming_measures_only_what_is_missing() -> None:
    result = new_result(Workload(), rounds=2)
    add_lines(result, "a", 0, [generation("base", 1.0)])
    calls: list[tuple[str, int, int]] = []
    compare([peer("a"), peer("b")], {"a": COMMAND, "b": COMMAND}, result, run_of(calls), lambda: None)
    assert sorted((name, number) for name, number, _ in calls) == [("a", 1), ("b", 0), ("b", 1)]


def test_resuming_something_else_is_refused() -> None:
    old = new_result(Workload(), rounds=1)
    assert resumed(old, new_result(Workload(), rounds=3))["rounds"] == 3
    with pytest.raises(ValueError, match="cannot resume: its workload"):
        resumed(old, new_result(Workload(new_tokens=9), rounds=1))


def test_a_peer_that_fails_is_recorded_and_the_others_go_on() -> None:
    def run(who: Peer, *_: Any) -> list[dict[str, Any]]:
        if who.name == "a":
            raise PeerFailedError("exit status 3: out of memory")
        return [generation("base", 5.0)]

    saved: list[int] = []
    result = new_result(Workload(), rounds=1)
    commands = {"a": COMMAND, "b": COMMAND}
    compare([peer("a"), peer("b")], commands, result, run, lambda: saved.append(len(result["runs"])))
    assert result["errors"] == [{"peer": "a", "round": 0, "message": "exit status 3: out of memory"}]
    assert [line["peer"] for line in result["runs"]] == ["b"]
    assert saved == [0, 1], "the result is saved after every peer"


def test_a_peer_that_cannot_run_here_is_left_out_with_its_reason() -> None:
    def unavailable(_: Path) -> Command:
        raise PeerUnavailableError("no cmake on PATH")

    result = new_result(Workload(), rounds=1)
    commands = prepare([Peer("a", unavailable), peer("b")], Path("/model"), result)
    assert list(commands) == ["b"]
    assert result["skipped"] == {"a": "no cmake on PATH"}


def test_only_and_skip_choose_among_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    flags = build_parser().parse_args(["--only", "ours,vllm-base", "--skip", "vllm-base"])
    assert [found.name for found in select(peers(), flags.only, flags.skip)] == ["ours"]
    assert len(select(peers(), (), ("ours",))) == len(peers()) - 1
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--only", "sglang"])
    assert "sglang: not among ours" in capsys.readouterr().err


def test_commands_are_shown_without_this_machine_s_paths() -> None:
    command = Command([str(ROOT / "runs/peers/x"), str(Path.home() / "model")], {"LD_PRELOAD": str(ROOT / "a.so")})
    assert command.shown() == "LD_PRELOAD=a.so runs/peers/x ~/model"


class TestRunPeer:
    """A real process that prints what a runner would."""

    def run(self, code: str) -> list[dict[str, Any]]:
        command = Command([sys.executable, "-c", code])
        return run_peer(peer("x"), command, Workload(), 0)

    def test_json_lines_are_kept_and_noise_is_not(self) -> None:
        lines = self.run("print('loading'); print('{\"kind\": \"prefill\", \"prefill_tok_s\": 3.5}'); print('{}')")
        assert [(line["kind"], line["prefill_tok_s"]) for line in lines] == [("prefill", 3.5)]
        assert "other_cores" in lines[0]

    def test_a_bad_end_is_told_with_its_last_words(self) -> None:
        with pytest.raises(PeerFailedError, match="exit status 3: it broke"):
            self.run("import sys; print('it broke', file=sys.stderr); sys.exit(3)")

    def test_a_peer_that_hangs_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "TIMEOUT_S", 0.2)
        with pytest.raises(PeerFailedError, match="not done"):
            self.run("import time; time.sleep(60)")

    def test_its_environment_is_ours_and_its_own(self) -> None:
        code = "import os, json; print(json.dumps({'kind': os.environ['X_PEER'], 'path': bool(os.environ['PATH'])}))"
        command = Command([sys.executable, "-c", code], {"X_PEER": "yes"})
        (line,) = run_peer(peer("x"), command, Workload(), 0)
        assert (line["kind"], line["path"]) == ("yes", True)


def test_the_summary_leaves_out_start_up_lines() -> None:
    result = new_result(Workload(), rounds=1)
    add_lines(result, "ours", 0, [{"kind": "start", "case": "ours", "startup_s": 1.0}, generation("base", 4.0)])
    summary = summarised(result)
    assert [row["median"] for row in summary["figures"]] == [4.0]


def test_a_result_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [found.name for found in path.parent.iterdir()] == ["result.json"]
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_json(path)


def test_slow_peers_are_never_asked_for_more_than_the_comparison_wants() -> None:
    slow = replace(peer("a"), new_tokens=24, has_prefill=False)
    assert slow.workload(Workload(new_tokens=8)).new_tokens == 8
    assert slow.workload(Workload()).prefill == 0


def test_the_flame_picture_wraps_our_own_benchmark() -> None:
    from argparse import Namespace

    from benchmarks.flame import command
    from server.cli import build_parser as lora_mixer

    flags = Namespace(policy="pinned", concurrency="4", new_tokens="9", native=True, out=Path("x.svg"))
    words = command("py-spy", flags)
    assert words[:2] == ["py-spy", "record"]
    assert words[words.index("--output") + 1] == "x.svg"
    assert "--native" in words[: words.index("--")]
    measured = lora_mixer().parse_args(words[words.index("bench") :])
    assert (measured.policies, measured.concurrency, measured.new_tokens) == (("pinned",), (4,), 9)
