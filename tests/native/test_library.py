"""Which compiled library is taken, and that there is one where there can be."""

import shutil

from server.native.library import VARIANTS, cpu_features, libraries, num_cores


def test_every_library_was_built_that_this_cpu_can_run() -> None:
    """The installation goes on when compiling one fails: that must show here, not as a page of skipped tests."""
    if shutil.which("c++"):
        assert len(libraries()) == sum(needed <= cpu_features() for _, needed in VARIANTS)


def test_cores_are_counted_once() -> None:
    assert 1 <= num_cores() <= 1024
