"""Builds what runs the CUDA kernels on the CPU (csrc/cuda/host), once: a module and a program.

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
CSRC = ROOT / "csrc"
SOURCES = (
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
    "cuda/host/products.cpp",
    "cuda/host/runtime.cpp",
    "cuda/host/warpgroup.cpp",
)
MODULE_SOURCES = ("bindings_cuda.cpp", "cuda/host/module.cpp")
PROGRAM_SOURCES = ("cuda/check/ceiling.cu", "cuda/check/main.cu", "cuda/check/reference.cpp")
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
    """csrc/cuda/check's program; skips the test where there is no compiler for it."""
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
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cu", ".cpp"))
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
    include = [CSRC / "cuda/host", CSRC, CSRC / "cuda", CSRC / "include", pybind11.get_include()]
    include += [sysconfig.get_path("include")]
    objects_of = {}
    for source in (*SOURCES, *MODULE_SOURCES, *PROGRAM_SOURCES):
        objects_of[source] = str(objects / (source.replace("/", "_") + ".o"))
        command = [compiler, *FLAGS, *(f"-I{path}" for path in include)]
        command += [f'-DSOFTCL_SOURCE_NAME="csrc/{source}"', "-x", "c++", "-c", str(CSRC / source)]
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
