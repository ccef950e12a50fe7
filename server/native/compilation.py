"""Compiles the native step at installation: all libraries at once, and none anew that nothing has changed.

setuptools loads this file alone (`pyproject.toml`, cmdclass), so it imports nothing of the project.
"""

import copy
import shutil
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = Path("server/native/src")
RECIPE = "pyproject.toml"
OTHER_COMPILERS = ("g++", "clang++", "c++")


class BuildLibraries(build_ext):  # type: ignore[misc]  # setuptools has no stubs
    """`build_ext` for libraries that are one source file under several sets of flags."""

    def finalize_options(self) -> None:
        """Every library depends on every header, and on the flags."""
        super().finalize_options()
        self.parallel = True
        for library in self.extensions or ():
            library.depends = [RECIPE, *sorted(str(path) for path in SOURCES.glob("*.h"))]

    def build_extensions(self) -> None:
        """With another compiler where the one that Python was built with is not installed."""
        for name in ("compiler_cxx", "compiler_so_cxx", "linker_so_cxx"):
            command = getattr(self.compiler, name, None)
            if command and shutil.which(command[0]) is None:
                found = next((other for other in OTHER_COMPILERS if shutil.which(other)), command[0])
                setattr(self.compiler, name, [found, *command[1:]])
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Compile one library, or take the source tree's, where an earlier editable installation has put it."""
        target, built = Path(self.get_ext_fullpath(ext.name)), Path(self.get_ext_filename(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(built), "newer"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        # The object files would have one name and be written at one time.
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        super(BuildLibraries, own).build_extension(ext)
