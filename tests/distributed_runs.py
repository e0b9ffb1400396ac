"""``softcl.train`` among several processes: whole runs, and how they stop and fail.

The runs are on ``images`` in the folder of the group; batches of 36 leave 20 of its 128 images over
in every epoch. Four processes come after two, and find what these have written.
"""

from __future__ import annotations

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from softcl.distributed import ALONE, PeerError, World
from softcl.nn import SplitBatchNorm2d
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.folder import read_metrics
from softcl.train.loop import Loop
from softcl.train.parallel import StopVote, divide_splits, synchronise_norms

FLAGS = (
    "--epochs 6 --batch-size 36 --queue-size 66 --num-splits 4 --lr 0.05 --arch resnet_tiny "
    "--projection-dim 16 --projector-hidden 32 --warmup-epochs 0.5 --device cpu --num-neighbors 3 "
    "--knn-every 0 --log-every 1 --checkpoint-every 1"
).split()


def flags(folder: Path, out: str, *more: str) -> list[str]:
    return ["--data", str(folder / "images"), *FLAGS, "--out", str(folder / out), *more]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def run(world: World, folder: Path) -> None:
    """A whole run; then the first half of one for others to resume, its queue sharded."""
    if world.size > 2:
        return
    assert main(flags(folder, "two")) == 0
    assert main(flags(folder, "half", "--max-steps", "3", "--queue-sharding")) == 0
    if not world.is_main_process:
        return
    whole, half = (read_checkpoint(folder / name / "last.pt") for name in ("two", "half"))
    assert whole["step"] == 18 and half["step"] == 3
    assert half["queues"]["queue.rows"].shape == whole["queues"]["queue.rows"].shape == (66, 16)
    rows = read_metrics(folder / "two" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19))  # written once
    assert (folder / "two" / "result.json").exists()
    for a, b in zip(rows, read_metrics(folder / "half" / "metrics.jsonl"), strict=False):
        if "loss" in a:  # sharded or not
            assert abs(a["loss"] - b["loss"]) <= 1e-4 * a["loss"], (a, b)


def resume(world: World, folder: Path) -> None:
    """Saved by two processes, continued by any number: the same next loss."""
    copy = folder / f"half{world.size}"
    world.on_main_process(
        lambda: None if copy.exists() else shutil.copytree(folder / "half", copy) and None
    )
    sharding = "--queue-sharding" if world.size == 4 else "--no-queue-sharding"
    assert main(["--resume", str(copy), "--max-steps", "5", sharding]) == 0


def probed(world: World, folder: Path) -> None:
    """Three steps with an online probe, which is the same in every process."""
    out = f"probed{world.size if torch.distributed.is_initialized() else ''}"
    assert main(flags(folder, out, "--online-probe", "--max-steps", "3")) == 0


def refusals(world: World, folder: Path) -> None:
    """Wrong flags are an error in every process, before anything is written."""
    W = world.size
    for more in (["--batch-size", "35"], ["--num-splits", "3"], ["--accumulate", "5"]):
        assert main(flags(folder, "refused", *more)) == 2, more
    if W == 4:
        assert main(flags(folder, "refused", "--queue-sharding", "--queue-size", "3")) == 2
    assert main(flags(folder, "two")) == 1  # it holds a run
    assert not (folder / "refused").exists()


def differences(world: World, folder: Path) -> None:
    """Other images at the same path, or other flags: an error in every process, before step 1."""
    first, last = world.rank == 0, world.rank == world.size - 1
    place = folder / f"machine{world.size}{world.rank}"
    shutil.copytree(folder / "images", place / "images")
    here = Path.cwd()
    os.chdir(place)
    argv = ["--data", "images", *FLAGS, "--out", str(folder / "differ")]
    try:
        assert main([*argv, *(["--seed", "3"] if last else [])]) == 2
        one, two, *_ = sorted(path for path in Path("images/train").rglob("*") if path.is_file())
        if last:
            one.write_bytes(two.read_bytes())
        assert main(argv) == 1
        if first:
            two.unlink()
        assert main(argv) == 1
    finally:
        os.chdir(here)
    assert not (folder / "differ").exists()


def skipped(world: World, folder: Path) -> None:
    """skipped.txt lists what any process could not read, each once."""
    written = {}
    run = SimpleNamespace(
        world=world,
        parts=SimpleNamespace(
            images=SimpleNamespace(skipped=["seen by all", f"seen by {world.rank}"])
        ),
        folder=SimpleNamespace(write_text=lambda name, text: written.update({name: text})),
        _listed=0,
    )
    for _ in range(2):  # nothing new the second time
        Loop._list_skipped(run)
    lines = ["seen by all", *(f"seen by {rank}" for rank in range(world.size))]
    assert written == {"skipped.txt": "".join(f"{line}\n" for line in lines)}
    assert run._listed == 1 + world.size


def stops(world: World, folder: Path) -> None:
    """One process is asked to stop: all do, after the same step, with the same exit code."""
    request = SimpleNamespace(exit_code=None)
    vote, stopped = StopVote(world, request), None
    for step in range(6):
        if step == 2 and world.rank == 1:
            request.exit_code = 143
        if vote.asked():
            stopped = step
            break
    assert world.all_gather_object(stopped) == [3] * world.size and vote.settle() == 143
    alone = StopVote(ALONE, SimpleNamespace(exit_code=130))
    assert alone.asked() and alone.settle() == 130


def norms(world: World, folder: Path) -> None:
    """Which batch norm is divided, shared or left alone (on CUDA; here only which it becomes)."""
    W = world.size

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))

    for splits in (1, 2, 4, 8):
        net = divide_splits(network(), splits, world)
        weight = net[1].weight
        own = splits // W
        assert isinstance(net[1], SplitBatchNorm2d) == (own > 1)
        assert own < 2 or net[1].num_splits == own
        synchronise_norms([net], splits, world)
        assert isinstance(net[3], nn.SyncBatchNorm) and net[1].weight is weight
        shared = W % splits == 0 and splits < W
        assert isinstance(net[1], nn.SyncBatchNorm) == shared
        if shared and splits > 1:
            assert net[1].process_group.size() == W // splits


def silence(world: World, folder: Path) -> None:
    """A process that does not answer is an error in the others, after the group's patience."""
    import torch.distributed as dist

    short = World(world.rank, world.size, group=dist.new_group(timeout=timedelta(seconds=2)))
    short.wait()
    if world.rank == 1:
        time.sleep(5)
        return
    started = time.monotonic()
    try:
        short.all_gather_object(1)
    except PeerError as error:
        assert f"process {world.rank} of {world.size}" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("a silent process went unnoticed")
    assert time.monotonic() - started < 4.5


CASES = {
    case.__name__: case
    for case in (run, resume, probed, refusals, differences, skipped, stops, norms, silence)
}
