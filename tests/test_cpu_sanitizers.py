"""The CPU backend under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and ten
thousand calls that must not grow.

A C++ driver without Python (tests/native/cpu_driver.cpp) is compiled together with csrc/cpu; its
threads are std::thread, for ThreadSanitizer does not understand libgomp.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vnni", "-mfma"),
}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="flags are for x86-64"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def build(folder: Path, sanitizer: str, with_x86: bool) -> Path:
    """The driver, instrumented; without x86's own instructions there is less to compile."""
    common = [
        *(COMPILER, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}"),
        *("-fno-sanitize-recover=all", "-DSOFTCL_STD_THREADS"),
        *(f"-I{ROOT / 'csrc' / folder}" for folder in ("", "cpu", "include")),
    ]
    if with_x86:
        common.append("-DSOFTCL_X86")
    objects = []
    for source in (*sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")), DRIVER):
        isa = FLAGS.get(source.stem.rpartition("_")[2], ())
        if isa and not with_x86:
            continue
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*common, *isa, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([*common, *objects, "-o", folder / "driver", "-pthread"], check=True)
    return folder / "driver"


DRIVER = ROOT / "tests" / "native" / "cpu_driver.cpp"


@pytest.mark.long
@pytest.mark.timeout(900)  # compiling takes minutes where other tests run beside it
@pytest.mark.parametrize(
    ("sanitizer", "with_x86"),
    [
        pytest.param("address,undefined", False, id="memory-portable"),
        pytest.param("address,undefined", True, id="memory"),
        pytest.param("thread", True, id="threads"),
    ],
)
def test_sanitizers_find_nothing(sanitizer, with_x86, tmp_path):
    driver = build(tmp_path, sanitizer, with_x86)
    _C = pytest.importorskip("softcl._C", reason="softcl._C is not built")
    for isa in _C.available_isas() if with_x86 else ["portable"]:
        done = subprocess.run(
            [driver],
            env={**os.environ, "SOFTCL_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{isa}: {done.stdout}{done.stderr}"
        assert done.stdout == "clean\n"


GROWTH = """
import resource
import sys
import torch
sys.path.insert(0, "tests")
from loss_calls import run_loss, run_statistics
from softcl import AdaptiveSoftLabels
from softcl.nn import MemoryQueue
from softcl.ops import cpu
from softcl.testing import make_problem
torch.set_num_threads(2)
p = make_problem(33, 300, 64)
queue = MemoryQueue(100, 64)

def calls(count):
    for _ in range(count):
        run_loss(cpu, p, AdaptiveSoftLabels(3), normalize=True)
        run_statistics(cpu, p.query, p.queue, 0.1, 5)
        run_statistics(cpu, p.query, p.queue, 0.1, 1, sums=False)
        queue.enqueue(p.key)

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()

calls(500)
before = resident()
calls(10_000)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_ten_thousand_calls_do_not_grow():
    pytest.importorskip("softcl._C", reason="softcl._C is not built")
    asleep = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # on a busy machine ten times as fast
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], cwd=ROOT, env=asleep, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A leak of 32 bytes a call would be more.
    assert int(done.stdout) < 1_000_000
