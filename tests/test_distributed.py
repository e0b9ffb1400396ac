"""Two and four processes on gloo compute what one process computes; parts of a queue merge."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_cases
import distributed_runs
import distributed_steps
import pytest
import torch
from processes import free_port, run_cases
from run_comparison import assert_same

import softcl
from softcl.data.views import VIEWS, Share
from softcl.distributed import ShardedQueue, World
from softcl.nn import MemoryQueue
from softcl.testing import make_problem
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.folder import read_metrics, settle_restart

CASES = [
    f"{module.__name__}.{name}"
    for module in (distributed_cases, distributed_steps, distributed_runs)
    for name in module.CASES
]

# Cases that are about another process, or read what two processes wrote.
NEEDS_OTHERS = {"uneven", "run", "resume", "refusals", "differences", "stops", "norms", "silence"}


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory) -> Path:
    """Where all processes work; ``images`` leads to the images."""
    path = tmp_path_factory.mktemp("processes")
    (path / "images").symlink_to(folder)
    return path


@pytest.fixture(scope="module")
def failures(shared):
    """The failures of all cases among W processes, which are started once for each W."""
    known: dict[int, dict[str, str]] = {}

    def of(size: int) -> dict[str, str]:
        if size == 4:
            of(2)  # whose runs they resume
        if size not in known:
            known[size] = run_cases(CASES, size, shared)
        return known[size]

    return of


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_processes(failures, size, name):
    assert name not in failures(size), failures(size)[name]


def test_one_process_with_an_engine_goes_the_ways_of_many(shared):
    """As it would on a machine with one GPU: nothing is cut short, and the results are the same."""
    cases = [case for case in CASES if case.split(".")[1] not in NEEDS_OTHERS]
    assert len(cases) == len(CASES) - len(NEEDS_OTHERS)
    failures = run_cases(cases, 1, shared)
    assert not failures, failures


def test_the_cost_of_an_engine_is_measured_on_equal_steps():
    """bench/engine_cost.py stops where the losses differ; its times are not looked at here."""
    script = Path(__file__).parents[1] / "bench" / "engine_cost.py"
    command = [sys.executable, str(script), "--device", "cpu", "--arch", "resnet_tiny"]
    command += ["--batch-size", "16", "--rounds", "1", "--warmup", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "engine, queue sharded" in done.stdout, done.stdout + done.stderr
    assert done.returncode in (0, 1) and "first loss" not in done.stdout


def test_a_checkpoint_does_not_depend_on_the_number_of_processes(failures, shared, one_thread):
    """Saved by two, resumed by one, two and four: the same losses and the same sampler."""
    for size in (2, 4):
        assert "distributed_runs.resume" not in failures(size), failures(size)
    distributed_runs.resume(softcl.distributed.ALONE, shared)
    losses = {}
    for size in (1, 2, 4):
        rows = read_metrics(shared / f"half{size}" / "metrics.jsonl")
        losses[size] = [row["loss"] for row in rows if row["step"] in (4, 5)]
        assert len(losses[size]) == 2
    for size in (2, 4):
        assert losses[size] == pytest.approx(losses[1], rel=2e-6)


def test_an_online_probe_does_not_depend_on_the_number_of_processes(failures, shared, one_thread):
    """Its gradients are averaged: the weights of two and four are those of one."""
    distributed_runs.probed(softcl.distributed.ALONE, shared)
    expected = read_checkpoint(shared / "probed" / "last.pt")["online_probe"]["classifier"]
    for size in (2, 4):
        assert "distributed_runs.probed" not in failures(size), failures(size)
        found = read_checkpoint(shared / f"probed{size}" / "last.pt")["online_probe"]["classifier"]
        for name, weight in expected.items():
            distributed_runs.close(found[name], weight)


def test_a_killed_worker_costs_no_more_than_the_last_checkpoint(failures, shared):
    """SIGKILL under torchrun: the run completes, with the weights of one left in peace."""
    assert "distributed_runs.run" not in failures(2), failures(2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=2", "--monitor-interval=0.2", f"--master-port={free_port()}"]
    command += ["-m", "softcl.train", *distributed_runs.flags(shared, "killed")]
    paths = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    with open(shared / "killed.txt", "w") as output:
        agent = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **paths}, cwd=shared
        )
        try:
            started = time.monotonic()
            while not (shared / "killed" / "last.pt").exists():
                assert agent.poll() is None, (shared / "killed.txt").read_text()
                assert time.monotonic() - started < 120
                time.sleep(0.01)
            os.kill(max(children(agent.pid)), signal.SIGKILL)
            killed_at = time.monotonic()
            code = agent.wait(150)
        finally:
            agent.kill()
    text = (shared / "killed.txt").read_text()
    assert code == 0 and "resumed    at step" in text, text
    assert time.monotonic() - killed_at < 120
    peace, killed = (read_checkpoint(shared / name / "last.pt") for name in ("two", "killed"))
    for part in ("step", "student", "teacher", "queues", "optimizer"):
        assert_same(killed[part], peace[part], part)


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def test_one_process_never_starts_the_engine(shared, monkeypatch, one_thread):
    """Neither alone nor as torchrun's only worker."""
    import torch.distributed as dist

    def refuse(*_args, **_options):
        raise AssertionError("torch.distributed was initialised")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert main(distributed_runs.flags(shared, "alone", "--max-steps", "1")) == 0
    assert not dist.is_initialized()


