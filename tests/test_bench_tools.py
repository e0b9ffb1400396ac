"""The benchmarks' own tools: costs, the table, the report and the comparison of two runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, compare, report
from bench.bench_soft_contrastive import assert_peer_close
from bench.ceilings import Ceilings
from bench.neighbor_peers import make_search
from bench.peers import PEERS, absent, dense_labels, teacher_logits
from bench.shapes import SMALL, Cost, Shape, loss_cost, search_cost
from bench.table import Row, format_tables
from bench.timing import measure
from softcl import testing
from softcl.labels import AdaptiveSoftLabels, HardLabels, NeighborLabels
from softcl.testing import (
    NAMED_RULES,
    RULES,
    assert_loss_close,
    assert_neighbors_close,
    loss_oracle,
    make_problem,
    random_rules,
    rule_name,
)

ROOT = Path(__file__).parents[1]


def test_costs():
    """4, 6 and 8 N K D, and 6 where the two means are one."""
    pairs = 256 * 4096
    moved = 4 * (4096 + 3 * 256) * 128 + 4 * 256
    assert loss_cost(SMALL, HardLabels()) == (4 * pairs * 128, pairs, moved)
    assert loss_cost(SMALL, NeighborLabels(5)) == (6 * pairs * 128, pairs, moved)
    assert loss_cost(SMALL, AdaptiveSoftLabels(5)) == (8 * pairs * 128, 2 * pairs, moved)
    assert loss_cost(SMALL, AdaptiveSoftLabels(5), 4, True) == (6 * pairs * 128, 2 * pairs, moved)
    assert loss_cost(Shape(1, 10, 4), HardLabels(), 2).bytes == 2 * 13 * 4 + 4
    assert search_cost(Shape(3, 10, 4), 2) == (240, 0, 4 * 13 * 4 + 12 * 3 * 2)


@pytest.mark.parametrize(
    ("cost", "side_by_side", "floor"),
    [
        (Cost(6.0, 20.0, 100.0), False, 5.0),  # 3 multiply-adds, then 2 for the exponentials
        (Cost(6.0, 20.0, 100.0), True, 3.0),
        (Cost(6.0, 40.0, 100.0), True, 4.0),
        (Cost(6.0, 20.0, 700.0), True, 7.0),
        (Cost(6.0, 20.0, 700.0), False, 7.0),
    ],
)
def test_floor(cost, side_by_side, floor):
    """Units that are shared add their times, others hide behind the one that binds."""
    limits = Ceilings(1.0, 10.0, 100.0, side_by_side)
    assert limits.floor(cost) == floor
    information = limits.information(cost, 2.0 * floor)
    assert information["percent_of_floor"] == 50.0
    assert information["percent_of_ceiling"]["products"] == 100.0 * 3.0 / (2.0 * floor)


def test_ceilings_of_a_gpu_are_of_its_own_rates(monkeypatch):
    """Put together without a GPU; the kernel behind one of them is tested below."""
    monkeypatch.setattr(ceilings, "product_rate", lambda device: {"cuda": 8e14}[device])
    monkeypatch.setattr(ceilings, "copy_rate", lambda device: {"cuda": 4e12}[device])
    monkeypatch.setattr(ceilings, "exponential_rate", lambda: 4e12)
    limits = ceilings.measured.__wrapped__("a group", "cuda")
    assert limits == Ceilings(4e14, 4e12, 4e12, True)
    # The table of a large GPU's floors: 4096 x 65536 x 128, neighbours and dense labels, in us.
    shape = Shape(4096, 65536, 128)
    for rule, expected in ((NeighborLabels(5), 258), (AdaptiveSoftLabels(5), 344)):
        assert round(limits.floor(loss_cost(shape, rule, 2)) * 1e6) == expected


def test_ceilings_of_a_cpu_are_measured():
    """Both loops run, in the instruction set in use."""
    pytest.importorskip("softcl._C", reason="softcl._C is not built")
    rates = ceilings.cpu_rates(1, 0.05)
    if rates is None:
        pytest.skip("no C++ compiler")
    multiply_adds, exponentials = rates
    assert multiply_adds > exponentials > 1e7


def test_exponentials_of_the_ceiling():
    """The kernel adds up as many exponentials as it is said to, in Triton's interpreter."""
    pytest.importorskip("triton")
    program = """
import torch
from bench.exponentials import BLOCK, UNROLL, add_exponentials
x = torch.linspace(-1.0, 1.0, 2 * BLOCK)
i = torch.arange(3 * UNROLL, dtype=torch.float64)
expected = torch.exp2(x.double()[:, None] - i / 64).sum(1)
torch.testing.assert_close(add_exponentials(x, 3).double(), expected, rtol=1e-5, atol=0.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_exponentials_bind_in_machine_code():
    """On sm_90 a multiprocessor starts a warp's exponential every 2 clocks and 4 instructions a
    clock: fewer than 8 instructions for one, none of them to memory, leave it the one that binds.
    """
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from bench.exponentials import BLOCK, NUM_WARPS, UNROLL, machine_code

    code = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", machine_code("sm_90"), re.MULTILINE)
    jumps = [(int(at, 16), int(m[1], 16)) for at, line in code
             if (m := re.search(r"\bBRA 0x([0-9a-f]+)", line))]  # fmt: skip
    end, start = max(jumps, key=lambda jump: jump[0] - jump[1])
    loop = [line for at, line in code if start <= int(at, 16) <= end]
    number = sum("MUFU.EX2" in line for line in loop)
    assert number == BLOCK * UNROLL // (32 * NUM_WARPS)
    assert len(loop) < 5 * number
    assert not any(re.search(r"\b(LD|ST)[GLS]\b", line) for line in loop)


class Rounds:
    """As much of pytest-benchmark's fixture as `measure` uses, on a clock of its own."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.stats = clock, SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, step, setup, rounds):
        for _ in range(rounds):
            if setup:
                setup()
            start = self.clock[0]
            step()
            self.stats.stats.data.append(self.clock[0] - start)


