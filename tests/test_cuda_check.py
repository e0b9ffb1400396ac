"""The check of the CUDA kernels by themselves (bench/native/check), run on the CPU."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from cuda_host import find_check_program


@pytest.fixture(scope="module")
def check():
    program = find_check_program()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(program), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return run


ONE_SHAPE = ("--rows", "9", "--queue", "200", "--dim", "40")


@pytest.mark.parametrize(
    ("arguments", "shapes"), [(ONE_SHAPE, 1), pytest.param((), 4, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_results_are_right(check, capability, arguments, shapes):
    answer = check(*arguments, SOFTCL_HOST_CAPABILITY=capability)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    lines = [line for line in answer.stdout.splitlines() if line.startswith("ok ")]
    assert len(lines) == shapes * 4 * 9  # types; rules and the statistics
    assert "all results are within their tolerances" in answer.stdout
    assert f"compute capability {capability[0]}.{capability[1]}" in answer.stdout


def test_wrong_results_are_told(check):
    """With tolerances that no result can keep: status 1, and which ones."""
    answer = check("--rows", "5", "--queue", "50", "--dim", "40", "--tolerance", "1e-6")
    assert answer.returncode == 1
    assert re.search(r"^FAILED N=5 K=50 D=40 bf16/bf16 hard .* loss \S+ !", answer.stdout, re.M)
    assert "some results are not within" in answer.stdout


@pytest.mark.parametrize(("capability", "instruction"), [("80", "mma.sync"), ("90", "wgmma")])
def test_times(check, capability, instruction):
    """FLOP as they are counted, and their share of the ceiling; three products for one in parts.

    The ceilings' loops count their own products before they are timed.
    """
    answer = check(
        *("--rows", "5", "--queue", "50", "--dim", "40", "--repeat", "1", "--time"),
        SOFTCL_HOST_CAPABILITY=capability,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = re.findall(r"^ceiling (\w+) (\S+) TFLOP/s: (\S+) alone", answer.stdout, re.M)
    assert {(name, kind) for name, _, kind in found} == {(t, instruction) for t in ("bf16", "fp16")}
    ceilings = {name: float(rate) for name, rate, _ in found}
    line = r"^time   N=5 K=50 D=40 (\S+)/(\S+) (\w+) +(\S+) us  (\S+) TFLOP/s  (\S+) % of the (\S+)"
    rows = re.findall(line, answer.stdout, re.M)
    assert len(rows) == 4 * 8  # types, rules
    products = {"hard": 4, "adaptive_neighbors": 6, "neighbors": 6}
    for row_type, queue_type, rule, time, rate, share, kind in rows:
        flop = products.get(rule, 8) * 5 * 50 * 40
        assert float(rate) * 1e6 * float(time) == pytest.approx(flop, rel=2e-3)
        in_parts = row_type != queue_type or row_type == "fp32"
        ceiling = ceilings["fp16"] / 3 if in_parts else ceilings[row_type]
        assert float(share) == pytest.approx(100 * float(rate) / ceiling, rel=1e-2)
        assert kind == instruction


def test_help(check):
    """Every option, and on a machine without a device too."""
    answer = check("--help", SOFTCL_HOST_DEVICES="0")
    assert answer.returncode == 0
    for option in ("rows", "queue", "dim", "neighbors", "seed", "device", "tolerance", "time"):
        assert f"--{option} " in answer.stdout


def test_no_device_has_its_own_status(check):
    answer = check(SOFTCL_HOST_DEVICES="0")
    assert answer.returncode == 77
    assert answer.stdout == "no CUDA device: no CUDA-capable device is detected\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "5"], "--row is not an option"),
        (["--rows"], "--rows needs a number"),
        (["--rows", "x"], "--rows needs a number"),
        (["--rows", "5"], "come together"),
        (["--device", "3"], "index=3"),
    ],
)
def test_bad_arguments_are_told(check, arguments, message):
    answer = check(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr
