"""Packaging of softcl, and the build of its native module ``softcl._C`` (CMake, ninja, pybind11).

    python setup.py build_ext --inplace        for work in a checkout: softcl/_C.<suffix>
    pip install .                              a wheel; pure Python where no compiler is found
    pip install --no-build-isolation .         the same with the tools of this environment

Everything else about the project is in pyproject.toml; sources and flags are in CMakeLists.txt.

An install never fails for want of the native module: without it the pure-Python backends remain,
and one line says what is missing. ``build_ext`` asked for by name does fail, with status 1.

Environment:
    SOFTCL_BUILD    0: do not build the native module. 1: fail where it cannot be built.
    SOFTCL_CUDA     0: leave the CUDA sources out. 1: fail where they cannot be compiled.
                    Unset: compile them where nvcc 12.0 or newer works.
    CXX, CXXFLAGS, CUDACXX, CUDA_HOME, CMAKE_BUILD_PARALLEL_LEVEL as usual.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except (
    ModuleNotFoundError
):  # an old one, as a new virtual environment of Python 3.10 or 3.11 has it
    sys.exit(
        f"softcl: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'"
    )

ROOT = Path(__file__).resolve().parent
MINIMUM_CMAKE = (3, 24)

# What a configured build folder depends on: another value is another compiler or other flags.
BUILD_ENVIRONMENT = ("CC", "CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")


class NativeBuildError(Exception):
    """Why there is no native module, in one line."""


def switch(name: str) -> bool | None:
    """The environment variable ``name`` as off, on or unset."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("0", "off", "false", "no", "1", "on", "true", "yes"):
        return value in ("1", "on", "true", "yes")
    sys.exit(f"softcl: {name} must be 0 or 1, got {os.environ[name]!r}")


def say(line: str) -> None:
    print(f"softcl: {line}", flush=True)


# ---- Tools -------------------------------------------------------------------------------------


def tool_version(path: str) -> tuple[int, ...] | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"(\d+)\.(\d+)", answer.stdout)
    return tuple(map(int, found.groups())) if answer.returncode == 0 and found else None


def find_tool(name: str, minimum: tuple[int, ...] = (0,)) -> str | None:
    """``name`` beside this interpreter, in its virtual environment, or else on PATH."""
    for folder in (sysconfig.get_path("scripts"), None):
        path = shutil.which(name, path=folder)
        if path is not None and (tool_version(path) or (-1,)) >= minimum:
            return path
    return None


