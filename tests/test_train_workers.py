"""Resume with images decoded on demand: the same bits from every step and with any workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_comparison import assert_same_run

from softcl.data import load as load_module
from softcl.data import on_demand
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint

STEPS = 8


@pytest.fixture
def lazy_flags(flags: list[str], monkeypatch) -> list[str]:
    """The usual run with its images decoded on demand; some cannot be read."""
    monkeypatch.setattr(load_module, "_default_memory_limit", lambda: 0)
    monkeypatch.setattr(on_demand, "UNREADABLE_LIMIT", 0.05)
    return [*flags, "--knn-every", "0"]


def test_interrupted_at_every_step_with_no_worker_and_with_two(
    lazy_flags: list[str], tmp_path: Path, capsys
):
    assert main([*lazy_flags, "--workers", "2", "--out", "whole"]) == 0
    assert "decoded on demand" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "whole/last.pt")["step"] == STEPS
    for workers in ("0", "2"):
        out = f"parts{workers}"
        line = ["--workers", workers, "--max-steps"]
        assert main([*lazy_flags, "--out", out, *line, "1"]) == 0
        for step in range(2, STEPS + 1):
            assert main(["--resume", out, *line, str(step)]) == 0
            assert read_checkpoint(tmp_path / out / "last.pt")["step"] == step
        assert (tmp_path / out / "result.json").exists()
        assert_same_run(tmp_path / "whole", tmp_path / out)


def test_an_unreadable_image_changes_nothing_either(
    lazy_flags: list[str], folder: Path, tmp_path: Path
):
    """Which image stands in for it does not depend on when it was found."""
    victims = [folder / "train" / name for name in ("class1/003.png", "class1/004.png")]
    stored = [path.read_bytes() for path in victims]
    try:
        for path in victims:
            path.write_bytes(b"junk")
        assert main([*lazy_flags, "--workers", "2", "--out", "whole"]) == 0
        assert main([*lazy_flags, "--workers", "0", "--out", "parts", "--max-steps", "5"]) == 0
        assert main(["--resume", "parts"]) == 0
    finally:
        for path, content in zip(victims, stored, strict=True):
            path.write_bytes(content)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    listed = (tmp_path / "parts/skipped.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in listed) == [
        "train/class1/003.png",
        "train/class1/004.png",
    ]
