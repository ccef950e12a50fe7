"""Progress of long work: a bar on a terminal, plain log lines elsewhere."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm


def on_terminal() -> bool:
    """Whether bars can be drawn."""
    return sys.stderr.isatty()


class Stages:
    """`with Stages("title", 3, logger) as stages: stages.next("reading")` announces each stage as it begins."""

    def __init__(self, title: str, num_stages: int, logger: logging.Logger) -> None:
        self._title = title
        self._num_stages = num_stages
        self._logger = logger
        self._begun = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        if on_terminal():
            self._bar = tqdm(total=self._num_stages, desc=self._title, unit="stage")
        return self

    def next(self, what: str) -> None:
        """End the stage before, if any, and begin this one."""
        self._begun += 1
        if self._bar is None:
            self._logger.info("%s: %s (%d of %d)", self._title, what, self._begun, self._num_stages)
            return
        self._bar.set_postfix_str(what)
        if self._begun > 1:
            self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update()
            self._bar.close()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn transformers' own bars off: they would be drawn on every start, on terminals and in log files alike."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
