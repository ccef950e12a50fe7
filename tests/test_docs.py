"""Documents that name tests name existing ones."""

import re
from pathlib import Path

import pytest

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
