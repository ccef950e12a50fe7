"""Runs commands in the test process without a trace: no keys from outside, log levels as before."""

import contextlib
import logging
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def isolated_cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the environment's keys; put the levels back that `configure_logging` changes."""
    monkeypatch.delenv("LORA_MIXER_API_KEYS", raising=False)
    monkeypatch.delenv("LORA_MIXER_ADMIN_KEY", raising=False)
    loggers = [logging.getLogger(name) for name in ("", "server", "uvicorn")]
    before = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
