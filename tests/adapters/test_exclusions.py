"""Who is out of the routed pool, on disk."""

import json
from pathlib import Path

import pytest

from server.adapters.exclusions import Exclusion, Exclusions
from server.errors import ConfigError, RegistryFileError

OUT = Exclusion(generation=2, digest="d" * 64, share=0.9, max_gate_share=0.5, window_tokens=1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapters.state.excluded"


def test_another_process_reads_what_was_put(path: Path) -> None:
    Exclusions(path).put("a", OUT)
    again = Exclusions(path)
    assert (again.get("a"), again.get("b")) == (OUT, None)
    again.remove("a")
    again.remove("b")
    assert Exclusions(path).get("a") is None


def test_the_reason_has_the_numbers_and_what_to_do() -> None:
    assert OUT.reason == (
        "it had 90.0% of the gate weight of the last 1000 routed tokens, more than its max_gate_share of 0.5; "
        "calibrate it or register it again to route to it again"
    )


def test_what_cannot_be_written_is_not_changed(path: Path) -> None:
    exclusions = Exclusions(path)
    exclusions.put("a", OUT)
    moved = path.parent.rename(path.parent.with_name("elsewhere"))
    with pytest.raises(RegistryFileError, match="nothing was changed"):
        exclusions.remove("a")
    assert exclusions.get("a") == OUT
    moved.rename(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"version": 2, "excluded": {}}',
        '{"version": 1}',
        '{"version": 1, "excluded": []}',
        '{"version": 1, "excluded": {"a": {}}}',
        '{"version": 1, "excluded": {"a": {"generation": "x"}}}',
        json.dumps({"version": 1, "excluded": {"a": {"generation": 1, "digest": "d", "share": 1.0,
                    "max_gate_share": 0.5, "window_tokens": 1, "more": 2}}}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_and_stays_as_it_is(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match="is damaged"):
        Exclusions(path)
    assert path.read_text() == text


def test_without_a_file_exclusions_last_as_long_as_the_process() -> None:
    exclusions = Exclusions(None)
    exclusions.put("a", OUT)
    assert exclusions.get("a") == OUT
    exclusions.remove("a")
    assert exclusions.get("a") is None
