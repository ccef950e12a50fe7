"""What is a local folder, what is a Hub id, and what is neither."""

from pathlib import Path
from typing import Any

import pytest

from server.adapters.sources import local_folder
from server.config import AdapterSpec
from server.errors import InvalidRequestError


def spec(source: str, **fields: Any) -> AdapterSpec:
    return AdapterSpec(name="a", source=source, **fields)


def test_an_existing_folder_is_local_even_when_it_looks_like_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_folder(spec("org/name"), tmp_path) == tmp_path / "org" / "name"
    assert local_folder(spec("org/other"), tmp_path) is None


@pytest.mark.parametrize("source", ["./org", "a/b/c", "../x", "/abs/olute", "folder", "org/"])
def test_whatever_cannot_be_a_hub_id_is_a_folder(source: str, tmp_path: Path) -> None:
    assert local_folder(spec(source), tmp_path) == (tmp_path / source).resolve()


def test_links_are_resolved_so_that_callers_can_judge_the_real_place(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    assert local_folder(spec("link"), tmp_path / "root") == tmp_path / "outside"


def test_subfolders_stay_inside_the_source(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "out").symlink_to(tmp_path)
    assert local_folder(spec("a", subfolder="b"), tmp_path) == tmp_path / "a" / "b"
    for subfolder in ("..", "/etc", "out"):
        with pytest.raises(InvalidRequestError, match=r"inside the source|leads out"):
            local_folder(spec("a", subfolder=subfolder), tmp_path)


def test_a_revision_of_a_folder_and_an_empty_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="revision is for Hub sources"):
        local_folder(spec("./a", revision="main"), tmp_path)
    for source in ("", "a\0b"):
        with pytest.raises(InvalidRequestError, match="not a path or Hub id"):
            local_folder(spec(source), tmp_path)


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-of-that-name/adapter", "./loop/inner"])
def test_paths_that_the_system_refuses_are_refused_by_us(source: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidRequestError, match=r"adapter 'a': the source .* is not a usable path"):
        local_folder(spec(source), tmp_path)
