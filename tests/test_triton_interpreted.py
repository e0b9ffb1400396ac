"""The tests of the Triton backend in Triton's interpreter, on the CPU, in a process of their own.

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


@pytest.mark.timeout(1800)  # of all files, each of whose tests keeps its own limit
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs in the interpreter")
def test_in_interpreter(tmp_path, request):
    files = [str(HERE / file) for file in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tmp_path / 'own'}", *files]
    if request.config.getoption("--long"):
        command += ["--long", "-k", "triton", str(HERE / "test_ops_rules.py")]
    else:  # every test, and of its cases a third
        command += ["--every", "3"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    assert " passed" in answer.stdout and " failed" not in answer.stdout
