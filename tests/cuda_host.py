"""Builds and loads the module that runs the CUDA kernels on the CPU (csrc/cuda/host), once.

Not a test file. The module is kept in build/, under a name made from its sources.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = (
    "bindings_cuda.cpp",
    "cuda/enqueue.cu",
    "cuda/plan.cpp",
    "cuda/queue_statistics.cu",
    "cuda/soft_contrastive.cu",
    "cuda/stream.cu",
    "cuda/stream_64.cu",
    "cuda/stream_128.cu",
    "cuda/stream_256.cu",
    "cuda/stream_hopper.cu",
    "cuda/stream_hopper_64.cu",
    "cuda/stream_hopper_128.cu",
    "cuda/stream_hopper_256.cu",
    "cuda/host/block.cpp",
    "cuda/host/module.cpp",
    "cuda/host/products.cpp",
    "cuda/host/warpgroup.cpp",
)
FLAGS = ("-std=c++17", "-DSOFTCL_WITH_CUDA", "-O2", "-fPIC", "-w", "-fno-strict-aliasing")


def load_host_module() -> ModuleType:
    """The module; skips the test where there is no compiler for it."""
    module = _load()
    if isinstance(module, str):
        pytest.skip(module)
    return module


@functools.cache
def _load() -> ModuleType | str:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++"))), None)
    if compiler is None:
        return "no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    path = build(compiler)
    spec = importlib.util.spec_from_file_location("softcl_cuda_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(compiler: str) -> Path:
    """The compiled module, from build/ or made now. Fails with the compiler's words."""
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cu", ".cpp"))
    key = hashlib.sha256(" ".join((compiler, suffix, pybind11.__version__, *FLAGS)).encode())
    for file in files:
        if "cpu" not in file.parts:
            key.update(file.read_bytes())
    folder = ROOT / "build" / "cuda-host"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / key.hexdigest()[:16] / f"softcl_cuda_host{suffix}"
    if module.exists():
        return module
    objects = folder / f"objects.{os.getpid()}"
    objects.mkdir()
    include = [CSRC / "cuda/host", CSRC, CSRC / "cuda", CSRC / "include", pybind11.get_include()]
    include += [sysconfig.get_path("include")]
    for source in SOURCES:
        command = [compiler, *FLAGS, *(f"-I{path}" for path in include)]
        command += [f'-DSOFTCL_SOURCE_NAME="csrc/{source}"', "-x", "c++", "-c", str(CSRC / source)]
        command += ["-o", str(objects / (Path(source).name + ".o"))]
        _run(command)
    built = objects / module.name
    _run([compiler, "-shared", "-o", str(built), *map(str, sorted(objects.glob("*.o")))])
    for old in folder.glob("*/softcl_cuda_host*"):
        if old.parent != objects:
            shutil.rmtree(old.parent, ignore_errors=True)
    module.parent.mkdir()
    os.replace(built, module)
    shutil.rmtree(objects)
    return module


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert answer.returncode == 0, answer.stdout
