"""Limits of containers, read from made-up control groups of both versions."""

from pathlib import Path

import pytest

from server import machine
from server.control_groups import Limits, limits

OLD = "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
UNLIMITED = "9223372036854771712"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, Limits(None, None)),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, Limits(None, None)),
        ("0::/\n", {"cpu.max": "150000 100000", "memory.max": "2147483648"}, Limits(1.5, 2 << 30)),
        # The tightest counts, wherever on the way it stands; groups beside it do not.
        (
            "0::/pods/one/main\n",
            {"pods/cpu.max": "50000 100000", "pods/one/main/cpu.max": "400000 100000", "pods/two/cpu.max": "1 100000",
             "pods/memory.max": "4096", "pods/one/memory.max": "1024", "pods/one/main/memory.max": "max"},
            Limits(0.5, 1024),
        ),
        # The path is the host's, while the container sees its own group as the root.
        (
            OLD,
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000",
             "memory/memory.limit_in_bytes": "1048576"},
            Limits(2.0, 1 << 20),
        ),
        (
            OLD,
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
             "memory/docker/abc/memory.limit_in_bytes": "4096", "memory/memory.limit_in_bytes": UNLIMITED},
            Limits(None, 4096),
        ),
        # Both versions at once: the new one's groups have a folder of their own.
        ("1:cpu:/\n0::/a\n", {"unified/a/cpu.max": "100000 100000", "cpu/cpu.cfs_quota_us": "-1"}, Limits(1.0, None)),
    ],
)  # fmt: skip
def test_the_tightest_limit_on_the_way_counts(
    tmp_path: Path, groups: str, files: dict[str, str], expected: Limits
) -> None:
    for name, content in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "groups").write_text(groups)
    assert limits(tmp_path / "groups", tmp_path / "mount") == expected


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert limits(tmp_path / "groups", tmp_path / "mount") == Limits(None, None)


@pytest.mark.parametrize(("cpus", "threads"), [(None, 8), (0.5, 1), (1.9, 1), (2.0, 2), (64.0, 8)])
def test_threads_are_no_more_than_a_quota_lets_run_at_once(
    monkeypatch: pytest.MonkeyPatch, cpus: float | None, threads: int
) -> None:
    monkeypatch.setattr(machine, "limits", lambda: Limits(cpus, None))
    assert machine.within_quota(8) == threads


def test_memory_is_the_containers_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "limits", lambda: Limits(None, None))
    whole = machine.memory_bytes()
    assert whole is not None
    for limit, expected in ((4096, 4096), (int(UNLIMITED), whole)):
        monkeypatch.setattr(machine, "limits", lambda limit=limit: Limits(None, limit))
        assert machine.memory_bytes() == expected
