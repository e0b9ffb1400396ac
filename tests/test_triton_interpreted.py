"""The tests of the Triton backend in Triton's interpreter, on the CPU, in processes of their own.

Triton decides at its import whether kernels are interpreted, so this process stays as it is. The
same files run on a GPU where there is one: `pytest tests -k triton`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
FILES = sorted(
    path.name for path in HERE.glob("test_triton_*.py") if "triton_device" in path.read_text()
)


@pytest.mark.timeout(900)  # a whole file, each of whose tests keeps its own limit
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs in the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_in_interpreter(file, tmp_path, request):
    if file == Path(__file__).name:
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'own'}",
        str(HERE / file),
    ]
    # Every test, and of its cases a third: all of them run with --long, and on a GPU.
    command += ["--long"] if request.config.getoption("--long") else ["--every", "3"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    assert " passed" in answer.stdout and " failed" not in answer.stdout
