"""Resume with images decoded on demand: the same bits from every step and with any workers."""

from __future__ import annotations

import tarfile
from pathlib import Path

from run_comparison import assert_same_run

from softcl.data import decode, sets
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.folder import read_metrics

STEPS = 8


def test_interrupted_at_every_step_with_no_worker_and_with_two(
    flags: list[str], folder: Path, tmp_path: Path, monkeypatch, capsys
):
    """Also where images cannot be read: what stands in for one does not depend on when it was
    found.
    """
    monkeypatch.setattr(sets, "_default_memory_limit", lambda: 0)
    monkeypatch.setattr(decode, "UNREADABLE_LIMIT", 0.05)
    flags = [*flags, "--knn-every", "0"]
    names = ["train/class1/003.png", "train/class1/004.png"]
    stored = [(folder / name).read_bytes() for name in names]
    try:
        for name in names:
            (folder / name).write_bytes(b"junk")
        assert main([*flags, "--workers", "2", "--out", "whole"]) == 0
        assert "decoded on demand" in capsys.readouterr().out
        for workers in ("0", "2"):
            out, line = f"parts{workers}", ["--workers", workers, "--max-steps"]
            assert main([*flags, "--out", out, *line, "1"]) == 0
            for step in range(2, STEPS + 1):
                assert main(["--resume", out, *line, str(step)]) == 0
                assert read_checkpoint(tmp_path / out / "last.pt")["step"] == step
            assert (tmp_path / out / "result.json").exists()
            assert_same_run(tmp_path / "whole", tmp_path / out)
            listed = (tmp_path / out / "skipped.txt").read_text().splitlines()
            assert sorted(line.split(":")[0] for line in listed) == names
    finally:
        for name, content in zip(names, stored, strict=True):
            (folder / name).write_bytes(content)


def test_interrupted_in_an_order_of_shards(
    flags: list[str], folder: Path, tmp_path: Path, monkeypatch, capsys
):
    for part, count in (("train", 4), ("test", 1)):
        files = sorted((folder / part).rglob("*.png"))
        for number in range(count):
            with tarfile.open(tmp_path / f"{part}-{number}.tar", "w") as shard:
                for file in files[number::count]:
                    name = f"{file.parent.name}-{file.name}"
                    shard.add(file, name)
                    (tmp_path / "label").write_text(file.parent.name)
                    shard.add(tmp_path / "label", f"{name.partition('.')[0]}.cls")
    flags = [*flags, "--data", str(tmp_path), "--knn-every", "0"]
    assert main([*flags, "--out", "exact"]) == 0
    shards = [*flags, "--shuffle", "shards"]
    assert main([*shards, "--out", "whole"]) == 0  # in memory; then decoded on demand
    monkeypatch.setattr(sets, "_default_memory_limit", lambda: 0)
    assert main([*shards, "--out", "parts", "--workers", "2", "--max-steps", "3"]) == 0
    for step in ("5", "8"):
        assert main(["--resume", "parts", "--workers", "0", "--max-steps", step]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [
        read_metrics(tmp_path / out / "metrics.jsonl")[0]["loss"] for out in ("exact", "whole")
    ]
    assert losses[0] != losses[1]
    capsys.readouterr()
    assert main([*flags, "--data", str(folder), "--shuffle", "shards", "--out", "none"]) == 2
    assert "--shuffle shards: there are none" in capsys.readouterr().err
