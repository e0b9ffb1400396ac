"""The training command with every method: its recipe, its flags, its resumption."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from run_comparison import assert_same_run

from softcl.data import VIEWS, ImageSet
from softcl.methods import METHODS
from softcl.train.__main__ import main
from softcl.train.config import ConfigError, TrainConfig
from softcl.train.defaults import defaults_for, fill
from softcl.train.images import build_views
from softcl.train.parts import build_state

VARIANTS = {
    # SEED, which needs a teacher, has tests/test_seed.py.
    **{name: [] for name in METHODS if name != "seed"},
    "ascl byol": ["--form", "byol"],
    "snclr code": ["--form", "code"],
    "sce code": ["--form", "code", "--symmetric"],
    "sce keys": ["--use-keys"],
    "ressl crops": ["--crops", "3"],
    "reco mixup": ["--mix", "mixup"],
}


def image_set(count: int = 512, size: int = 32, statistics: str = "shapes") -> ImageSet:
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    return ImageSet(images, None, [], half, half, "none", statistics=statistics)


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_and_resumes_to_the_same_bits(variant, tmp_path, monkeypatch, one_thread, capsys):
    monkeypatch.chdir(tmp_path)
    name, flags = variant.split()[0], VARIANTS[variant]
    line = "--data shapes:64 --eval-data shapes:64 --image-size 16 --epochs 2 --batch-size 16 "
    line += "--queue-size 48 --projector-hidden 16 --projection-dim 8 --device cpu --knn-every 0 "
    line += "--max-steps 4 --checkpoint-every 2 --out whole"
    assert main(["--method", name, *flags, *line.split()]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"method {name} (defaults of 'shapes')" in text
    assert "projection dim 8" in text and "queue size 48" in text
    shutil.copytree("whole", "parts")
    assert main(["--resume", "parts/last-1.pt", "--max-steps", "4"]) == 0
    assert "resumed at step 2" in " ".join(capsys.readouterr().out.split())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_fills_a_configuration(name):
    """Each data set's, with every flag of the method's at its recipe's value."""
    known = importlib.import_module(METHODS[name].__module__).DEFAULTS
    for data, defaults in known.items():
        images = image_set(8192, defaults.image_size // 8, data.partition(":")[0])
        config, method, found = fill(
            TrainConfig(method=name, arch=defaults.arch), images, defaults.image_size
        )
        assert found == data and method == defaults.method
        assert (config.lr, config.batch_size) == (defaults.lr, defaults.batch_size)
        assert config.optimizer == defaults.optimizer


def test_a_vision_transformer_has_its_own_recipe_where_there_is_one():
    images = image_set(8, 28, "imagenet")
    assert defaults_for("snclr", images, 224, "moco3_vit_small")[0] == "imagenet:vit"
    assert defaults_for("snclr", images, 224, "resnet50")[0] == "imagenet"
    assert defaults_for("moco", images, 224, "moco3_vit_small")[0] == "imagenet"


def test_flags_override_the_recipe():
    given = dict(method="snclr", form="code", num_neighbors=3, temperature=0.5, queue_size=32)
    config, method, _ = fill(TrainConfig.of(**given), image_set(), 32)
    for name, value in given.items():
        if name != "method":
            assert getattr(method, name) == value == config.numbers[name]


WRONG = {
    "--method moco --labels soft": "--labels soft: does not apply to method moco (but to ascl)",
    "--method moco --use-keys": "--use-keys True: does not apply to method moco (but to r",
    "--method snclr --form byol": "--form byol: must be one of paper, code",
    "--method ressl --crops 9": "--crops 9: must be in [1, 5]",
    "--method reco --mix cutmx": "--mix cutmx: must be one of cutmix, mixup; did you mean",
    "--form byol --labels ahcl": "--labels ahcl: must be soft or normal in the byol form",
    "--student-view stron": "--student-view stron: must be one of strong, weak, byol_first",
    "--teacher-view weka": "did you mean weak?",
    "--method ressl --crops 2 --arch vit_tiny": "cannot take the method's crops of 27 px",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_flags_of_methods(line: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), "--data", "shapes:64"]) == 2
    assert WRONG[line] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_views_have_their_sizes_and_crops():
    config, method, _ = fill(TrainConfig.of(method="ressl", crops=5), image_set(), 32)
    views = build_views(method, image_set(), 32)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    sides = [
        views[name](images, torch.Generator().manual_seed(0)).shape[-1]
        for name in method.student_sees()
    ]
    assert sides == [32, 27, 23, 18, 14]
    with pytest.raises(ConfigError, match="must be one of"):
        broken = METHODS["moco"](teacher_view="loud")
        build_views(broken, image_set(), 32)
    for kind in METHODS.values():  # every recipe's views exist
        for defaults in importlib.import_module(kind.__module__).DEFAULTS.values():
            assert {view.recipe for view in defaults.method.views().values()} <= set(VIEWS)


def test_state_holds_what_the_method_names():
    for name, queues, heads, has_teacher in (
        ("reco", {"queue", "weak queue"}, set(), True),
        ("nnclr", {"queue"}, {"predictor"}, False),
        ("snclr", {"queue"}, {"predictor", "f1", "f2"}, True),
    ):
        config, method, _ = fill(TrainConfig(method=name), image_set(), 16)
        state = build_state(config, method, torch.device("cpu"))
        assert set(state.queues) == queues and set(state.heads) == heads
        assert bool(list(state.teacher.parameters())) == has_teacher
        trained = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in state.heads.parameters()} <= trained
        assert not trained & {id(p) for p in state.teacher.parameters()}
