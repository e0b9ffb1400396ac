"""Command lines that nobody should write: 300 drawn by a fixed seed, and what becomes of them.

A line starts right, and then values, flags, files or the environment are spoilt. Whatever comes of
it, there is no traceback, no hang, and what is said about it has three lines at most.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from softcl import detect, doctor, embed, evaluate, export, finetune, report
from softcl.methods import METHODS
from softcl.train import __main__ as train
from softcl.train.checkpoint import read_checkpoint, write_checkpoint
from softcl.train.config import settings_of

LINES = 300
SECONDS = 10  # after which a line hangs
MEMORY = 16 << 30  # bytes of address space beyond what the tests have: a queue of terabytes fails

INTS = [
    *("0", "-1", "1", "2", "7", "33", "4097", "3.5", "1e3", "", "x", "nan", "0x10", "1_0", " 8"),
    *("9" * 18, "1" + "0" * 12, str(2**63), str(2**70), "9" * 400, "9" * 5000, "-" + "9" * 400),
]
FLOATS = [
    *("0", "-0.0", "-1", "0.5", "1", "2", "nan", "inf", "-inf", "1e-400", "1e-300", "1e308"),
    *("1e400", "1,5", "", "fast", "9" * 400, "1e", "0x1p3"),
]
WORDS = [
    *("", "auto", "cpu", "CPU", "cuda", "cuda:99", "cuda:-1", "meta", "mps", "nonsense", "None"),
    *("a\nb\nc\nd", "\x1b[31mred", "\ud800", "💥", "%s %(prog)s", "{}", "x" * 1_000_000),
    *("ascl", "paper", "all", "cosine", "adamw", "bf16", "resnet_tiny", "resnet999", "byol_first"),
]
PATHS = [
    *("", ".", "..", "/", "/dev/null", "/dev/zero", "/dev/full", "nowhere", "nowhere/at/all", "~"),
    *(
        "~nosuchuser",
        "~nosuchuser/run",
        "n" * 5000,
        "a/" * 3000,
        "nul\0byte",
        "\ud800",
        "\udcff",
        "a\nb",
    ),
    *("fifo", "dangling", "loop", "empty", "bytes", "deep.json", "types.json", "digits.json"),
    *("list.json", "images", "unlabelled", "run", "run/last.pt", "run/config.json", "run/.lock"),
    *("lacking.pt", "typed.pt", "bytes-run", "types-run", "deep-run", "shapes:0", "shapes:x"),
    *("shapes:-1", "shapes:" + "9" * 400, "shapes:20", "shapes", "auto", "-", "--", "out", "a,b"),
]
ENVIRONMENT = {
    "WORLD_SIZE": ("2", "two", "-1", "0", "", "1.5", "9" * 400),
    "RANK": ("x", "-1", "", "7"),
    "LOCAL_RANK": ("x", ""),
    "LOCAL_WORLD_SIZE": ("many", "0"),
    "TORCHELASTIC_RESTART_COUNT": ("often", "-3"),
    "COLUMNS": ("1", "0", "x", "100000"),
    "HOME": ("", "/nowhere"),
    "TMPDIR": ("/nowhere",),
    "CXX": ("nonsense",),
}
NEVER = {"--epochs": "1", "--max-steps": "1"}  # a line that turns out right is over soon


class Hang(BaseException):
    """Not an Exception: no command may catch it."""


@pytest.fixture(scope="module")
def room(tmp_path_factory, folder: Path, whole: Path) -> Path:
    """A folder with a run, images, and files that are not what they seem."""
    room = tmp_path_factory.mktemp("room")
    (room / "images").symlink_to(folder)
    (room / "unlabelled").mkdir()
    for number, image in enumerate(sorted(folder.glob("train/class0/*.png"))[:8]):
        shutil.copy(image, room / f"unlabelled/{number}.png")
    os.mkfifo(room / "fifo")
    (room / "dangling").symlink_to("gone")
    (room / "loop").symlink_to("loop")
    deep = "[" * 100_000
    spoilt = {
        "empty": b"",
        "bytes": b"\xff\xfe\x00{",
        "deep.json": b'{"config": ' + deep.encode(),
        "types.json": json.dumps({"config": {"lr": [], "data": {}, "epochs": "x"}}).encode(),
        "digits.json": b'{"lr": %s, "epochs": %s}' % (b"9" * 400, b"9" * 400),
        "list.json": b"[1, 2]",
    }
    for name, content in spoilt.items():
        (room / name).write_bytes(content)
    shutil.copytree(whole, room / "run")
    for name, content in (("bytes", b"\xff"), ("deep", deep.encode()), ("types", b'{"step": []}')):
        run = room / f"{name}-run"
        shutil.copytree(whole, run)
        for file in ("metrics.jsonl", "config.json", "baselines.json", "result.json"):
            (run / file).write_bytes(content)
    content = read_checkpoint(whole / "last.pt")
    write_checkpoint(room / "lacking.pt", {k: v for k, v in content.items() if k != "best"})
    write_checkpoint(room / "typed.pt", {**content, "config": 7, "student": "none"})
    return room


# --------------------------------------------------------------------------------------- the lines

Command = Callable[[list[str]], int]


def right_line(chance: random.Random) -> tuple[Command, list[str], dict[str, list[str]]]:
    """A command, arguments that it takes, and values that its flags may be given in their place."""
    others = ["evaluate", "finetune", "detect", "embed", "export", "report", "doctor"]
    kind = chance.choice(["train"] * 6 + others)
    if kind == "train":
        method = chance.choice(list(METHODS))
        line = ["--method", method, "--data", "images"]
        line += ["--arch", "resnet_tiny", "--batch-size", "16", "--num-splits", "1"]
        line += ["--queue-size", "64", "--projector-hidden", "16", "--device", "cpu"]
        line += [chance.choice(["--dry-run", "--dry-run", "--max-steps=1"])]
        pools = {"--config": PATHS}
        for name, rules in settings_of(chance.choice(list(METHODS))).items():
            if name == "compile":  # takes a minute, and no wonder
                continue
            of_path = rules.metavar in ("SPEC", "FOLDER", "RUN")
            kinds = {int: INTS, float: FLOATS, bool: ["yes"], str: PATHS if of_path else WORDS}
            pools["--" + name.replace("_", "-")] = kinds[rules.kind]
        return train.main, line, pools
    if kind == "evaluate":
        pools = {"--data": PATHS, "--test-data": PATHS, "--out": PATHS, "--measure": WORDS}
        pools |= {f: INTS for f in ("--image-size", "--knn-k", "--limit", "--seed", "--workers")}
        pools |= {"--temperature": FLOATS, "--lr": FLOATS, "--device": WORDS, "--network": WORDS}
        line = [chance.choice(["run", *PATHS]), "--limit", "8", "--epochs", "1", "--device", "cpu"]
        return evaluate.main, line, pools
    if kind == "finetune":
        pools = {"--data": PATHS, "--test-data": PATHS, "--labels": [*WORDS, *PATHS, "5%"]}
        pools |= {flag: PATHS for flag in ("--out", "--save", "--write-labels", "--compare")}
        pools |= {"--lr-head": FLOATS, "--lr-backbone": FLOATS, "--batch-size": INTS}
        pools |= {"--image-size": INTS, "--seed": INTS, "--limit": INTS, "--arch": WORDS}
        line = [chance.choice(["run", *PATHS]), "--data", "images", "--epochs", "1", "--no-random"]
        return finetune.main, [*line, "--device", "cpu"], pools
    if kind == "detect":
        pools = {"--data": PATHS, "--out": PATHS, "--task": WORDS, "--arch": WORDS}
        pools |= {f: INTS for f in ("--epochs", "--batch-size", "--image-size", "--seed")}
        pools |= {"--lr": FLOATS, "--channels": INTS, "--regions": INTS, "--workers": INTS}
        line = [chance.choice(["random", "run", *PATHS]), "--data", chance.choice(PATHS)]
        return detect.main, [*line, "--out", "found", "--device", "cpu"], pools
    if kind == "embed":
        pools = {"--data": PATHS, "--out": [*PATHS, "x.npz", "x.txt"], "--split": WORDS}
        pools |= {flag: INTS for flag in ("--neighbors", "--image-size", "--batch-size")}
        pools |= {"--duplicates": FLOATS, "--arch": WORDS, "--workers": INTS}
        line = [chance.choice(["run", *PATHS]), "--data", "unlabelled", "--out", "out.npz"]
        return embed.main, [*line, "--device", "cpu"], pools
    if kind == "export":
        line = [chance.choice(["run", *PATHS]), chance.choice(["out.pth", *PATHS])]
        return export.main, line, {"--format": WORDS, "--network": WORDS}
    if kind == "report":
        pools = {"--out": PATHS, "--map": WORDS, "--map-images": INTS, "--device": WORDS}
        runs = chance.sample(["run", "bytes-run", "types-run", "deep-run", *PATHS], 2)
        return report.main, [*runs, "--map", "none"], pools
    return (
        doctor.main,
        ["--seconds", "0"],
        {"--seconds": [*FLOATS[:3], *FLOATS[6:10], *FLOATS[12:]]},
    )


def draw_line(chance: random.Random) -> tuple[Command, list[str], dict[str, str]]:
    """A command, its arguments, spoilt in some way, and what is set in the environment."""
    command, line, pools = right_line(chance)
    environment = {}
    for _ in range(chance.choice((1, 1, 2, 3))):
        what = chance.random()
        flag = chance.choice(list(pools))
        if what < 0.7:
            value = chance.choice(pools[flag])
            line += [f"{flag}={value}"] if chance.random() < 0.5 else [flag, value]
        elif what < 0.8:
            name = chance.choice(list(ENVIRONMENT))
            environment[name] = chance.choice(ENVIRONMENT[name])
        elif what < 0.85:
            line.insert(chance.randrange(len(line) + 1), chance.choice([*WORDS, *PATHS]))
        elif what < 0.9:
            line += [flag[:-1], "1"]
        elif what < 0.95:
            line += [flag]
        else:
            line += ["--help", *chance.choice(([], ["all"], ["method"], WORDS[-1:], ["x" * 9000]))]
    if command is train.main:
        line += [word for pair in NEVER.items() for word in pair if "--resume" not in str(line)]
    return command, line, environment


def check_line(command: Command, line: list[str], capsys) -> None:
    """Run a line and raise where it does what none may."""

    def stop(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        code = command(line)
    except SystemExit as stopped:
        code = stopped.code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    shown = capsys.readouterr()
    said = shown.err.splitlines()
    assert code in (0, 1, 2), f"exit code {code}"
    assert "Traceback" not in shown.err + shown.out
    assert len(said) <= 3 and all(len(words) <= 1000 for words in said), shown.err[:2000]
    assert said or code == 0, "failed without a word"


@pytest.fixture
def little_memory():
    """No more address space than tests need: what is far too large fails, and fills nothing."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, kept[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, kept)


def failures_of(lines: int, seed: int, room: Path, capsys) -> list[str]:
    """What no line may do, of so many drawn by a seed: each in a line."""
    chance, failures = random.Random(seed), []
    for number in range(lines):
        command, line, environment = draw_line(chance)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(room)
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                check_line(command, line, capsys)
            except (Exception, Hang) as error:
                shown = [word if len(word) < 60 else word[:60] + "..." for word in line]
                where = f"{number} {command.__module__} {shown} {environment}"
                failures.append(f"{where}: {repr(error)[:500]}")
    return failures


def test_no_line_ends_in_a_traceback_a_hang_or_many_words(room, capsys, one_thread, little_memory):
    failures = failures_of(LINES, 0, room, capsys)
    assert not failures, "\n".join(failures)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_nor_do_thousands_of_lines(seed: int, room, capsys, one_thread, little_memory):
    failures = failures_of(5 * LINES, seed, room, capsys)
    assert not failures, "\n".join(failures)
