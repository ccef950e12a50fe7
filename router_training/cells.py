"""Results of single measurements, kept by content, so that a study can be cut anywhere and repeats nothing."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class CellCache:
    """A folder of JSON files, one per measurement, named by the sha256 of everything that decides its result."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` None keeps nothing."""
        self._folder = folder

    def get(self, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The result for `facts`: read if it has been measured before, else computed and written atomically."""
        if self._folder is None:
            return compute()
        content = json.dumps(facts, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # Damaged is as good as absent.
            return json.loads(path.read_text(encoding="utf-8"))["result"]
        result = compute()
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"facts": facts, "result": result}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        # As it would be read back, so that a first and a second run see the same values.
        return json.loads(json.dumps(result))
