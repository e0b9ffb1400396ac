"""What nvcc makes of the Hopper kernel: registers, spills, and the instructions that matter."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
NUM_VARIANTS = {64: 15, 128: 15, 256: 10}  # five of rows and means, types; no parts for 256


def find_nvcc():
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def find_cuobjdump():
    """On PATH, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.exists() else None
    return found


def output_of(command):
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.mark.parametrize(
    "dim",
    [pytest.param(64, marks=pytest.mark.long), 128, pytest.param(256, marks=pytest.mark.long)],
)
def test_kernels_for_sm_90a(tmp_path, dim):
    """No spill, no local memory, no product that waits for the one before; copies by TMA, products
    by warpgroups, registers handed over."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path / "kernels.cubin"
    said = output_of(
        [nvcc, "-std=c++17", "-O3", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", f"-I{CSRC}"]
        + [f"-I{CSRC / 'include'}", '-DSOFTCL_SOURCE_NAME=""', "-o", str(cubin)]
        + [str(CSRC / f"cuda/stream_hopper_{dim}.cu")]
    )
    # C7510: products serialised; C7519: a fence that the compiler had to add.
    assert "warning" not in said and "serialized" not in said and "C75" not in said, said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * NUM_VARIANTS[dim], said
    # 65536 / 384, in units of eight: what the launch gives a thread, before they are shared anew.
    assert re.findall(r"Used (\d+) registers", said) == ["168"] * NUM_VARIANTS[dim]
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: instructions not looked at")
    functions = output_of([cuobjdump, "-sass", str(cubin)]).split("Function : ")[1:]
    assert len(functions) == NUM_VARIANTS[dim]
    for code in functions:
        assert "UTMALDG.2D" in code and code.count("USETMAXREG") == 2
        assert not re.search(r"\b(LDL|STL)\b", code)
        # A division of integers, in every tile: chunks are found by shifts.
        assert not re.search(r"\bI2F\.(U32\.)?RP\b", code)
        products = len(re.findall(r"\bHGMMA\.64x\d+x16\.F32", code))
        in_parts = "TwoParts" in code.split("\n")[0]
        assert products >= dim // 16 * (3 if in_parts else 1), products
        assert not re.search(r"\bHMMA\b", code)
