"""What nvcc makes of the CUDA sources: no warning, no spill, no local memory, PTX for later ones;
and that the module loads and reports where there is no driver. Needs no GPU.

Where there is an nvcc, the variants of the streaming kernel that are shortest of registers are
compiled here. All are read from the module, where it has CUDA and there is a cuobjdump.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread

# What nvcc is given: means of two rows, the most a thread has to hold.
VARIANTS = """
#include "stream_kernel.h"
namespace softcl::cuda {
template __global__ void stream_kernel<Float16, 128, Pairing::kPaired, 2>(const StreamParams);
template __global__ void stream_kernel<Float16, 128, Pairing::kSingle, 2>(const StreamParams);
template __global__ void stream_kernel<Float16, 256, Pairing::kPaired, 1>(const StreamParams);
template __global__ void stream_kernel<BFloat16, 256, Pairing::kPaired, 2>(const StreamParams);
template __global__ void stream_kernel<TwoParts, 128, Pairing::kPaired, 2>(const StreamParams);
static_assert(Shape<128, Pairing::kPaired, 2>::kThreads == 128, "");
static_assert(Shape<256, Pairing::kPaired, 2>::kThreads == 256, "");
}  // namespace softcl::cuda
"""


def find_tool(name: str) -> str:
    """A tool of the CUDA toolkit, or of those that Triton brings; skips where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which(name), *(f"{home}/bin/{name}" for home in homes if home)]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin" / name))
    tool = next((place for place in places if place and Path(place).exists()), None)
    if tool is None:
        pytest.skip(f"no {name}")
    return tool


def compile_variants(folder: Path, *options: str) -> str:
    """What nvcc has to say while it compiles VARIANTS to folder/variants.out; warnings fail."""
    source = folder / "variants.cu"
    source.write_text(VARIANTS)
    include = [f"-I{ROOT / path}" for path in ("csrc", "csrc/cuda", "csrc/include")]
    command = [find_tool("nvcc"), "-std=c++17", "-O3", "-DSOFTCL_WITH_CUDA", *include]
    command += ['-DSOFTCL_SOURCE_NAME="variants.cu"', "-Werror", "all-warnings", *options]
    command += ["-o", str(folder / "variants.out"), str(source)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90a"])
def test_tightest_variants_stay_in_registers(tmp_path, arch):
    said = compile_variants(tmp_path, "-cubin", f"-arch={arch}", "-Xptxas", "-v,-Werror")
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(stacks) == len(registers) == VARIANTS.count("template __global__")
    assert set(stacks) == {("0", "0", "0")}, said
    assert max(registers) <= MOST_REGISTERS


def test_ptx_is_for_every_later_device(tmp_path):
    compile_variants(tmp_path, "-ptx", "-arch=compute_80")
    ptx = (tmp_path / "variants.out").read_text()
    assert re.search(r"^\.target sm_80$", ptx, re.MULTILINE)
    for instruction in ("mma.sync.aligned.m16n8k16", "ldmatrix.sync", "cp.async.cg.shared.global"):
        assert instruction in ptx
    assert ".local" not in ptx


@pytest.mark.parametrize("stem", ["queue_statistics", "soft_contrastive"])
def test_what_is_launched_early_waits(tmp_path, stem):
    """Of all code that the build makes of a finishing kernel, that which launch.h launches early,
    by the version of its PTX, waits for the grid before it, and no other does."""
    launch = (ROOT / "csrc/cuda/launch.h").read_text()
    first = int(re.search(r"kFirstWaitingVersion = (\d+);", launch)[1])
    listed = (ROOT / "CMakeLists.txt").read_text()
    (architectures,) = re.findall(r'set\(CMAKE_CUDA_ARCHITECTURES "(.*)"\)', listed)
    options, built = [], set()
    for name in architectures.split(";"):
        number = name.removesuffix("-real")
        built |= {("elf", number)} | ({("ptx", number)} if number == name else set())
        codes = f"sm_{number}" if name != number else f"[sm_{number},compute_{number}]"
        options += ["-gencode", f"arch=compute_{number},code={codes}"]
    fatbin = tmp_path / "kernels.fatbin"
    command = [find_tool("nvcc"), "-std=c++17", "-O3", "-DSOFTCL_WITH_CUDA", "-fatbin", *options]
    command += [f"-I{ROOT / path}" for path in ("csrc", "csrc/cuda", "csrc/include")]
    command += [f'-DSOFTCL_SOURCE_NAME="{stem}"', "-o", str(fatbin)]
    command += [str(ROOT / f"csrc/cuda/{stem}.cu")]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert answer.returncode == 0, answer.stdout
    code = cuobjdump(str(fatbin), "-sass") + cuobjdump(str(fatbin), "-ptx")
    found = set()
    for part in code.split("Fatbin ")[1:]:
        kind, arch = part[:3], re.search(r"arch = sm_(\w+)", part)[1]
        if ".entry" not in part and "Function :" not in part:
            continue  # cuobjdump names the other kind too, without its code
        found.add((kind, arch))
        waits = "griddepcontrol.wait" in part or "ACQBULK" in part
        assert waits == (int(arch.rstrip("a")) >= first), (kind, arch)
        assert not re.search(r"\bI2F\.(U32\.)?RP\b", part)  # a division of integers
    assert found == built


# ---- The module ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module():
    module = pytest.importorskip("softcl._C", reason="softcl._C is not built")
    if not module.has_cuda():
        pytest.skip("softcl._C has no CUDA")
    return module


@functools.cache
def cuobjdump(path: str, option: str) -> str:
    command = [find_tool("cuobjdump"), option, path]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def resources(path: str) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack and local memory."""
    found, arch = {}, ""
    lines = cuobjdump(path, "--dump-resource-usage").splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "arch =" in line:
            arch = line.split("=")[1].strip()
        elif "Function" in line:
            kernel = line.split("Function")[1].strip(" :")
            usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", following)
            found[arch, kernel] = {name: int(value) for name, value in usage}
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_streaming_kernel_stays_in_registers(module, arch):
    usage = resources(module.__file__)
    streaming = {k: u for (a, k), u in usage.items() if a == arch and "13stream_kernel" in k}
    assert len(streaming) == 3 * 3 * 5  # widths, types, variants
    assert {k: u for k, u in streaming.items() if u["STACK"] or u["LOCAL"]} == {}
    # Two blocks of 128 threads, or one of 256, on a multiprocessor.
    assert max(u["REG"] for u in streaming.values()) <= min(MOST_REGISTERS, REGISTERS // 256)


def test_module_holds_ptx(module):
    listed = cuobjdump(module.__file__, "--list-ptx")
    for stem in ("stream_64", "stream_128", "stream_256", "soft_contrastive", "queue_statistics"):
        assert re.search(rf"{stem}.*sm_80\.ptx", listed), listed


def test_module_reports_where_there_is_no_device(module):
    """Without a driver, and with one that shows no device: it loads, and says why there is none."""
    script = """
from softcl import _C
assert _C.has_cuda() and _C.cuda_device_count() == 0
print(_C.cuda_no_device_reason())
"""
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
