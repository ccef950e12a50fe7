"""Which compiled library is taken, and that there is one where there can be."""

import shutil

from server.native.library import VARIANTS, cpu_features, libraries, num_cores


def test_a_library_was_built_where_it_can_run() -> None:
    """The installation goes on when compiling fails: that must show here, not as a page of skipped tests."""
    if shutil.which("c++") and any(needed <= cpu_features() for _, needed in VARIANTS):
        assert libraries()


def test_cores_are_counted_once() -> None:
    assert 1 <= num_cores() <= 1024
