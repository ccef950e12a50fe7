"""`adapters check` on real folders, and `list`, `add` and `remove` against the real app with a fake registry."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import cli
from tests.adapters.fake_hub import FakeHub
from tests.api.fakes import Harness
from tests.cli_isolation import isolated_cli

DEMO_ADAPTERS = Path("examples/demo/adapters")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with isolated_cli(monkeypatch):
        yield


class TestCheck:
    """Against the demo base model's architecture, without its weights."""

    def test_a_good_adapter_is_servable(self, capsys: pytest.CaptureFixture[str], demo_model_folder: Path) -> None:
        assert demo_model_folder.is_dir()
        assert cli.main(["adapters", "check", str(DEMO_ADAPTERS / "gsm8k")]) == 0
        output = capsys.readouterr().out
        assert "gsm8k: servable on HuggingFaceTB/SmolLM2-135M-Instruct" in output
        assert "rank 16, 120 projections (k_proj, o_proj, q_proj, v_proj)" in output

    def test_every_reason_is_told(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        content = json.loads((DEMO_ADAPTERS / "gsm8k" / "adapter_config.json").read_text())
        content.update(use_dora=True, base_model_name_or_path="someone/else")
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        assert cli.main(["adapters", "check", str(tmp_path)]) == 1
        output = capsys.readouterr().out
        assert "cannot be served" in output
        assert output.count("\n  [") == 3
        assert "someone/else" in output
        assert "dora" in output.lower()
        assert "the folder has no adapter_model.safetensors" in output

    def test_json_carries_the_whole_verdict(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert cli.main(["adapters", "check", str(DEMO_ADAPTERS / "cola"), "--json"]) == 0
        good = json.loads(capsys.readouterr().out)
        assert good["servable"] is True
        assert len(good["digest"]) == 64
        assert good["reasons"] == []
        assert cli.main(["adapters", "check", str(tmp_path), "--json"]) == 1
        bad = json.loads(capsys.readouterr().out)
        assert bad["servable"] is False
        assert {reason["code"] for reason in bad["reasons"]} == {"missing_file"}
        assert good.keys() == bad.keys()

    def test_the_server_s_limits_apply(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "check", str(DEMO_ADAPTERS / "gsm8k"), "--max-adapter-rank", "8"]) == 1
        assert "rank" in capsys.readouterr().out

    def test_a_revision_of_a_folder_is_wrong_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "check", str(DEMO_ADAPTERS / "gsm8k"), "--revision", "main"]) == 2
        assert "revision is for Hub sources" in capsys.readouterr().err

    def test_a_folder_that_is_not_there_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "check", "./not/there"]) == 1
        assert "missing_folder" in capsys.readouterr().out

    def test_a_hub_adapter_is_downloaded_and_judged_at_its_commit(self, tmp_path: Path) -> None:
        files = {path.name: path.read_bytes() for path in (DEMO_ADAPTERS / "cola").iterdir()}
        with FakeHub() as hub:
            commit = hub.push("org/cola", files)
            # In a process of its own: huggingface_hub reads its environment when it is imported.
            process = subprocess.run(
                [sys.executable, "-m", "server", "adapters", "check", "org/cola", "--json"],
                env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert process.returncode == 0, process.stderr
        verdict = json.loads(process.stdout)
        assert verdict["servable"] is True
        assert verdict["revision"] == commit
        assert "downloaded 100% of" in process.stderr


class TestAgainstTheRealApp:
    """`list`, `add` and `remove` through HTTP, with a fake registry behind."""

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return Harness(root=tmp_path)

    @pytest.fixture
    def url(self, harness: Harness) -> Iterator[str]:
        with harness.serve() as client:
            yield str(client.base_url)

    def test_list_prints_a_table(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "list", "--url", url]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["NAME", "STATE", "ROUTED", "PLACE", "RANK", "SHARE", "MIB", "DIGEST", "SOURCE"]
        assert lines[1].split() == ["gsm8k", "READY", "yes", "memory", "8", "0.0%", "0.0", "d" * 12, "org/adapter"]
        assert [line.index("READY") for line in lines[1:]] == [lines[0].index("STATE")] * 3

    def test_list_prints_json(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "list", "--url", url, "--json"]) == 0
        assert [info["name"] for info in json.loads(capsys.readouterr().out)["data"]] == ["gsm8k", "mbpp", "sst2"]

    def test_add_sends_every_field(self, harness: Harness, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["adapters", "add", "new", "org/new", "--revision", "main", "--subfolder", "a", "--not-routed"]
        settings = ["--pinned", "--description", "A new one.", "--max-gate-share", "0.25"]
        assert cli.main([*argv, *settings, "--no-wait", "--url", url]) == 0
        assert capsys.readouterr().out.startswith("new: DOWNLOADING")
        spec = harness.registry.registered[0]
        assert spec.model_dump() == {
            "name": "new",
            "source": "org/new",
            "revision": "main",
            "subfolder": "a",
            "routed": False,
            "pinned": True,
            "max_gate_share": 0.25,
            "description": "A new one.",
        }

    def test_add_finds_a_folder_of_the_shell_s(
        self, harness: Harness, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "inner" / "mine").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "inner")
        assert cli.main(["adapters", "add", "mine", "mine", "--no-wait", "--url", url]) == 0
        assert Path(harness.registry.registered[0].source) == tmp_path / "inner" / "mine"

    def test_remove_retires(self, harness: Harness, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "remove", "mbpp", "--url", url]) == 0
        assert harness.registry.infos["mbpp"].state == "RETIRING"
        assert capsys.readouterr().out == "mbpp: retired; requests under way end undisturbed\n"

    def test_an_error_is_the_server_s_message(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "remove", "nobody", "--url", url]) == 1
        message = capsys.readouterr().err
        assert message == "lora-mixer: the server refused (404 adapter_not_found): no adapter 'nobody'\n"

    def test_a_conflict_exits_with_1(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "add", "mbpp", "org/other", "--url", url]) == 1
        assert "409 adapter_conflict" in capsys.readouterr().err