def find_compiler() -> str | None:
    if "CXX" in os.environ:
        return shutil.which(os.environ["CXX"].split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next(filter(None, (shutil.which(c) for c in candidates if c)), None)


def find_tools() -> tuple[str, str, str]:
    """Paths of cmake, ninja and pybind11's CMake files, or one line with all that is missing."""
    cmake = find_tool("cmake", MINIMUM_CMAKE)
    ninja = find_tool("ninja")
    has_pybind11 = importlib.util.find_spec("pybind11") is not None
    missing = []
    if os.name == "posix" and find_compiler() is None:
        missing.append("a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python.h (Python's development files)")
    if cmake is None:
        missing.append("cmake >= " + ".".join(map(str, MINIMUM_CMAKE)))
    if ninja is None:
        missing.append("ninja")
    if not has_pybind11:
        missing.append("pybind11")
    if missing:
        raise NativeBuildError("missing: " + ", ".join(missing))
    import pybind11

    return cmake, ninja, pybind11.get_cmake_dir()


# ---- CMake -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in ``folder``; a second caller waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: no lock
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def configure(folder: Path, suffix: str) -> str:
    """Run CMake if ``folder`` is not configured just so; return the path of cmake."""
    cmake, ninja, pybind11_dir = find_tools()
    cuda = {None: "AUTO", False: "OFF", True: "ON"}[switch("SOFTCL_CUDA")]
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    command += [
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-Dpybind11_DIR={pybind11_dir}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSOFTCL_MODULE_SUFFIX={suffix}",
        f"-DSOFTCL_CUDA={cuda}",
    ]
    environment = {name: os.environ.get(name) for name in BUILD_ENVIRONMENT}
    environment["CUDACXX"] = None if cuda == "OFF" else find_nvcc()
    wanted = json.dumps([command, environment], indent=1)
    record = folder / "softcl-configure.json"
    if record.exists() and record.read_text() == wanted:
        return cmake  # ninja itself runs CMake again where CMakeLists.txt has changed
    shutil.rmtree(folder, ignore_errors=True)
    variables = {name: value for name, value in environment.items() if value is not None}
    answer = subprocess.run(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if answer.returncode != 0:
        print(answer.stdout)
        raise NativeBuildError("CMake could not configure it, its messages are above")
    record.write_text(wanted)
    return cmake


def build_native(folder: Path, suffix: str) -> Path:
    """Bring ``folder/softcl/_C<suffix>`` up to date. Raises NativeBuildError."""
    if not (ROOT / "csrc").is_dir():
        raise NativeBuildError("missing: the folder csrc")
    with locked(folder):
        cmake = configure(folder, suffix)
        if subprocess.run([cmake, "--build", str(folder)]).returncode != 0:
            raise NativeBuildError("a source does not compile, the messages are above")
    module = folder / "softcl" / f"_C{suffix}"
    if not module.exists():
        raise NativeBuildError(f"the build left no {module.name}")
    return module


def replace_file(source: Path, target: Path) -> None:
    """Copy by rename: a process that has the old module loaded keeps it whole."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


# ---- Commands ----------------------------------------------------------------------------------


class BuildExt(build_ext):
    """Builds softcl._C through CMake; ``built`` tells whether there is one."""

    built = False

    def finalize_options(self) -> None:
        super().finalize_options()
        # Builds for a wheel may see other tools (an isolated build does): they get a folder of
        # their own, so that the checkout's stays incremental.
        purpose = "inplace" if self.inplace else "wheel"
        tag = f"{self.plat_name}-{sys.implementation.cache_tag}-{purpose}"
        self.folder = ROOT / "build" / f"cmake.{tag}"

    def run(self) -> None:
        if switch("SOFTCL_BUILD") is False:
            say("native module not built (SOFTCL_BUILD=0)")
        super().run()

    def build_extensions(self) -> None:
        if self.built:  # by bdist_wheel, which is asked for it once more while packing
            return
        by_name = "build_ext" in self.distribution.commands
        required = by_name if switch("SOFTCL_BUILD") is None else switch("SOFTCL_BUILD")
        file_name = self.get_ext_filename("softcl._C")
        suffix = Path(file_name).name.removeprefix("_C")
        try:
            module = build_native(self.folder, suffix)
        except NativeBuildError as error:
            say(f"native module not built ({error})")
            if required:
                sys.exit(1)
            say("the pure-Python backends work without it")
            return
        replace_file(module, Path(self.build_lib, file_name))
        self.built = True
        say(f"built {module.name} {(self.folder / 'softcl-summary.txt').read_text().strip()}")

    def copy_extensions_to_source(self) -> None:
        if self.built:
            file_name = self.get_ext_filename("softcl._C")
            replace_file(Path(self.build_lib, file_name), ROOT / file_name)

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if self.built else []

    def get_output_mapping(self) -> dict[str, str]:
        return super().get_output_mapping() if self.built else {}


class BuildPy(build_py):
    """Leaves softcl/kernels.py out: it stands for a folder that an installed package has."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if self.editable_mode or m[:2] != ("softcl", "kernels")]


class BdistWheel(bdist_wheel):
    """Builds the module first, for the wheel's name depends on it: py3-none-any without."""

    def run(self) -> None:
        # setuptools packs whatever lies there, an older build's modules too.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")
            if not self.get_finalized_command("build_ext").built:
                self.distribution.ext_modules = []
                self.root_is_pure = True
        super().run()


setup(
    packages=[
        *find_packages(include=["softcl", "softcl.*"]),
        "softcl.kernels",
        *(f"softcl.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"softcl.kernels": "kernels"},
    include_package_data=False,
    package_data={"softcl": ["py.typed"]},
    ext_modules=[] if switch("SOFTCL_BUILD") is False else [Extension("softcl._C", sources=[])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel},
)
