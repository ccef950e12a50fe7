"""How the libraries are built at installation, on a small project of the same form."""

import ctypes
import os
import shutil
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution, Extension

from server.native.compilation import RECIPE, SOURCES, BuildLibraries
from server.native.library import VARIANTS

SOURCE = '#include "number.h"\nextern "C" int number() { return NUMBER + OFFSET; }\n'

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def build(names: dict[str, int], *, is_optional: bool = False) -> None:
    """One library per name in the current folder, `number` of which is that of the header plus the given one."""
    extensions = [
        Extension(
            name,
            [str(SOURCES / "all.cpp")],
            language="c++",
            optional=is_optional,
            extra_compile_args=[f"-DOFFSET={offset}"],
        )
        for name, offset in names.items()
    ]
    command = BuildLibraries(Distribution({"name": "x", "ext_modules": extensions}))
    command.inplace = True
    command.ensure_finalized()
    command.run()


def library(name: str) -> Path:
    return next(Path().glob(f"{name}.*.so"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a source file and a header."""
    monkeypatch.chdir(tmp_path)
    SOURCES.mkdir(parents=True)
    (SOURCES / "all.cpp").write_text(SOURCE, encoding="utf-8")
    (SOURCES / "number.h").write_text("#define NUMBER 40\n", encoding="utf-8")
    Path(RECIPE).touch()
    return tmp_path


@needs_compiler
@pytest.mark.usefixtures("project")
def test_another_compiler_steps_in_for_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python names the compiler that it was built with, which need not be on this machine."""
    real = shutil.which("c++")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "clang++").write_text(f'#!/bin/sh\nexec {real} "$@"\n', encoding="utf-8")
    (tmp_path / "bin" / "clang++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("server.native.compilation.OTHER_COMPILERS", ("nothing++", "clang++"))
    monkeypatch.setenv("CXX", "gone++")
    build({"part": 2})
    assert ctypes.CDLL(str(library("part").absolute())).number() == 42


@needs_compiler
@pytest.mark.usefixtures("project")
def test_libraries_of_one_source_are_built_at_once_and_each_with_its_flags() -> None:
    names = {f"part{offset}": offset for offset in range(4)}
    build(names)
    assert {name: ctypes.CDLL(str(library(name).absolute())).number() for name in names} == {
        name: 40 + offset for name, offset in names.items()
    }
    # At once is safe only where no two write one object file.
    assert len(list(Path("build").rglob("all.o"))) == len(names)


@needs_compiler
@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("changed", [str(SOURCES / "all.cpp"), str(SOURCES / "number.h"), RECIPE])
def test_only_what_has_changed_is_built_again(changed: str) -> None:
    build({"part": 1})
    for path in (SOURCES / "all.cpp", SOURCES / "number.h", Path(RECIPE)):
        os.utime(path, (1, 1))
    mark = b"what an earlier installation left"
    library("part").write_bytes(mark)
    build({"part": 1})
    assert library("part").read_bytes() == mark
    later = library("part").stat().st_mtime + 2
    os.utime(changed, (later, later))
    build({"part": 1})
    assert library("part").read_bytes() != mark


@needs_compiler
@pytest.mark.usefixtures("project")
def test_a_library_that_cannot_be_built_does_not_keep_the_others() -> None:
    (SOURCES / "all.cpp").write_text(f"{SOURCE}static_assert(OFFSET != 2);\n", encoding="utf-8")
    build({"part1": 1, "part2": 2, "part3": 3}, is_optional=True)
    assert sorted(path.name.partition(".")[0] for path in Path().glob("*.so")) == ["part1", "part3"]


def test_the_project_builds_every_library_that_the_server_looks_for() -> None:
    tools = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    assert [module["name"] for module in tools["ext-modules"]] == [f"server.native.{name}" for name, _ in VARIANTS]
    assert all(module["optional"] for module in tools["ext-modules"])
    assert tools["cmdclass"]["build_ext"] == f"{BuildLibraries.__module__}.{BuildLibraries.__name__}"
