"""The check for GPUs (bench/gpu_check.sh), tried on the CPU: its own code works, and fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run(out, *flags, **environment):
    return subprocess.run(
        ["bash", "bench/gpu_check.sh", *flags],
        cwd=ROOT,
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_dry_run(tmp_path):
    answer = run(tmp_path, "--dry-run")
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    assert "all steps passed" in answer.stdout
    (table,) = tmp_path.glob("*.json")
    result = json.loads(table.read_text())
    assert [row["kind"] for row in result["rows"]] == ["top-k", "dense", "hard", "search"]
    for row in result["rows"]:
        peers = {"matmul + topk"} if row["kind"] == "search" else {"eager", "chunked", "attention"}
        times = set(row["times"]) - {"lightly", "linear-ce"}  # for hard labels, where they are
        assert times == {"triton", "triton, L2 hot"} | peers
        assert row["kind"] == "hard" or times == set(row["times"])
        assert all(value > 0 for value in row["times"].values())
    text = table.with_suffix(".md").read_text()
    assert text.count("\n| 3, 70, 16 |") == 4 and "left out" not in text


@pytest.mark.long
def test_a_step_that_fails_is_named(tmp_path):
    """A backend that gives wrong losses: the table says so in its place, and the command fails."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import softcl.testing\n"
        "right = softcl.testing.loss_oracle\n"
        "def wrong(*args, **kwargs):\n"
        "    loss, *rest = right(*args, **kwargs)\n"
        "    return loss + 1e-3, *rest\n"
        "softcl.testing.loss_oracle = wrong\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    answer = run(tmp_path, "--dry-run", PYTHONPATH=paths)
    assert answer.returncode == 1
    assert "failed: table triton" in answer.stdout and "loss is off" in answer.stderr
    (table,) = tmp_path.glob("*.json")
    for row in json.loads(table.read_text())["rows"]:
        times = row["times"]
        assert row["wrong"] == (row["kind"] != "search")
        assert isinstance(times["triton"], str) == row["wrong"]
        assert all(value > 0 for name, value in times.items() if name in ("eager", "chunked"))
    assert "wrong: loss is off" in table.with_suffix(".md").read_text()


@pytest.mark.long
def test_tuning(tmp_path):
    """The tuner's rows are rows of the table."""
    code = [sys.executable, "bench/tune_triton.py", "--dry-run", "--kinds", "dense", "search"]
    answer = subprocess.run(
        [*code, "--precisions", "bf16", "--widths", "64", "128"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    from softcl.kernels import tiles

    rows = tiles.parse(answer.stdout)
    assert set(rows) == {("dense", "bf16"), ("search", "bf16")}
    assert all(len(row) == 2 for row in rows.values())
    assert "the table's 32x64/4/1/1 takes" in answer.stderr
