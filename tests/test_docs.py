"""Documents that name tests name existing ones."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_named_in_the_invariants_exists() -> None:
    text = (TESTS.parent / "docs" / "invariants.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    assert len(named) > 25
    source = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    existing = set(re.findall(r"def (test_\w+)\(", source))
    assert named <= existing, f"named but missing: {sorted(named - existing)}"
