"""Builds what runs the CUDA kernels on the CPU (tests/native/cuda), once: a module and a program.

Not a test file. Both are kept in build/, in a folder named after their sources.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "csrc/cuda/enqueue.cu",
    "csrc/cuda/plan.cpp",
    "csrc/cuda/queue_statistics.cu",
    "csrc/cuda/soft_contrastive.cu",
    "csrc/cuda/stream.cu",
    "csrc/cuda/stream_64.cu",
    "csrc/cuda/stream_128.cu",
    "csrc/cuda/stream_256.cu",
    "csrc/cuda/stream_hopper.cu",
    "csrc/cuda/stream_hopper_64.cu",
    "csrc/cuda/stream_hopper_128.cu",
    "csrc/cuda/stream_hopper_256.cu",
    "tests/native/cuda/block.cpp",
    "tests/native/cuda/products.cpp",
    "tests/native/cuda/runtime.cpp",
    "tests/native/cuda/warpgroup.cpp",
)
MODULE_SOURCES = ("csrc/bindings_cuda.cpp", "tests/native/cuda/module.cpp")
PROGRAM_SOURCES = (
    "bench/native/check/ceiling.cu",
    "bench/native/check/main.cu",
    "bench/native/check/reference.cpp",
)
INCLUDE = ("tests/native/cuda", "csrc", "csrc/cuda", "csrc/include", "bench/native")
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", "-DSOFTCL_WITH_CUDA", "-O2", "-fPIC", "-w", "-fno-strict-aliasing"]
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    FLAGS.append("-mavx2")  # eight columns of a product at once; without -mfma the same bits


def load_host_module() -> ModuleType:
    """The module; skips the test where there is no compiler for it."""
    module = _load()
    if isinstance(module, str):
        pytest.skip(module)
    return module


def find_check_program() -> Path:
    """bench/native/check's program; skips the test where there is no compiler for it."""
    module = load_host_module()
    return Path(module.__file__).with_name("softcl_cuda_check")


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
    folders = (ROOT / name for name in ("csrc", "tests/native/cuda", "bench/native/check"))
    files = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix in (".h", ".cu", ".cpp")]
    key = hashlib.sha256(" ".join((compiler, suffix, pybind11.__version__, *FLAGS)).encode())
    for file in files:
        if "cpu" not in file.parts:
            key.update(file.read_bytes())
    folder = ROOT / "build" / "cuda-host"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / key.hexdigest()[:16] / f"softcl_cuda_host{suffix}"
    with alone_in(folder):
        if not module.exists():
            compile_all(compiler, folder, module)
    return module


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Other processes of the same test run wait for what this one builds."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_all(compiler: str, folder: Path, module: Path) -> None:
    import pybind11

    objects = folder / "objects"
    shutil.rmtree(objects, ignore_errors=True)  # of one that was stopped
    objects.mkdir()
    include = [*(ROOT / path for path in INCLUDE), pybind11.get_include()]
    include += [sysconfig.get_path("include")]
    objects_of = {}
    for source in (*SOURCES, *MODULE_SOURCES, *PROGRAM_SOURCES):
        objects_of[source] = str(objects / (source.replace("/", "_") + ".o"))
        command = [compiler, *FLAGS, *(f"-I{path}" for path in include)]
        command += [f'-DSOFTCL_SOURCE_NAME="{source}"', "-x", "c++", "-c", str(ROOT / source)]
        _run([*command, "-o", objects_of[source]])
    finished = objects / "finished"
    finished.mkdir()
    for name, own, options in (
        (module.name, MODULE_SOURCES, ["-shared"]),
        ("softcl_cuda_check", PROGRAM_SOURCES, []),
    ):
        linked = [objects_of[source] for source in (*SOURCES, *own)]
        _run([compiler, *options, "-o", str(finished / name), *linked])
    for old in folder.glob("*/softcl_cuda_host*"):
        if objects not in old.parents:
            shutil.rmtree(old.parent, ignore_errors=True)
    os.replace(finished, module.parent)
    shutil.rmtree(objects)


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert answer.returncode == 0, answer.stdout
