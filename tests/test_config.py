"""The configuration, the flags made of it, and how wrong ones are refused."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import torch

from softcl.command import did_you_mean
from softcl.data import ImageSet
from softcl.errors import ConfigError
from softcl.methods import METHODS
from softcl.methods.defaults import shapes_defaults
from softcl.train.__main__ import main, parse_flags
from softcl.train.config import TrainConfig, method_settings, own_settings, settings_of
from softcl.train.defaults import defaults_for, fill
from softcl.train.images import view_side


def image_set(count: int = 512, size: int = 32, statistics: str = "shapes") -> ImageSet:
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    return ImageSet(images, None, [], half, half, "none", statistics=statistics)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_own_numbers_are_its_flags_with_help(method: str, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--method", method, "--help", "all"])
    text = capsys.readouterr().out
    fields = dataclasses.fields(METHODS[method])
    for field in fields:
        rules = method_settings(method)[field.name]
        assert flag_of(field.name) in text and len(rules.help) >= 1, field.name
    assert set(settings_of(method)) == {*own_settings(), *(field.name for field in fields)}
    foreign = {n for other in METHODS for n in method_settings(other)} - set(settings_of(method))
    assert foreign and not [name for name in foreign if f"{flag_of(name)} " in text]


def test_a_method_of_ones_own_has_its_flags(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Near(METHODS["moco"]):
        """A method that somebody adds.

        Attributes:
            trust: how far a near row
                is trusted.
        """

        trust: float = 0.5

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.trust <= 1:
                raise ValueError(f"trust must be in [0, 1], got {self.trust}")

    page = types.ModuleType("near")
    page.DEFAULTS = {"shapes": shapes_defaults(Near(queue_size=512, num_splits=1, trust=0.25))}
    monkeypatch.setitem(sys.modules, "near", page)
    monkeypatch.setattr(Near, "__module__", "near")
    monkeypatch.setitem(METHODS, "near", Near)
    with pytest.raises(SystemExit):
        main(["--method", "near", "--help", "method"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--trust X how far a near row is trusted (default: 0.25)" in text
    assert "--trust 2.0: must be in [0, 1]" in refused("--method near --trust 2", capsys)
    _, method, _ = fill(TrainConfig.of(method="near", trust=1.0), image_set(), 32)
    assert type(method) is Near and (method.trust, method.queue_size) == (1.0, 512)


def test_help_shows_the_defaults_of_the_chosen_method(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    for line, expected in (
        (
            "--method snclr --help method",
            "rows of the memory queue (default: 4096; tiny-imagenet 16384; ",
        ),
        ("--method snclr --help method", "(code) (default: off)"),
        ("--method=moco --help optimisation", "--lr X peak learning rate (default: 0.06; imagene"),
        ("--help evaluation", "(default: 10)"),
    ):
        with pytest.raises(SystemExit):
            main(line.split())
        assert expected in " ".join(capsys.readouterr().out.split())


def test_flags_give_typed_values_and_only_those_given():
    line = "--lr 1e-2 --epochs=3 --no-fused --overwrite --data shapes:9 --method snclr --threshold "
    assert parse_flags([*line.split(), "--positiveness-scale", "2"]) == {
        **{"lr": 0.01, "epochs": 3, "fused": False, "overwrite": True, "data": "shapes:9"},
        **{"method": "snclr", "threshold": True, "positiveness_scale": 2.0},
    }
    assert parse_flags([]) == {}


def test_config_survives_json():
    config = TrainConfig.of(lr=0.1, epochs=3, warmup_epochs=0.5, fused=True, out="x", labels="hard")
    again = TrainConfig.of(**json.loads(json.dumps(config.to_dict())))
    assert again == config and again.identity() == config.identity()
    with pytest.raises(ConfigError, match=r"--epoch 3: unknown setting; did you mean epochs\?"):
        TrainConfig.of(epoch=3)


def test_identity_covers_what_a_run_computes_and_nothing_else():
    config, _, _ = fill(TrainConfig(), image_set(), 32)
    samples = {int: 7, float: 0.25, str: "cpu", bool: True}
    for name, rules in settings_of("ascl").items():
        value = (rules.choices or [samples[rules.kind]])[-1]
        value = 64 if name == "image_size" else value
        if name in ("resume", "method", "form") or value == config.to_dict()[name]:
            continue
        same = config.changed(**{name: value}).identity() == config.identity()
        assert same == rules.may_change, name


def test_settings_come_from_the_methods_defaults():
    config, method, name = fill(TrainConfig(), image_set(), 32)
    assert name == "shapes" and config.arch == "resnet_tiny"
    assert config.numbers == dataclasses.asdict(method)
    assert (method.queue_size, method.temperature, method.momentum) == (512, 0.1, 0.99)
    assert method.labels == "soft"
    for field in ("epochs", "batch_size", "lr", "weight_decay", "sgd_momentum"):
        assert getattr(config, field) is not None
    config, method, _ = fill(TrainConfig.of(labels="ahcl", lr=1.0), image_set(), 32)
    assert (method.labels, config.numbers["labels"], config.lr) == ("ahcl", "ahcl", 1.0)
    config, _, _ = fill(TrainConfig.of(epochs=1, num_splits=8), image_set(60), 32)
    assert config.batch_size == 56  # a multiple of the 8 splits of batch norm
    assert config.warmup_epochs == pytest.approx(0.1)


def test_defaults_follow_the_data():
    for statistics, size, name in (
        ("shapes", 32, "shapes"),
        ("cifar100", 32, "cifar100"),
        ("tiny-imagenet", 64, "tiny-imagenet"),
        ("imagenet", 32, "cifar10"),  # a folder without published constants, small images
        ("imagenet", 224, "imagenet"),
    ):
        assert defaults_for("ascl", image_set(8, size, statistics), size)[0] == name
    for size, statistics, given, side in (
        (96, "stl10", None, 64),  # as ASCL and ReSSL have it
        (96, "stl10", 96, 96),
        (64, "tiny-imagenet", None, 64),
        (32, "cifar10", None, 32),
        (16, "shapes", None, 16),  # never larger than the images
        (96, "imagenet", None, 96),  # a set without defaults of its own
    ):
        for method in ("ascl", "ressl"):
            config = TrainConfig(method=method, image_size=given)
            assert view_side(image_set(8, size, statistics), config) == side


def test_stl10_is_trained_on_at_64_pixels(tmp_path, capsys):
    for part, count in (("train", 20), ("test", 10), ("unlabeled", 20)):
        (tmp_path / f"{part}_X.bin").write_bytes(bytes(count * 3 * 96 * 96))
        (tmp_path / f"{part}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
    assert main(["--data", str(tmp_path), "--arch", "resnet_tiny", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["defaults"] == "stl10" and plan["config"]["image_size"] == 64
    assert "40 images, 96x96" in plan["images"] and "10 images, 96x96" in plan["evaluation"]


UNFIT = [
    (dict(batch_size=1024), "--batch-size 1024: larger than the data, which has 512 images"),
    (dict(batch_size=100, num_splits=8), "--batch-size 100: must be a multiple of --num-splits 8"),
    (dict(batch_size=8, num_splits=8), "--batch-size 8: leaves one image in each of --num-splits"),
    (dict(num_neighbors=513), "--num-neighbors 513: more than the rows of --queue-size 512"),
    (dict(warmup_epochs=5.0, epochs=4), "--warmup-epochs 5.0: longer than the run"),
    (dict(accumulate=3), "--accumulate 3: --batch-size 64 must divide into equal parts"),
    (dict(accumulate=32, num_splits=8), "--accumulate 32: .* of a multiple of --num-splits 8"),
    (dict(optimizer="adamw", sgd_momentum=0.9), "--sgd-momentum 0.9: does not apply"),
]


@pytest.mark.parametrize("settings, message", UNFIT, ids=[str(given) for given, _ in UNFIT])
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        fill(TrainConfig.of(**settings), image_set(), 32)


def test_did_you_mean():
    assert did_you_mean("resnet81", ["resnet18", "vit"]) == "; did you mean resnet18?"
    assert did_you_mean("zzz", ["resnet18"]) == ""


REFUSED = {
    # flags that do not exist
    "--epoch 3": "unknown flag --epoch; did you mean --epochs?",
    "--batch_size 3": "unknown flag --batch_size; did you mean --batch-size?",
    "-epochs 3": "unknown flag -epochs; did you mean --epochs?",
    "--epochs 3 --xyzzy=1": "unknown flag --xyzzy",
    "--no-overwrite": "unknown flag --no-overwrite; did you mean --overwrite?",
    "--epochs 3 4": "unexpected '4'",
    # values that cannot be read
    "--epochs 1.5": "--epochs 1.5: must be a whole number",
    "--lr fast": "--lr fast: must be a number",
    "--fused=yes": "--fused: takes no value",
    # values out of range: of the run, and of the method, in its own words
    "--epochs 0": "--epochs 0: must be at least 1",
    "--lr 0": "--lr 0.0: must be above 0",
    "--lr nan": "--lr nan: must be a finite number",
    "--seed 9223372036854775808": "must be at most 9223372036854775807",
    "--queue-size 0": "--queue-size 0: must be at least 1",
    "--num-neighbors -1": "--num-neighbors -1: must be in [0, queue_size=",
    "--queue-size 64 --num-neighbors 65": "--num-neighbors 65: must be in [0, queue_size=64]",
    "--method snclr --queue-size 3": "--num-neighbors 5: must be in [0, queue_size=3]",
    "--momentum 1.5": "--momentum 1.5: must be in [0, 1]",
    "--temperature 0": "--temperature 0.0: must be positive and finite",
    "--method snclr --threshold": "--threshold True: belongs to the code form, got form='paper'",
    "--method snclr --positiveness-scale 0": "--positiveness-scale 0.0: must be above 0",
    # names
    "--method ascd": "--method ascd: must be one of ascl, snclr, ",
    "--labels softt": "must be one of soft, ahcl, hard, normal; did you mean soft?",
    "--device cdua": "--device cdua: must be auto, cpu, cuda or cuda:N; did you mean cuda?",
    "--device cuda:99": "--device cuda:99: ",
    "--arch resnet_tin": "did you mean resnet_tiny?",
    "--data=": "--data '': must not be empty",
    "--momentum-schedule cosin": "must be one of constant, cosine; did you mean cosine?",
    # combinations
    "--fused --backend reference": "--fused: backend reference is not fused",
    "--no-fused --backend cpu": "--no-fused means --backend reference",
    "--resume x --overwrite": "--overwrite: cannot be combined with --resume",
    "--resume x --out y": "--out y: cannot be combined with --resume",
    "--data shapes:256 --knn-k 257": "--knn-k 257: more than the 256 images that can vote",
    "--data shapes:256 --arch vit_tiny --image-size 37": "--arch vit_tiny: ",
}


def refused(line: str, capsys) -> str:
    """What the command says of a wrong line, in three lines at most; the first of them."""
    assert main(line.split()) == 2, line
    error = capsys.readouterr().err
    assert 1 <= len(error.splitlines()) <= 3 and "Traceback" not in error, line
    return error.splitlines()[0]


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_flags_are_refused_in_three_lines(line: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert REFUSED[line] in refused(line, capsys)
    assert list(tmp_path.iterdir()) == []


def wrong_lines() -> list[str]:
    """For every flag: misspelt, without its value, of the wrong type, and out of its range."""
    lines = []
    for name, rules in settings_of("ascl").items():
        flag, kind = flag_of(name), rules.kind
        middle = len(flag) // 2 + 1
        lines += [f"{flag[:middle] + flag[middle + 1 :]} 1", f"{flag}x 1"]
        if kind is bool:
            lines += [f"{flag}=1", f"{flag} 1"]
            continue
        lines += [flag, f"{flag} --seed 1"]
        if kind is str:
            lines += [f"{flag}="] + [f"{flag} nonsense"] * bool(rules.choices)
            continue
        lines += [f"{flag} one", f"{flag}=", f"{flag} 1 2"]
        lines += [f"{flag} inf"] if kind is float else []
        for bound, step in (("at_least", -1), ("above", 0), ("at_most", 1)):
            if getattr(rules, bound) is not None:
                lines.append(f"{flag} {getattr(rules, bound) + step}")
    return lines


def foreign_lines() -> list[str]:
    """For every method: each flag of the others that it does not have, with a right value."""
    values = {int: " 1", float: " 0.5", str: " none", bool: ""}
    return [
        f"--seed 3 {flag_of(name)}{values[rules.kind]} --method {method}"
        for method in METHODS
        for other in METHODS
        for name, rules in method_settings(other).items()
        if name not in method_settings(method)
    ]


def test_hundreds_of_wrong_lines_end_in_three_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines, foreign = set(wrong_lines()), set(foreign_lines())
    assert len(lines) >= 300 and len(foreign) >= 40
    for line in lines:
        first = refused(line, capsys)
        assert line.split()[0].split("=")[0] in first or "unexpected" in first, line
    for line in foreign:
        first = refused(line, capsys)
        assert first.startswith(f"softcl.train: {line.split()[2]}"), line
        assert f"does not apply to method {line.split()[-1]} (but to " in first, line
    assert list(tmp_path.iterdir()) == []


GROUPS = ("data", "model", "method", "optimisation", "run", "evaluation", "other")


def test_help_fits_the_terminal_and_the_screen(monkeypatch, capsys):
    def shown(line: str, columns: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stopped:
            main(line.split())
        assert stopped.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        # What is to be typed is as long as the interpreter's path, which nobody can break.
        rest = [line for line in lines if not line.startswith("usage: ")]
        assert max(map(len, rest)) <= min(columns, 100)
        return lines

    for columns, most in ((60, 70), (100, 36), (200, 36)):
        lines = shown("--epochs 3 --help", columns)
        assert len(lines) <= most and "--help method" in "\n".join(lines)
        assert all(flag_of(name) in "\n".join(lines) for name in settings_of("ascl"))
    for method in METHODS:
        for group in GROUPS:
            lines = shown(f"--method {method} --help {group}", 100)
            assert lines[0].startswith(group) and 2 < len(lines) <= 45
    assert main(["--help", "modle"]) == 2
    assert "did you mean model?" in capsys.readouterr().err


def test_a_config_file_repeats_a_run(tmp_path):
    given = dict(lr=0.25, epochs=3, out="x", max_steps=5, method="snclr", threshold=False)
    stored = TrainConfig.of(**given, num_neighbors=4, fused=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": stored.to_dict(), "device": "cpu"}))
    again = TrainConfig.of(**parse_flags(["--config", str(path), "--epochs", "7"]))
    assert again == stored.changed(epochs=7, out=None, max_steps=None)
    yaml = tmp_path / "own.yaml"
    yaml.write_text("method: snclr  # paper\nlr: 1e-3\nweight_decay: 0.1\nthreshold: no\n")
    assert parse_flags(["--config", str(yaml), "--form", "code"]) == {
        **{"method": "snclr", "lr": 1e-3, "weight_decay": 0.1, "threshold": False},
        "form": "code",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a JSON or YAML file"),
        ("[1]", "holds no settings"),
        ('{"config": {"epoch": 3}}', "--epoch 3: unknown setting; did you mean epochs?"),
        ('{"config": {"epochs": "3"}}', "--epochs '3': must be of type int"),
        ("method: moco\nlabels: soft", "--labels soft: does not apply to method moco (but to ascl"),
    ],
)
def test_wrong_config_files(tmp_path, capsys, text: str, message: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: No such file or directory" in capsys.readouterr().err
