"""Resume with images decoded on demand: the same bits from every step and with any workers."""

from __future__ import annotations

from pathlib import Path

from run_comparison import assert_same_run

from softcl.data import decode, sets
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint

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
