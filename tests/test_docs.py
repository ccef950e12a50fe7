"""Documents that name tests name existing ones."""

import re
from pathlib import Path

import pytest

from router_training.__main__ import build_parser

TESTS = Path(__file__).parent


@pytest.mark.parametrize("document", ["invariants.md", "security.md"])
def test_every_test_that_a_document_names_exists(document: str) -> None:
    text = (TESTS.parent / "docs" / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    assert len(named) > 25
    source = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    existing = set(re.findall(r"def (test_\w+)\(", source))
    assert named <= existing, f"named but missing: {sorted(named - existing)}"


def test_every_row_of_the_security_tables_names_a_test() -> None:
    text = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("## Adapters")[2].splitlines() if line.startswith("| ")]
    answers = [row for row in rows if not row.startswith(("| risk", "| class"))]
    assert len(answers) > 25
    assert [row for row in answers if "`test_" not in row] == []


def test_settings_that_the_table_of_systems_names_exist() -> None:
    text = (TESTS.parent / "docs" / "routing-systems.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--[a-z][a-z-]+", text.replace("| --- ", "")))
    assert len(named) > 10
    parser = build_parser()
    help_texts = [
        command.format_help()
        for action in parser._subparsers._group_actions  # type: ignore[union-attr]
        for command in action.choices.values()  # type: ignore[union-attr]
    ]
    known = set(re.findall(r"--[a-z][a-z-]+", " ".join(help_texts)))
    assert named <= known, f"named but missing: {sorted(named - known)}"