# ---- the merge itself, in one process ----


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates"])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_statistics_of_parts_merge_into_those_of_the_whole(kind, temperature):
    """At 0.005 a fixed offset would overflow: the merge follows the largest part."""
    p = make_problem(6, 40, 8, kind=kind, dtype=torch.float64, seed=1)
    whole = softcl.queue_statistics(p.query, p.queue, temperature, num_neighbors=7)
    for cuts in ((0, 40), (0, 1, 40), (0, 13, 14, 33, 40), tuple(range(0, 41, 5))):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            k = min(7, stop - start)
            part = softcl.queue_statistics(
                p.query, p.queue[start:stop], temperature, num_neighbors=k
            )
            parts.append(part._replace(neighbor_indices=part.neighbor_indices + start))
        merged = softcl.merge_statistics(parts, num_neighbors=7)
        for name in ("lse", "mean", "entropy", "neighbor_logits"):
            actual, expected = getattr(merged, name), getattr(whole, name)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        if kind != "duplicates":
            assert torch.equal(merged.neighbor_indices, whole.neighbor_indices)


def test_equal_neighbors_merge_by_lowest_row():
    """Whole lists of equal rows: the merged list has the lowest rows, in whatever order it came."""
    vectors, queue = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    queue = queue.repeat(6, 1)  # rows 0, 2, 4, .. are equal, and so are 1, 3, 5, ..
    parts = []
    for start in (8, 0, 4):
        part = softcl.queue_statistics(vectors, queue[start : start + 4], 0.1, num_neighbors=2)
        parts.append(part._replace(neighbor_indices=part.neighbor_indices + start))
    merged = softcl.merge_statistics(parts)
    assert merged.neighbor_indices.tolist() == [[0, 2], [1, 3]]


def test_merged_statistics_are_differentiable():
    p = make_problem(5, 24, 6, dtype=torch.float64, seed=3)

    def value(statistics):
        return (
            statistics.lse.sum() + 2 * statistics.entropy.sum() + statistics.mean.square().sum()
        ) + statistics.neighbor_logits.square().sum()

    whole = p.query.clone().requires_grad_()
    value(softcl.queue_statistics(whole, p.queue, 0.1, num_neighbors=3)).backward()
    split = p.query.clone().requires_grad_()
    parts = [softcl.queue_statistics(split, x, 0.1, num_neighbors=3) for x in p.queue.split(8)]
    value(softcl.merge_statistics(parts)).backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VIEWS)
def test_shares_of_a_batch_make_the_views_of_the_whole(name):
    """With the generator's numbers of each sample, wherever it is."""
    images = torch.randint(0, 256, (12, 3, 20, 24), generator=torch.Generator().manual_seed(0))
    images, statistics = images.to(torch.uint8), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    whole = VIEWS[name](images, 16, *statistics, torch.Generator().manual_seed(1))
    for size, rank in ((2, 0), (2, 1), (3, 1), (4, 3)):
        share = Share(torch.Generator().manual_seed(1), rank, size)
        part = VIEWS[name](images[rank::size], 16, *statistics, share)
        torch.testing.assert_close(part, whole[rank::size], rtol=1e-5, atol=1e-5)


def test_a_sharded_queue_starts_with_the_rows_of_a_whole_one(monkeypatch):
    """Drawn piece by piece, in each process its own."""
    monkeypatch.setattr(softcl.distributed.queue, "_PIECE_ROWS", 32)
    for size, dim, processes in ((33, 5, 2), (100, 16, 3), (64, 128, 4), (7, 1, 2)):
        whole = MemoryQueue(size, dim, seed=3).rows
        for rank in range(processes):
            queue = ShardedQueue(size, dim, World(rank, processes), seed=3)
            assert torch.equal(queue.shard.rows, whole[rank::processes])


def test_a_restarted_worker_goes_on_with_the_run_in_out():
    given, restarted = {"out": "run", "overwrite": True}, {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert settle_restart(given, {}) == given
    assert settle_restart(given, {"TORCHELASTIC_RESTART_COUNT": "0"}) == given
    assert settle_restart(given, restarted) == {"out": "run", "resume": "auto"}
    assert settle_restart({"resume": "run"}, restarted) == {"resume": "run"}
    assert settle_restart({"epochs": 2}, restarted) == {"epochs": 2}