def test_turns_survive_a_drifting_clock(monkeypatch):
    """A machine that slows down by 10 % from call to call: the ratio is that of neighbours."""
    clock, speed = [0.0], [1.0]

    def work(amount: float):
        def call():
            clock[0] += amount * speed[0]
            speed[0] *= 1.1

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timing = measure(Rounds(clock), work(3.0), work(1.0), seconds=40.0)
    assert timing.over_ours == pytest.approx(3.3)
    assert measure(Rounds(clock), work(3.0), seconds=40.0).over_ours is None


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("rule", ["hard", "adaptive_soft-7"])
def test_peers_agree(peer, rule):
    """Who is compared with computes the same loss and gradient."""
    rule = NAMED_RULES[rule]
    reason = absent(peer, "cpu", rule)
    if reason or peer == "compiled":  # its compilation takes longer than all of these
        pytest.skip(reason or "compiled is eager")
    p = make_problem(7, 60, 16)
    query = p.query.clone().requires_grad_()
    loss = PEERS[peer](query, p.key, p.queue, rule, 0.1, 0.05)
    loss.sum().backward()
    oracle = loss_oracle(p, rule, normalize=peer == "lightly")
    assert_loss_close(loss, query.grad, oracle, torch.float32, scale=10.0)


@pytest.mark.parametrize("rule", [*RULES, *random_rules(8, seed=5)], ids=rule_name)
def test_peers_know_every_number_of_a_rule(rule):
    """Clustered rows: labels are clipped, also where n is too small to clip them all."""
    p = make_problem(7, 60, 16, kind="clustered", dtype=torch.float64)
    logits, own = teacher_logits(p.key, p.queue, 0.05)
    made = torch.cat(dense_labels(rule, logits, own), 1)
    torch.testing.assert_close(made, testing.dense_labels(rule, logits, own).labels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_peers_agree_in_half_precision(rule, dtype):
    """Within their rounding; a loss or a gradient that is off by more is noticed."""
    p = make_problem(32, 60, 16, dtype=getattr(torch, dtype))
    positive = rule != NAMED_RULES["relational"]
    oracle = loss_oracle(p, rule, positive=positive)
    for peer in ("eager", "chunked", "attention"):
        query = p.query.clone().requires_grad_()
        loss = PEERS[peer](query, p.key, p.queue, rule, 0.1, 0.05, positive)
        loss.sum().backward()
        assert_peer_close(loss, query.grad, oracle, rule)
    with pytest.raises(AssertionError, match="loss is off"):
        assert_peer_close(1.25 * loss, query.grad, oracle, rule)
    with pytest.raises(AssertionError, match="gradient is off"):
        assert_peer_close(loss, 1.25 * query.grad, oracle, rule)


@pytest.mark.parametrize("peer", ["torch", "scikit-learn"])  # faiss: its OpenMP is another one
def test_peers_of_the_search_agree(peer):
    p = make_problem(9, 50, 8)
    values, indices = make_search(peer, p.queue)(p.key, 5)
    assert_neighbors_close(10.0 * values.float(), indices, p.key, p.queue, 0.1)


def results(path: Path, medians: dict[str, float], iqr: float = 0.0) -> Path:
    """A file as pytest-benchmark writes it: one loss for every "contender K"."""
    benchmarks = []
    for name, median in medians.items():
        contender, K = name.rsplit(" ", 1)
        extra = {
            "contender": contender, "shape": [4, int(K), 8], "rule": "hard", "dtype": "float32",
            "flop": 1e9, "bytes": 1e6, "floor_seconds": 1e-3, "peak_bytes": 1000,
            "ceilings": Ceilings(1e12, 1e10, 1e10, False)._asdict(),
        }  # fmt: skip
        benchmarks.append({
            "fullname": name, "name": name, "group": f"4x{K}x8 hard", "extra_info": extra,
            "stats": {"median": median, "iqr": iqr},
        })  # fmt: skip
    machine = {"device_name": "A processor", "threads": 2, "torch": "2", "clocks_mhz": 3000.4}
    content = {
        "benchmarks": benchmarks,
        "not_run": [["4x64x8 hard", *x] for x in (("eager", "once"), ("flex", "not run: why"))],
        "datetime": "2026-01-02T03",
        "machine_info": {"softcl": machine},
    }
    path.write_text(json.dumps(content))
    return path


def test_report(tmp_path):
    medians = {"cpu 64": 2e-3, "cpu 128": 4e-3, "eager 64": 5e-3, "eager 128": 9e-3}
    file = results(tmp_path / "a.json", medians)
    newer = results(tmp_path / "b.json", {"eager 128": 10e-3})
    report.main([str(file), str(newer), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    cells = [line.split() for line in text.splitlines()]
    assert "A processor, 2 threads, 3000 MHz, torch 2, 2026-01-02" in text
    assert "| 4x64x8 hard | cpu | 2.00 | 500 | 50 | 1.00x | 0.0 | |".split() in cells
    assert "| 4x64x8 hard | flex | | | | | | not run: why |".split() in cells
    assert "once" not in text  # another file has it
    newer = "| 4x128x8 hard | eager | 10.00 | 100 | 10 | 2.50x | 0.0 | |"  # of the last file
    assert newer.split() in cells
    for name in ("time", "memory", "ratios", "roofline"):
        image = tmp_path / "out" / f"{name}.png"
        assert image.read_bytes().startswith(b"\x89PNG") and image.name in text


def test_comparison(tmp_path, capsys):
    """Beyond the spread of the rounds counts, within it does not."""
    old = results(tmp_path / "old.json", {"cpu 64": 1.0, "cpu 128": 1.0, "gone 8": 1.0}, iqr=0.05)
    new = results(tmp_path / "new.json", {"cpu 64": 1.08, "cpu 128": 1.5}, iqr=0.05)
    assert compare.main([str(old), str(new)]) == 0
    printed = capsys.readouterr().out
    assert "| cpu 128 | 1000.000 | 1500.000 | +50.0% | 100.000 |" in printed
    assert "cpu 64" not in printed
    assert "1 of 2 changed beyond their spread; 1 only in the old, 0 only in the new." in printed
    assert compare.main([str(old), str(new), "--most-slower", "20"]) == 1
    assert compare.main([str(new), str(old), "--most-slower", "20"]) == 0


@pytest.mark.parametrize("tool", ["report", "compare"])
def test_files_that_hold_no_results(tmp_path, tool):
    (tmp_path / "empty.json").write_text("{}")
    main = {"report": report.main, "compare": compare.main}[tool]
    with pytest.raises(SystemExit, match="holds no results of pytest-benchmark"):
        main([str(tmp_path / "empty.json"), str(tmp_path / "empty.json")])


def test_tables_have_the_columns_that_are_known():
    rows = [
        Row("g", "cpu", 0.001),
        Row("g", "x", note="not run: absent"),
        Row("views", "cpu", 0.25, images_per_s=1024.0),
        Row("views", "peer", 1.0, images_per_s=256.0, over_ours=3.5),  # it took turns with ours
    ]
    assert list(format_tables(rows)) == [
        "",
        "| work | contender | median ms | over ours | note            |",
        "| ---- | --------- | --------: | --------: | --------------- |",
        "| g    | cpu       |      1.00 |     1.00x |                 |",
        "| g    | x         |           |           | not run: absent |",
        "",
        "| work  | contender | median ms | images/s | over ours |",
        "| ----- | --------- | --------: | -------: | --------: |",
        "| views | cpu       |     250.0 |    1,024 |     1.00x |",
        "| views | peer      |    1000.0 |      256 |     3.50x |",
    ]


def test_the_quick_benchmarks_are_correct():
    """Their checks without their timing: what CI runs of bench/."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_queue.py", "bench/bench_soft_contrastive.py",
         "-q", "--benchmark-disable", "-p", "no:cacheprovider", "-k", "queue or 256x4096x128",
         "--peer", "eager", "--peer", "chunked", "--peer", "attention", "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
