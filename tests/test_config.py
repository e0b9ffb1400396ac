"""The configuration, the flags derived from it, and how wrong ones are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from softcl.data import ImageSet
from softcl.methods import METHODS
from softcl.train import main
from softcl.training.build import view_side
from softcl.training.config import (
    ConfigError,
    TrainConfig,
    did_you_mean,
    field_names,
    first_difference,
    identity_hash,
    value_type,
)
from softcl.training.flags import build_parser, parse_flags
from softcl.training.settings import defaults_for, fill


def image_set(count: int = 512, size: int = 32, statistics: str = "shapes") -> ImageSet:
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    return ImageSet(images, None, [], half, half, "none", statistics=statistics)


def test_every_field_is_a_flag_and_every_flag_a_field():
    flags = {name for action in build_parser()._actions for name in action.option_strings}
    fields = {"--" + name.replace("_", "-") for name in field_names()}
    negated = {flag for flag in flags if flag.startswith("--no-")}
    assert flags - {"-h", "--help", "--config"} - negated == fields


def test_flags_give_typed_values_and_only_those_given():
    given = parse_flags(
        ["--lr", "1e-2", "--epochs=3", "--no-fused", "--overwrite", "--data", "shapes:9"]
    )
    assert given == {
        "lr": 0.01,
        "epochs": 3,
        "fused": False,
        "overwrite": True,
        "data": "shapes:9",
    }
    assert parse_flags([]) == {}
    assert parse_flags(["--fused"]) == {"fused": True}


def test_config_survives_json():
    config = TrainConfig(lr=0.1, epochs=3, warmup_epochs=0.5, fused=True, out="x")
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and identity_hash(again) == identity_hash(config)
    with pytest.raises(ConfigError, match=r"--epoch 3: unknown setting; did you mean epochs\?"):
        TrainConfig.from_dict({"epoch": 3})


def test_identity_covers_what_a_run_computes_and_nothing_else():
    config = TrainConfig()
    samples = {int: 7, float: 0.25, str: "cpu", bool: True}
    for field in dataclasses.fields(TrainConfig):
        value = (field.metadata["choices"] or [samples[value_type(field)]])[-1]
        if field.name == "resume" or value == getattr(config, field.name):
            continue
        if field.name == "image_size":
            value = 64
        changed = dataclasses.replace(config, **{field.name: value})
        same = identity_hash(changed) == identity_hash(config)
        assert same == field.metadata["may_change"], field.name
        assert first_difference(config, changed) == (None if same else field.name)


def test_settings_come_from_the_methods_defaults():
    config, method, name = fill(TrainConfig(), image_set(), 32)
    assert name == "shapes" and config.arch == "resnet_tiny"
    assert (config.queue_size, config.temperature, config.momentum) == (512, 0.1, 0.99)
    assert method.queue_size == 512 and method.rule().name == "adaptive_soft"
    assert all(
        getattr(config, field) is not None
        for field in ("epochs", "batch_size", "lr", "weight_decay", "sgd_momentum", "labels")
    )
    config, method, _ = fill(TrainConfig(labels="ahcl", queue_size=64, lr=1.0), image_set(), 32)
    assert (method.labels, method.queue_size, config.lr) == ("ahcl", 64, 1.0)
    assert method.rule().name == "adaptive_neighbors"


@pytest.mark.parametrize(
    "statistics, size, name",
    [
        ("shapes", 32, "shapes"),
        ("cifar100", 32, "cifar100"),
        ("tiny-imagenet", 64, "tiny-imagenet"),
        ("imagenet", 32, "cifar10"),  # a folder without published constants, small images
        ("imagenet", 224, "imagenet"),
    ],
)
def test_defaults_follow_the_data(statistics: str, size: int, name: str):
    assert defaults_for("ascl", image_set(8, size, statistics), size)[0] == name


@pytest.mark.parametrize(
    "size, statistics, given, side",
    [
        (96, "stl10", None, 64),  # as ASCL and ReSSL have it
        (96, "stl10", 96, 96),
        (64, "tiny-imagenet", None, 64),
        (32, "cifar10", None, 32),
        (16, "shapes", None, 16),  # never larger than the images
        (96, "imagenet", None, 96),  # a set without a recipe of its own
    ],
)
def test_views_have_the_size_of_the_recipe(size: int, statistics: str, given: int, side: int):
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


def test_defaults_shrink_to_small_data_and_short_runs():
    config, _, _ = fill(TrainConfig(epochs=1, num_splits=8), image_set(60), 32)
    assert config.batch_size == 56  # a multiple of the 8 splits of batch norm
    assert config.warmup_epochs == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 1024}, "--batch-size 1024: larger than the data, which has 512 images"),
        (
            {"batch_size": 100, "num_splits": 8},
            "--batch-size 100: must be a multiple of --num-splits 8",
        ),
        (
            {"batch_size": 8, "num_splits": 8},
            "--batch-size 8: leaves one image in each of --num-splits 8",
        ),
        ({"num_neighbors": 65, "queue_size": 64}, "--num-neighbors 65: more than the rows of"),
        ({"warmup_epochs": 5.0, "epochs": 4}, "--warmup-epochs 5.0: longer than the run"),
        ({"accumulate": 3}, "--accumulate 3: --batch-size 64 must divide into equal parts"),
        (
            {"accumulate": 32, "num_splits": 8},
            "--accumulate 32: .* of a multiple of --num-splits 8",
        ),
        ({"optimizer": "adamw", "sgd_momentum": 0.9}, "--sgd-momentum 0.9: does not apply"),
        ({"labels": "sofd"}, "--labels sofd: must be one of .*; did you mean soft"),
        ({"method": "asci"}, "--method asci: must be one of .*; did you mean ascl"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        fill(TrainConfig(**settings), image_set(), 32)


def test_a_field_of_another_method_is_refused(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Plain:
        temperature: float = 0.2

    monkeypatch.setitem(__import__("softcl.methods").methods.METHODS, "plain", Plain)
    with pytest.raises(ConfigError, match="--labels soft: does not apply to method plain"):
        fill(TrainConfig(method="plain", labels="soft"), image_set(), 32)


def test_did_you_mean():
    assert did_you_mean("resnet81", ["resnet18", "vit"]) == "; did you mean resnet18?"
    assert did_you_mean("zzz", ["resnet18"]) == ""


REFUSED = [
    # flags that do not exist
    ("--epoch 3", "unknown flag --epoch; did you mean --epochs?"),
    ("--batchsize 3", "unknown flag --batchsize; did you mean --batch-size?"),
    ("--batch_size 3", "unknown flag --batch_size; did you mean --batch-size?"),
    ("-epochs 3", "unknown flag -epochs; did you mean --epochs?"),
    ("--epochs 3 --xyzzy=1", "unknown flag --xyzzy"),
    ("--no-overwrite", "unknown flag --no-overwrite; did you mean --overwrite?"),
    ("--unfused", "unknown flag --unfused; did you mean --fused?"),
    ("shapes", "unexpected 'shapes'"),
    ("--epochs 3 4", "unexpected '4'"),
    # values that cannot be read
    ("--epochs", "--epochs: needs a value"),
    ("--epochs --lr 1", "--epochs: needs a value"),
    ("--epochs three", "--epochs three: must be a whole number"),
    ("--epochs 1.5", "--epochs 1.5: must be a whole number"),
    ("--lr fast", "--lr fast: must be a number"),
    ("--fused=yes", "--fused: takes no value"),
    # values out of range
    ("--epochs 0", "--epochs 0: must be at least 1"),
    ("--batch-size 1", "--batch-size 1: must be at least 2"),
    ("--queue-size 0", "--queue-size 0: must be at least 1"),
    ("--num-neighbors -1", "--num-neighbors -1: must be at least 0"),
    ("--lr -0.1", "--lr -0.1: must be above 0"),
    ("--lr 0", "--lr 0.0: must be above 0"),
    ("--lr nan", "--lr nan: must be a finite number"),
    ("--lr inf", "--lr inf: must be a finite number"),
    ("--weight-decay -1", "--weight-decay -1.0: must be at least 0"),
    ("--momentum 1.5", "--momentum 1.5: must be at most 1"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--teacher-temperature -1", "--teacher-temperature -1.0: must be above 0"),
    ("--image-size 4", "--image-size 4: must be at least 8"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--seed 9223372036854775808", "must be at most 9223372036854775807"),
    ("--knn-k 0", "--knn-k 0: must be at least 1"),
    ("--log-every 0", "--log-every 0: must be at least 1"),
    ("--max-steps 0", "--max-steps 0: must be at least 1"),
    ("--warmup-epochs -1", "--warmup-epochs -1.0: must be at least 0"),
    ("--num-splits 0", "--num-splits 0: must be at least 1"),
    # names
    ("--method ascd", "--method ascd: must be one of ascl, snclr, "),
    ("--labels softt", "must be one of soft, ahcl, hard, normal; did you mean soft?"),
    ("--backend tritom", "did you mean triton?"),
    ("--backend gpu", "--backend gpu: must be one of auto, cuda, triton, cpu, reference"),
    ("--device cdua", "--device cdua: must be auto, cpu, cuda or cuda:N; did you mean cuda?"),
    ("--device meta", "--device meta: must be auto, cpu, cuda or cuda:N"),
    ("--device cuda:99", "--device cuda:99: "),
    ("--arch resnet81", "--arch resnet81: unknown backbone; did you mean resnet"),
    ("--arch resnet_tin", "did you mean resnet_tiny?"),
    ("--data=", "--data '': must not be empty"),
    ("--optimizer sdg", "must be one of sgd, lars, adamw; did you mean sgd?"),
    ("--momentum-schedule cosin", "must be one of constant, cosine; did you mean cosine?"),
    # combinations
    ("--fused --backend reference", "--fused: backend reference is not fused"),
    ("--no-fused --backend cpu", "--no-fused means --backend reference"),
    ("--resume x --overwrite", "--overwrite: cannot be combined with --resume"),
    ("--resume x --out y", "--out y: cannot be combined with --resume"),
    ("--data shapes:256 --batch-size 512", "larger than the data, which has 256 images"),
    ("--data shapes:256 --knn-k 257", "--knn-k 257: more than the 256 images that can vote"),
    ("--data shapes:256 --arch vit_tiny --image-size 37", "--arch vit_tiny: "),
]


@pytest.mark.parametrize("line, message", REFUSED, ids=[line for line, _ in REFUSED])
def test_wrong_flags_are_refused_in_three_lines(
    line: str, message: str, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert 1 <= len(captured.err.splitlines()) <= 3
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_help_fits_the_terminal(columns: int, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    for name in field_names():
        assert "--" + name.replace("_", "-") in text


GROUPS = ("data", "model", "method", "optimisation", "run", "evaluation", "other")


@pytest.mark.parametrize("group", GROUPS)
def test_help_on_a_group_fits_a_screen(group: str, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main(["--epochs", "3", "--help", group])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(group) and 2 < len(lines) <= 40
    assert all(len(line) <= 100 for line in lines)


def test_the_overview_fits_a_screen_and_leads_to_the_rest(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    for line in ([], ["--epochs", "3"]):
        with pytest.raises(SystemExit):
            main([*line, "-h"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 36 and "--help data" in text
    with pytest.raises(SystemExit):
        main(["--help", "all"])
    everything = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"][:30] in " ".join(everything.split())
    assert main(["--help", "modle"]) == 2
    assert "did you mean model?" in capsys.readouterr().err


def wrong_lines() -> list[str]:
    """For every flag: misspelt, without its value, of the wrong type, and out of its range."""
    lines = []
    for field in dataclasses.fields(TrainConfig):
        flag, kind, rule = "--" + field.name.replace("_", "-"), value_type(field), field.metadata
        middle = len(flag) // 2 + 1
        misspelt = [flag[:middle] + flag[middle + 1 :], flag + "x", flag[1:], flag.upper()]
        lines += [f"{word} 1" for word in misspelt]
        if kind is bool:
            lines += [f"{flag}=1", f"{flag} 1"]
            continue
        lines += [flag, f"{flag} --seed 1"]
        if kind is str:
            lines.append(f"{flag}=")
            lines += [f"{flag} nonsense"] if rule["choices"] else []
            continue
        lines += [f"{flag} one", f"{flag}=", f"{flag} 1,5", f"{flag} 1 2"]
        lines += [f"{flag} {value}" for value in ("nan", "inf")] if kind is float else []
        for name, step in (("at_least", -1), ("above", 0), ("at_most", 1)):
            if rule[name] is not None:
                lines.append(f"{flag} {rule[name] + step}")
    return lines


def test_hundreds_of_wrong_lines_end_in_three_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = wrong_lines()
    assert len(set(lines)) >= 300
    for line in lines:
        assert main(line.split()) == 2, line
        captured = capsys.readouterr()
        error = captured.err.splitlines()
        assert 1 <= len(error) <= 3 and "Traceback" not in captured.err, line
        assert line.split()[0].split("=")[0] in error[0] or "unexpected" in error[0], line
    assert list(tmp_path.iterdir()) == []


def foreign_lines() -> list[str]:
    """For every method: each flag of the others that it does not have, with a right value."""
    lines = []
    for method, kind in METHODS.items():
        own = {field.name for field in dataclasses.fields(kind)}
        for field in dataclasses.fields(TrainConfig):
            group = field.metadata["group"].split(" ")[0]
            if group not in ("model", "method") or field.name in ("method", "arch", *own):
                continue
            flag = "--" + field.name.replace("_", "-")
            value = {int: " 1", float: " 0.5", str: " none", bool: ""}[value_type(field)]
            lines.append(f"--seed 3 {flag}{value} --method {method}")
    return lines


def test_flags_of_another_method_end_in_three_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = foreign_lines()
    assert len(lines) >= 40
    for line in lines:
        assert main(line.split()) == 2, line
        error = capsys.readouterr().err.splitlines()
        assert 1 <= len(error) <= 3 and error[0].startswith(f"softcl.train: {line.split()[2]}")
        assert f"does not apply to method {line.split()[-1]}" in error[0], line
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_repeats_a_run(tmp_path):
    stored = TrainConfig(lr=0.25, epochs=3, out="x", max_steps=5, labels="ahcl", fused=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": stored.to_dict(), "device": "cpu"}))
    given = parse_flags(["--config", str(path), "--epochs", "7"])
    again = TrainConfig(**given)
    assert again == dataclasses.replace(stored, epochs=7, out=None, max_steps=None)
    assert "out" not in given and "config" not in given


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a JSON file"),
        ("[1]", "holds no settings"),
        ('{"config": {"epoch": 3}}', "unknown setting epoch; did you mean epochs?"),
        ('{"config": {"epochs": "3"}}', "--epochs '3': must be of type int"),
        ('{"config": {"lr": -1.0}}', "--lr -1.0: must be above 0"),
    ],
)
def test_wrong_config_files(tmp_path, capsys, text: str, message: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: No such file or directory" in capsys.readouterr().err
