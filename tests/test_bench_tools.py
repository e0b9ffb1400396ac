"""The benchmarks' own tools: costs, the table, the report and the comparison of two runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare, report
from bench.neighbor_peers import make_search
from bench.peers import PEERS, absent
from bench.shapes import SMALL, Shape, cpu_floor, least_bytes, loss_cost
from bench.table import Row, format_tables
from softcl.labels import AdaptiveSoftLabels, HardLabels, NeighborLabels
from softcl.testing import assert_loss_close, assert_neighbors_close, loss_oracle, make_problem

ROOT = Path(__file__).parents[1]


def test_costs():
    """4, 6 and 8 N K D, and 6 where the two means are one."""
    pairs = 256 * 4096
    assert loss_cost(SMALL, HardLabels()) == (4 * pairs * 128, pairs)
    assert loss_cost(SMALL, NeighborLabels(5)) == (6 * pairs * 128, pairs)
    assert loss_cost(SMALL, AdaptiveSoftLabels(5)) == (8 * pairs * 128, 2 * pairs)
    assert loss_cost(SMALL, AdaptiveSoftLabels(5), True) == (6 * pairs * 128, 2 * pairs)
    assert cpu_floor(loss_cost(SMALL, HardLabels()), (2.0 * pairs, 1.0 * pairs)) == 129.0
    assert least_bytes(Shape(1, 10, 4), 2) == 2 * 13 * 4 + 4


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("rule", [HardLabels(), AdaptiveSoftLabels(3)], ids=lambda r: r.name)
def test_peers_agree(peer, rule):
    """Who is compared with computes the same loss and gradient."""
    reason = absent(peer, "cpu", rule)
    if reason or peer == "compiled":  # its compilation takes longer than all of these
        pytest.skip(reason or "compiled is eager")
    p = make_problem(7, 60, 16)
    query = p.query.clone().requires_grad_()
    loss = PEERS[peer](query, p.key, p.queue, rule, 0.1, 0.05)
    loss.sum().backward()
    oracle = loss_oracle(p, rule, normalize=peer == "lightly")
    assert_loss_close(loss, query.grad, oracle, torch.float32, scale=10.0)


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
            "ceilings": [1e12, 1e10],
        }  # fmt: skip
        benchmarks.append({
            "fullname": name, "name": name, "group": f"4x{K}x8 hard", "extra_info": extra,
            "stats": {"median": median, "iqr": iqr},
        })  # fmt: skip
    machine = {"device_name": "A processor", "threads": 2, "torch": "2", "clocks_mhz": 3000.4}
    content = {
        "benchmarks": benchmarks,
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
    assert "A processor, 2 threads, 3000 MHz, torch 2, 2026-01-02" in text
    assert "| 4x64x8 hard | cpu | 2.00 | 500 | 50 | 1.00x | 0.0 |" in text
    assert "| 4x128x8 hard | eager | 10.00 | 100 | 10 | 2.50x | 0.0 |" in text  # of the last file
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


def test_table_without_a_floor_or_a_peer():
    lines = list(format_tables([Row("g", "cpu", 0.001), Row("g", "x", note="not run: absent")]))
    assert lines[2:] == [
        "| g | cpu | 1.00 | 0 |  | 1.00x |  |",
        "| g | x | not run: absent |  |  |  |  |",
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
