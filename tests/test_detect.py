"""``python -m softcl.detect``: COCO and VOC folders, average precision, training, going on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcl import detect
from softcl.detect import learning_rate, main
from softcl.detection.scenes import draw_scene, write_scenes
from softcl.detection.sets import (
    DetectionSet,
    Object,
    Scene,
    TrainingScenes,
    average_precision,
    coded_mask,
    decode_mask,
    load_detection,
)
from softcl.errors import DataError

pytest.importorskip("pycocotools")

SMALL = ["random", "--arch", "resnet_tiny", "--device", "cpu", "--workers", "0"]
SMALL += ["--epochs", "2", "--batch-size", "4", "--regions", "8", "--channels", "16"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A COCO folder of 12 + 6 scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=12, test=6)
    return folder


# ---- Scenes ----


def test_masks_are_what_is_seen():
    """Figures do not overlap in their masks, and each has pixels that differ from the ground."""
    for index in range(8):
        pixels, figures = draw_scene("train", index)
        assert 1 <= len(figures) <= 4
        stacked = np.stack([mask for _, mask in figures])
        assert stacked.sum(0).max() <= 1 and (stacked.sum((1, 2)) > 0).all()
        ground = np.median(pixels[~stacked.any(0)].mean(-1))
        for mask in stacked:
            assert abs(float(pixels[mask].mean()) - ground) > 20
    assert np.array_equal(draw_scene("val", 3)[0], draw_scene("val", 3)[0])
    assert not np.array_equal(draw_scene("val", 3)[0], draw_scene("train", 3)[0])


def test_scenes_come_back_as_they_were_drawn(scenes: Path):
    found = load_detection(scenes, "train", masks=True)
    assert len(found) == 12 and not found.notes
    for index, scene in enumerate(found.scenes):
        _, figures = draw_scene("train", index)
        for item, (label, mask) in zip(scene.objects, figures, strict=True):
            assert item.label == label and np.array_equal(decode_mask(item.mask, scene), mask)
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert item.box == tuple(map(float, box))


# ---- COCO and VOC ----


def coco(folder: Path, annotations: list[dict], images: int = 2, **changes) -> Path:
    """A COCO folder of white images of 20 x 10 pixels, the same for both parts."""
    (folder / "annotations").mkdir()
    for part in ("train", "val"):
        (folder / part).mkdir()
        for number in range(images):
            Image.new("RGB", (20, 10), "white").save(folder / part / f"{number}.jpg")
        listed = [
            {"id": 7 * n, "file_name": f"{n}.jpg", "height": 10, "width": 20} for n in range(images)
        ]
        content = {
            "images": listed,
            "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "ant"}],
            "annotations": [{"id": i, "image_id": 0, **a} for i, a in enumerate(annotations)],
        } | changes
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def test_gaps_boxes_at_the_border_and_crowds(tmp_path: Path):
    folder = coco(
        tmp_path,
        [
            {"category_id": 90, "bbox": [-5, 2, 10, 100]},
            {"category_id": 3, "bbox": [1, 1, 0, 5]},
            {"category_id": 3, "bbox": [30, 2, 5, 5]},
            {"category_id": 3, "bbox": [2, 2, 4, 4], "iscrowd": 1},
        ],
    )
    found = load_detection(folder, "train", masks=False)
    assert found.classes == ["ant", "zebra"] and found.notes == ["2 empty boxes left out"]
    first, crowd = found.scenes[0].objects
    assert (first.box, first.label) == ((0.0, 2.0, 5.0, 10.0), 1)
    assert crowd.ignored and len(found.learnable()) == 1
    image, target = TrainingScenes(found.scenes, masks=False)[0, True]
    assert target["boxes"].tolist() == [[15.0, 2.0, 20.0, 10.0]]
    assert target["labels"].tolist() == [2]
    assert image.shape == (3, 10, 20) and float(image.min()) > 0.99


def test_masks_as_polygons_and_as_runs_of_both_kinds(tmp_path: Path):
    square = [2, 3, 8, 3, 8, 7, 2, 7]
    scene = Scene(tmp_path / "x", 20, 10)
    wanted = np.zeros((10, 20), np.uint8)
    wanted[3:7, 2:8] = 1
    runs, value = [], 0
    for pixel in wanted.T.flatten():  # column by column, from a run of zeros on
        if pixel != value or not runs:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    coded = coded_mask([square], scene)
    for mask in ([square], {"size": [10, 20], "counts": runs}, coded):
        assert np.array_equal(decode_mask(mask, scene), wanted)
    for broken in (7, [[1, 2]], {"counts": [3]}, {"size": [10, 20], "counts": "garbage!!"}):
        with pytest.raises(DataError, match="a mask cannot be read"):
            decode_mask(broken, scene)
    with pytest.raises(DataError, match="its runs do not cover the image"):
        decode_mask({"size": [10, 20], "counts": [3]}, scene)
    with pytest.raises(DataError, match=r"its size is \[10, 20\], not \[10, 21\]"):
        decode_mask(coded, Scene(tmp_path / "x", 21, 10))


def test_missing_images_and_objects_without_masks_are_counted(tmp_path: Path):
    folder = coco(tmp_path, [{"category_id": 3, "bbox": [1, 1, 5, 5]}])
    (folder / "train" / "1.jpg").unlink()
    assert load_detection(folder, "train", masks=False).notes == ["1 missing images left out"]
    notes = load_detection(folder, "train", masks=True).notes
    assert notes == ["1 missing images left out", "1 objects without a mask left out"]


def voc(folder: Path) -> Path:
    (folder / "Annotations").mkdir()
    (folder / "JPEGImages").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for part, name, word, difficult in (("train", "a", "cat", 0), ("val", "b", "dog", 1)):
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{name}\n")
        Image.new("RGB", (20, 10)).save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(
            "<annotation><size><width>20</width><height>10</height><depth>3</depth></size>"
            f"<object><name>{word}</name><difficult>{difficult}</difficult><bndbox>"
            "<xmin>3</xmin><ymin>1</ymin><xmax>12</xmax><ymax>10</ymax></bndbox></object>"
            "</annotation>"
        )
    return folder


def test_voc_counts_pixels_from_one_and_knows_difficult(tmp_path: Path):
    folder = voc(tmp_path)
    train, test = (load_detection(folder, part, masks=False) for part in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.scenes[0].objects == [Object((2.0, 0.0, 12.0, 10.0), 0)]
    assert test.scenes[0].objects == [Object((2.0, 0.0, 12.0, 10.0), 1, None, True)]
    with pytest.raises(DataError, match="boxes and no masks"):
        load_detection(folder, "train", masks=True)


def test_voc_is_not_judged_on_what_is_learned_from(tmp_path: Path):
    """val.txt is a part of trainval.txt: they are never taken together."""
    folder = voc(tmp_path)
    lists = folder / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text("a\nb\n")

    def files(part: str) -> list[str]:
        found = load_detection(folder, part, masks=False)
        return [scene.file.stem for scene in found.scenes]

    assert (files("train"), files("test")) == (["a"], ["b"])
    for path in (folder / "Annotations" / "c.xml", folder / "JPEGImages" / "c.jpg"):
        path.write_bytes(path.with_stem("a").read_bytes())
    (lists / "test.txt").write_text("c\n")
    assert (files("train"), files("test")) == (["a", "b"], ["c"])
    (lists / "train.txt").unlink()
    (lists / "test.txt").unlink()
    with pytest.raises(DataError, match="neither trainval.txt and test.txt nor train.txt and val"):
        files("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no COCO annotations"),
        ('{"images": []}', "KeyError: 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "no image that can be used"),
        (
            '{"images": [{"id": 0, "file_name": "0.jpg", "height": 10, "width": 20}], '
            '"categories": [], '
            '"annotations": [{"image_id": 0, "category_id": 4, "bbox": [0, 0, 1, 1]}]}',
            "KeyError: 4",
        ),
    ],
)
def test_damaged_annotations_are_one_line(tmp_path: Path, content: str, message: str):
    folder = coco(tmp_path, [])
    (folder / "annotations" / "instances_train.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_detection(folder, "train", masks=False)


def test_an_image_of_another_size_is_refused(tmp_path: Path):
    folder = coco(tmp_path, [{"category_id": 3, "bbox": [1, 1, 5, 5]}])
    Image.new("RGB", (21, 10)).save(folder / "train" / "0.jpg")
    found = load_detection(folder, "train", masks=False)
    with pytest.raises(DataError, match="is 21x10, and 20x10 in its annotations"):
        TrainingScenes(found.scenes, masks=False)[0, False]


# ---- Average precision ----


def test_average_precision_of_five_images_by_hand():
    """One class, one object an image. Found, scores falling: hit, miss, hit, hit; one is not found.

    At IoU 0.5 precision over recall 1/5, 2/5, 3/5 is 1, 2/3, 3/4, made falling: 1, 3/4, 3/4. COCO
    reads it at recalls 0, 0.01, .., 1: 21 places at 1, 40 at 3/4, 40 at 0. The third hit has an IoU
    of 0.6: from 0.65 on it is a miss.
    """
    truth = DetectionSet("five", [], ["thing"])
    for _ in range(5):
        truth.scenes.append(Scene(Path("x"), 100, 100, [Object((10.0, 10.0, 20.0, 20.0), 0)]))
    exact, apart, loose = [10, 10, 20, 20], [50, 50, 60, 60], [10, 10, 16, 20]
    found = []
    for box, score in ((exact, 0.9), (apart, 0.8), (exact, 0.7), (loose, 0.6), (None, 0.0)):
        boxes = torch.tensor([box] if box else [], dtype=torch.float32).reshape(-1, 4)
        count = len(boxes)
        found.append(
            {"boxes": boxes, "labels": torch.zeros(count), "scores": torch.full((count,), score)}
        )
    ap50 = (21 + 40 * 3 / 4) / 101
    strict = (21 + 20 * 2 / 3) / 101  # recall 2/5
    scores = average_precision(truth, found, "bbox")
    assert scores["AP50"] == pytest.approx(ap50)
    assert scores["AP75"] == pytest.approx(strict)
    assert scores["AP"] == pytest.approx((3 * ap50 + 7 * strict) / 10)


def test_what_is_found_on_a_crowd_is_no_error():
    truth = DetectionSet("one", [Scene(Path("x"), 100, 100)], ["thing"])
    truth.scenes[0].objects += [Object((10.0, 10.0, 20.0, 20.0), 0)]
    truth.scenes[0].objects += [Object((50.0, 50.0, 90.0, 90.0), 0, None, True)]
    boxes = torch.tensor([[52.0, 52.0, 60.0, 60.0], [10.0, 10.0, 20.0, 20.0]])
    found = [{"boxes": boxes, "labels": torch.zeros(2), "scores": torch.tensor([0.9, 0.8])}]
    assert average_precision(truth, found, "bbox")["AP"] == pytest.approx(1.0)
    truth.scenes[0].objects.pop()
    assert average_precision(truth, found, "bbox")["AP"] == pytest.approx(0.5, abs=0.01)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan():
    truth = DetectionSet("one", [Scene(Path("x"), 9, 9, [Object((0.0, 0.0, 5.0, 5.0), 0)])], ["t"])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    assert average_precision(truth, [none], "bbox")["AP"] == 0.0
    some = {"boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": [0], "scores": [0.5]}
    truth.scenes[0].objects.clear()
    assert math.isnan(average_precision(truth, [some], "bbox")["AP"])


# ---- Training ----


def test_rate_by_detectron2s_schedule():
    rates = [learning_rate(step, 90_000, 0.02) for step in (0, 1000, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([2e-5, 0.02, 0.02, 0.002, 0.0002])


def test_a_run_that_was_stopped_ends_in_the_same_bits(scenes, tmp_path, monkeypatch, one_thread):
    line = [*SMALL, "--data", str(scenes), "--task", "masks", "--image-size", "64"]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    real, steps = detect.DetectorRun._one_step, []

    def stopped(run, pairs):
        steps.append(run.step)
        if len(steps) == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return real(run, pairs)

    monkeypatch.setattr(detect.DetectorRun, "_one_step", stopped)
    assert main([*line, "--out", str(tmp_path / "parts")]) == 130
    assert main([*line, "--out", str(tmp_path / "parts")]) == 0
    assert steps == [0, 1, 2, 3, 4, 5]
    first, second = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    for key, value in first["detector"].items():
        assert torch.equal(second["detector"][key], value), key
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "parts")]
    assert results[0] == results[1] and set(results[0]["scores"]) == {"boxes", "masks"}
    # The second run was stopped within an epoch, whose mean loss is of all its steps.
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1] and rows[0].count("\n") == 2
    with Image.open(tmp_path / "whole" / "detections.png") as picture:
        assert picture.width > 500


def test_another_run_in_the_folder_is_refused(scenes, tmp_path, capsys, one_thread):
    line = [*SMALL, "--data", str(scenes), "--image-size", "64", "--out", str(tmp_path)]
    assert main([*line, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main([*line, "--epochs", "1", "--lr", "0.1"]) == 1
    assert "holds a run with another lr; name another --out" in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes(b"broken")
    assert main([*line, "--epochs", "1"]) == 1
    assert "it has no checksum at its end" in capsys.readouterr().err


def test_a_trained_backbone_is_what_it_starts_from(whole: Path, scenes, tmp_path, one_thread):
    from softcl.train.checkpoint import load_backbone

    options = detect.build_parser().parse_args([str(whole), "--out", "x", "--data", str(scenes)])
    options.image_size = 64
    weights = detect.load_weights(options.spec, 64, options)
    detector = detect.build_detector(weights, 3, 64, masks=False, channels=8, regions=8)
    body = detector.backbone.body.state_dict()
    trained = load_backbone(whole).backbone.state_dict()
    assert {k for k in trained if not k.startswith("fc")} == set(body)
    assert torch.equal(body["layer4.0.conv2.weight"], trained["layer4.0.conv2.weight"])
    detect.train_mode(detector, freeze_norms=True)
    before = detector.backbone.body.bn1.running_mean.clone()
    target = {"boxes": torch.tensor([[5.0, 5, 30, 30]]), "labels": torch.tensor([1])}
    sum(detector([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
    assert torch.equal(detector.backbone.body.bn1.running_mean, before)
    assert detector.backbone.body.bn1.weight.grad is None
    assert detector.backbone.body.layer1[0].conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--arch", "vit_tiny"], 2, "detection takes ResNets"),
        (["--data", "nowhere"], 1, "nowhere: there is no such folder"),
        (["--batch-size", "13"], 2, "larger than the 12 images"),
        (["--epochs", "0"], 2, "--epochs 0: must be at least 1"),
        (["--lr", "1e30"], 1, "try a lower --lr"),
    ],
)
def test_refusals_in_one_line(scenes, tmp_path, capsys, one_thread, flags, code, message):
    line = [*SMALL, "--data", str(scenes), "--image-size", "64", "--out", str(tmp_path / "out")]
    assert main([*line, *flags]) == code
    error = capsys.readouterr().err.splitlines()
    assert message in error[0] and len(error) == (2 if code == 2 else 1)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_one_line(scenes, tmp_path, capsys, one_thread, workers):
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    for file in (folder / "train").iterdir():
        file.write_bytes(b"broken")
    line = [*SMALL, "--data", str(folder), "--image-size", "64", "--out", str(tmp_path / "out")]
    assert main([*line, "--workers", workers]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and ".png: cannot be read" in error[0] and "Caught" not in error[0]


def test_images_in_both_parts_are_refused(scenes, tmp_path, capsys, one_thread):
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    listed = folder / "annotations" / "instances_train.json"
    shutil.copyfile(listed, listed.with_name("instances_val.json"))
    shutil.rmtree(folder / "val")
    (folder / "train").rename(folder / "images")  # where both parts look
    line = [*SMALL, "--data", str(folder), "--image-size", "64", "--out", str(tmp_path / "out")]
    assert main(line) == 1
    assert "12 of its images are learned from too, as" in capsys.readouterr().err


def test_the_line_of_the_page_runs(whole, tmp_path, monkeypatch, one_thread):
    page = Path(__file__).parent.parent / "docs" / "training.md"
    text = page.read_text().partition("## Detection")[2]
    line = next(x for x in text.splitlines() if "softcl.detect runs/NAME" in x).partition("#")[0]
    line = line.split()[3:]
    line[line.index("runs/NAME")] = str(whole)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect, "write_scenes", lambda folder: write_scenes(folder, 8, 2))
    assert main([*line, "--epochs", "1", "--device", "cpu", "--workers", "0"]) == 0
    assert (tmp_path / "runs/NAME/detection/result.json").exists()
