"""How commands end: what they say of one kind of fault, and that what they print can be typed."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softcl
from softcl import doctor, evaluate, export, report
from softcl.command import invocation
from softcl.ops import backends
from softcl.train.__main__ import main

ROOT = Path(__file__).parent.parent


def said(call, line: list[str], code: int, capsys) -> str:
    """The first line that a command says as it ends."""
    assert call(line) == code, line
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if code == 2 else 1), lines
    return lines[0]


REFUSED = [
    ("--method nnclr --num-neighbors 0", "--num-neighbors 0: must be at least 1"),
    ("--method msf --num-neighbors 0", "--num-neighbors 0: must be at least 1"),
    ("--data shapes:64 --queue-size 999999999999", "--queue-size 999999999999: takes 511,999,999,"),
    (f"--epochs {'9' * 400}", f"--epochs {'9' * 200}...: must be at most 9223372036854775807"),
    (f"--seed {2**70}", "--seed 1180591620717411303424: must be at most"),
    (f"--arch {'x' * 1_000_000}", f"--arch {'x' * 200}...: unknown backbone"),
    ("--out ~nosuchuser/run", "--out ~nosuchuser/run: there is no such user"),
    ("--config fifo", "--config fifo: not a regular file"),
    ("--config /dev/zero", "--config /dev/zero: not a regular file"),
]


@pytest.mark.parametrize("line, message", REFUSED)
def test_refused_in_two_lines(line: str, message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    assert message in said(main, line.split(), 2, capsys)
    assert os.listdir() == ["fifo"]


def test_an_error_about_a_path_names_its_flag(whole: Path, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    run, cpu = str(whole), ["--device", "cpu"]
    plain = ["--data", str(folder), *cpu]
    for call, line, message in (
        (main, ["--data", "nowhere", *cpu], "--data nowhere: "),
        (main, [*plain, "--eval-data", "nowhere"], "--eval-data nowhere: "),
        (main, ["--resume", "fifo"], "--resume fifo: cannot read: not a regular file"),
        (main, ["--resume", "nowhere"], "--resume nowhere: cannot read: No such file"),
        (main, [*plain, "--out", "fifo"], "--out fifo: is a file"),
        (main, [*plain, "--out", "/proc/run"], "--out /proc/run: "),
        (evaluate.main, ["fifo", *cpu], "fifo: cannot read: not a regular file"),
        (evaluate.main, [run, "--data", "nowhere", *cpu], "--data nowhere: "),
        (evaluate.main, [run, "--out", "/dev/null", *cpu], "--out /dev/null: not a regular file"),
        (evaluate.main, [run, "--out", "no/file", *cpu], "--out no/file: No such file"),
        (export.main, [run, "."], "softcl.export: .: is a folder, not a file"),
        (export.main, [run, "/dev/null"], "softcl.export: /dev/null: not a regular file"),
        (report.main, [run, "--out", "fifo", "--map", "none"], "--out fifo: File exists"),
    ):
        assert message in said(call, line, 1, capsys)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.listdir() == ["fifo"]


def test_targets_are_checked_before_the_work(whole: Path, monkeypatch, capsys):
    def work(*_: object) -> None:
        raise AssertionError("it was begun")

    monkeypatch.setattr(evaluate, "load_backbone", work)
    monkeypatch.setattr(export, "load_backbone", work)
    assert "/proc/x" in said(evaluate.main, [str(whole), "--out", "/proc/x"], 1, capsys)
    assert "/proc/x" in said(export.main, [str(whole), "/proc/x"], 1, capsys)


def test_images_without_labels_are_not_evaluated(whole: Path, folder, tmp_path, capsys):
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))[:12]):
        shutil.copy(path, tmp_path / f"{number}.png")
    line = [str(whole), "--data", str(tmp_path), "--test-data", str(tmp_path), "--device", "cpu"]
    assert "no labels: use --data to name labelled images" in said(evaluate.main, line, 1, capsys)


def test_what_is_printed_can_be_typed(flags: list[str], tmp_path: Path, monkeypatch, capsys):
    assert main([*flags, "--out", "a run", "--max-steps", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].partition("go on with: ")[2]
    python, *rest = shlex.split(line)
    assert shutil.which(python) and os.path.samefile(shutil.which(python), sys.executable)
    assert rest == ["-m", "softcl.train", "--resume", "a run"]
    assert main(rest[2:]) == 0
    # With the environment's folder first on the path, in its folder, and elsewhere.
    own = os.path.abspath(sys.executable)
    monkeypatch.setenv("PATH", os.path.dirname(own))
    assert invocation("x").split()[0] in ("python", "python3", os.path.basename(own))
    monkeypatch.setenv("PATH", "/nowhere")
    assert invocation("x") == f"{own} -m x"
    monkeypatch.chdir(Path(own).parent.parent)
    assert invocation("x") == f"bin/{os.path.basename(own)} -m x"
    script = tmp_path / "softcl"
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    assert invocation("softcl.train") == f"{script} train"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert invocation("softcl.train") == "softcl train"


def test_warnings_of_a_run_that_did_no_good(flags: list[str], capsys, monkeypatch):
    from softcl.train import loop

    def measured(run: loop.Loop) -> None:
        run.baselines = {"untrained": 1.1, "pixels": 0.5, "untrained_rankme": 9.0}
        run.baselines["untrained_neighbors"] = [[0] * 8] * 4

    monkeypatch.setattr(loop.Loop, "_measure_baselines", measured)
    assert main([*flags, "--out", "run", "--epochs", "1", "--queue-size", "256"]) == 0
    text = capsys.readouterr().out
    assert "warning    --queue-size 256 is more than the 128 images" in text
    assert "warning    training has made the features worse than the untrained backbone's" in text


@pytest.mark.parametrize("columns", ["1", "0", "x"])
def test_help_on_any_terminal(columns: str, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for line in (["--help"], ["--help", "all"], ["--method", "sce", "--help", "method"]):
        with pytest.raises(SystemExit) as stopped:
            main(line)
        assert stopped.value.code == 0 and len(capsys.readouterr().out) > 200


def test_a_reader_that_closes_the_pipe():
    """Two processes: Python's own complaint comes when it ends."""
    line = f"{sys.executable} -m softcl.train --help; echo code $? >&2"
    command = f"({line}) | exec 0<&-"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == "code 141\n"


def test_a_report_without_matplotlib_names_the_extra(whole: Path, monkeypatch, capsys):
    monkeypatch.setattr("softcl.command.importlib.util.find_spec", lambda name: None)
    line = said(report.main, [str(whole)], 1, capsys)
    assert line.endswith('a report needs matplotlib, scikit-learn: pip install "softcl[train]"')


def test_without_the_module_it_is_said_once_and_how_to_get_it(monkeypatch, tmp_path: Path):
    reason = "softcl._C is not built (No module named 'softcl._C')"
    for name in ("load", "load_for_cpu"):
        monkeypatch.setattr(softcl.native, name, lambda: (None, reason))
    backends._tell_of_missing_module.cache_clear()
    query = torch.randn(4, 8)
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            softcl.queue_statistics(query, query, 0.1)
    (warning,) = warned
    assert str(warning.message).startswith(f"softcl runs reference: {reason}; python setup.py")
    monkeypatch.setattr(softcl.native, "__file__", str(tmp_path / "softcl/native.py"))
    assert "again from its sources" in softcl.native.advice()
    backends._tell_of_missing_module.cache_clear()
    assert doctor.native is softcl.native
