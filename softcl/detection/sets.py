"""Images with boxes, and with masks: COCO's JSON and Pascal VOC's folders.

COCO   annotations/instances_train*.json and instances_val*.json, or _annotations.coco.json in
       train/ and valid/ (or test/); the images in train*/ and val*/, images/ or beside the JSON
VOC    Annotations/*.xml, JPEGImages/, and ImageSets/Main/: trainval.txt and test.txt, or else
       train.txt and val.txt

Numbers of categories may have gaps. Boxes are cut at the image's border; those that are empty then
are left out, and so are images that are missing: both are counted. Crowds (COCO) and difficult
objects (VOC) are not learned from, and what is found there is no error (as iscrowd has it).
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcl.data.image_set import printable
from softcl.errors import DataError
from softcl.files import read_file

PARTS = {"train": ("train",), "test": ("val", "valid", "test", "minival")}
# val.txt is a part of trainval.txt.
VOC_LISTS = ({"train": "trainval", "test": "test"}, {"train": "train", "test": "val"})
METRICS = {"AP": 0, "AP50": 1, "AP75": 2}  # places among COCOeval's stats


@dataclass
class Object:
    """A box (x1, y1, x2, y2) in pixels, its class from 0 on, and its mask as COCO writes it."""

    box: tuple[float, float, float, float]
    label: int
    mask: Any = None
    ignored: bool = False


@dataclass
class Scene:
    """An image file and what is on it; width and height in pixels."""

    file: Path
    width: int
    height: int
    objects: list[Object] = field(default_factory=list)


@dataclass
class DetectionSet:
    """Scenes of one part, and the names of the classes.

    notes: lines worth printing about what was left out
    """

    name: str
    scenes: list[Scene]
    classes: list[str]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scenes)

    def learnable(self) -> DetectionSet:
        """The scenes that have something to learn from."""
        scenes = [s for s in self.scenes if any(not o.ignored for o in s.objects)]
        notes = list(self.notes)
        if len(scenes) < len(self.scenes):
            notes.append(f"{len(self.scenes) - len(scenes)} images without objects left out")
        return DetectionSet(self.name, scenes, self.classes, notes)

    def describe(self) -> str:
        """One line for a log."""
        boxes = sum(len(scene.objects) for scene in self.scenes)
        return f"{self.name}: {len(self)} images, {boxes} objects, {len(self.classes)} classes"


def load_detection(folder: Path, part: str, masks: bool) -> DetectionSet:
    """The part "train" or "test" of a COCO or Pascal VOC folder.

    Args:
        masks: each object that is learned from must have one.

    Raises:
        DataError: one line that names the path.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)}: there is no such folder")
    if (folder / "Annotations").is_dir():
        if masks:
            raise DataError(f"{printable(folder)}: Pascal VOC's XML has boxes and no masks")
        found = _read_voc(folder, part)
    else:
        found = _read_coco(_coco_file(folder, part), folder, masks)
    if not found.scenes:
        why = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise DataError(f"{found.name}: no image that can be used{why}")
    return found


class _Left(Counter):
    """What was left out, by the words that say so."""

    def notes(self) -> list[str]:
        return [f"{count} {what} left out" for what, count in self.items()]


def _clipped(box: Sequence[float], width: int, height: int, left: _Left) -> tuple | None:
    """A box cut at the border; None where nothing of it is left."""
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError):
        x1 = x2 = float("nan")
        y1 = y2 = x1
    cut = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if not (cut[2] - cut[0] > 0.0 and cut[3] - cut[1] > 0.0):  # NaN too
        left["empty boxes"] += 1
        return None
    return cut


# -------------------------------------------------------------------------------------------- COCO


def _coco_file(folder: Path, part: str) -> Path:
    for word in PARTS[part]:
        for pattern in (f"annotations/instances_{word}*.json", f"{word}*/_annotations.coco.json"):
            found = sorted(folder.glob(pattern))
            if found:
                return found[-1]  # of COCO's years the last, in both parts
    listed = ", ".join(f"annotations/instances_{word}*.json" for word in PARTS[part])
    raise DataError(f"{printable(folder)}: neither COCO's {listed} nor VOC's Annotations/ there")


def _read_coco(file: Path, root: Path, masks: bool) -> DetectionSet:
    try:
        content = json.loads(read_file(file))
        categories = {c["id"]: str(c["name"]) for c in content["categories"]}
        number = {known: place for place, known in enumerate(sorted(categories))}
        left, places = _Left(), _image_folders(file, root)
        scenes: dict[Any, Scene] = {}
        for image in content["images"]:
            paths = [place / image["file_name"] for place in places]
            path = next((path for path in paths if path.is_file()), None)
            if path is None:
                left["missing images"] += 1
                continue
            scenes[image["id"]] = Scene(path, int(image["width"]), int(image["height"]))
        for annotation in content["annotations"]:
            scene = scenes.get(annotation["image_id"])
            if scene is None:
                continue
            x, y, width, height = annotation["bbox"]
            box = _clipped((x, y, x + width, y + height), scene.width, scene.height, left)
            if box is None:
                continue
            crowd, mask = bool(annotation.get("iscrowd", 0)), annotation.get("segmentation")
            if masks and not mask and not crowd:
                left["objects without a mask"] += 1
                continue
            label = number[annotation["category_id"]]
            scene.objects.append(Object(box, label, mask or None, crowd))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no COCO annotations ({type(error).__name__}: {error})"
        raise DataError(f"{printable(file)}: {reason}") from error
    classes = [categories[known] for known in sorted(categories)]
    return DetectionSet(printable(file), list(scenes.values()), classes, left.notes())


def _image_folders(file: Path, root: Path) -> list[Path]:
    """Where the images of a JSON file may be."""
    name = file.stem.removeprefix("instances_")
    return [root / name, root / "images" / name, root / "images", file.parent, root]


# --------------------------------------------------------------------------------------------- VOC


def _read_voc(folder: Path, part: str) -> DetectionSet:
    lists = folder / "ImageSets" / "Main"
    pairs = [{part: lists / f"{word}.txt" for part, word in pair.items()} for pair in VOC_LISTS]
    pair = next((p for p in pairs if all(file.is_file() for file in p.values())), None)
    if pair is None:
        reason = "neither trainval.txt and test.txt nor train.txt and val.txt in ImageSets/Main"
        raise DataError(f"{printable(folder)}: {reason}")
    listed = pair[part]
    left, scenes = _Left(), []
    names: set[str] = set()
    for line in read_file(listed).decode("utf-8", "replace").split():
        image = folder / "JPEGImages" / f"{line}.jpg"
        annotation = folder / "Annotations" / f"{line}.xml"
        if not image.is_file() or not annotation.is_file():
            left["missing images"] += 1
            continue
        scene, labels = _read_xml(annotation, image, left)
        names |= set(labels)
        scenes.append((scene, labels))
    # Both parts must number the classes alike: those of all files, not of this part's.
    classes = sorted(names | _all_voc_names(folder))
    number = {name: place for place, name in enumerate(classes)}
    for scene, labels in scenes:
        for item, name in zip(scene.objects, labels, strict=True):
            item.label = number[name]
    return DetectionSet(printable(listed), [s for s, _ in scenes], classes, left.notes())


@functools.lru_cache(1)  # both parts ask for them
def _all_voc_names(folder: Path) -> frozenset[str]:
    names = set()
    for file in (folder / "Annotations").glob("*.xml"):
        with contextlib.suppress(ElementTree.ParseError, OSError):
            tree = ElementTree.fromstring(read_file(file))
            names |= {item.findtext("name", "") for item in tree.iter("object")}
    return frozenset(names)


def _read_xml(file: Path, image: Path, left: _Left) -> tuple[Scene, list[str]]:
    try:
        tree = ElementTree.fromstring(read_file(file))
        scene = Scene(image, int(tree.findtext("size/width")), int(tree.findtext("size/height")))
        labels = []
        for item in tree.iter("object"):
            x1, y1, x2, y2 = (
                float(item.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax")
            )
            # Pixels are counted from 1, and the last one belongs to the box.
            box = _clipped((x1 - 1, y1 - 1, x2, y2), scene.width, scene.height, left)
            if box is None:
                continue
            difficult = item.findtext("difficult", "0").strip() == "1"
            scene.objects.append(Object(box, 0, None, difficult))
            labels.append(item.findtext("name", ""))
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise DataError(f"{printable(file)}: no annotation of Pascal VOC ({error})") from error
    return scene, labels


# ------------------------------------------------------------------------------------ for training


class TrainingScenes(torch.utils.data.Dataset):
    """Map-style, over (index, mirrored): an image (3, H, W) in [0, 1] and torchvision's target."""

    def __init__(self, scenes: Sequence[Scene], masks: bool) -> None:
        self.scenes, self.masks = scenes, masks

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitems__(
        self, wanted: Sequence[tuple[int, bool]]
    ) -> list[tuple[Tensor, dict[str, Tensor]]] | DataError:
        """A batch; an error is returned, because DataLoader's processes put a traceback into it."""
        try:
            return [self[one] for one in wanted]
        except DataError as error:
            return error

    def __getitem__(self, wanted: tuple[int, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        index, mirrored = wanted
        scene = self.scenes[index]
        image = read_image(scene)
        objects = [item for item in scene.objects if not item.ignored]
        boxes = torch.tensor([item.box for item in objects]).reshape(-1, 4)
        target = {"boxes": boxes, "labels": torch.tensor([item.label + 1 for item in objects])}
        if self.masks:
            masks = [decode_mask(item.mask, scene) for item in objects]
            target["masks"] = torch.from_numpy(np.stack(masks))
        if mirrored:
            image = image.flip(2)
            x1, x2 = boxes[:, 0].clone(), boxes[:, 2].clone()
            boxes[:, 0], boxes[:, 2] = scene.width - x2, scene.width - x1
            if self.masks:
                target["masks"] = target["masks"].flip(2)
        return image, target


def read_image(scene: Scene) -> Tensor:
    """Pixels (3, H, W) in [0, 1], as they lie in the file: boxes are of those.

    Raises:
        DataError: it cannot be read, or has another size than its annotation says.
    """
    from PIL import Image

    try:
        with Image.open(scene.file) as stored:
            pixels = np.array(stored.convert("RGB"))
    except Exception as error:
        raise DataError(f"{printable(scene.file)}: cannot be read: {error}") from error
    if pixels.shape[:2] != (scene.height, scene.width):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        reason = f"is {size}, and {scene.width}x{scene.height} in its annotations"
        raise DataError(f"{printable(scene.file)}: {reason}")
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def coded_mask(mask: Any, scene: Scene) -> dict[str, Any]:
    """A mask as pycocotools codes it, from polygons, or from runs in either of COCO's forms.

    Raises:
        DataError: it is none of these.
    """
    from pycocotools import mask as coco_mask

    try:
        if isinstance(mask, list):
            return coco_mask.merge(coco_mask.frPyObjects(mask, scene.height, scene.width))
        if list(mask["size"]) != [scene.height, scene.width]:
            raise ValueError(f"its size is {mask['size']}, not {[scene.height, scene.width]}")
        if isinstance(mask["counts"], list):
            if sum(mask["counts"]) != scene.height * scene.width:
                raise ValueError("its runs do not cover the image")
            return coco_mask.frPyObjects(mask, scene.height, scene.width)
        coco_mask.decode(mask)  # or it would fail where nobody knows whose it is
        return mask
    except Exception as error:  # pycocotools' own kinds
        raise DataError(f"{printable(scene.file)}: a mask cannot be read: {error}") from error


def decode_mask(mask: Any, scene: Scene) -> np.ndarray:
    """(H, W) uint8, 1 on the object."""
    from pycocotools import mask as coco_mask

    return coco_mask.decode(coded_mask(mask, scene))


# ------------------------------------------------------------------------------------- evaluation


def average_precision(
    truth: DetectionSet, found: Sequence[dict[str, Any]], kind: str
) -> dict[str, float]:
    """AP, AP50 and AP75 by pycocotools, in [0, 1]; NaN where there is nothing to find.

    Args:
        found: of each scene "boxes" (n, 4) as x1, y1, x2, y2; "labels" (n,) from 0 on; "scores"
            (n,); and of kind "segm" "masks", coded.
        kind: "bbox" or "segm".
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, annotations, results = [], [], []
    for number, (scene, its) in enumerate(zip(truth.scenes, found, strict=True)):
        images.append({"id": number, "height": scene.height, "width": scene.width})
        for item in scene.objects:
            x1, y1, x2, y2 = item.box
            known = {"id": len(annotations) + 1, "image_id": number, "category_id": item.label}
            known |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            known["iscrowd"] = int(item.ignored)
            if kind == "segm":
                if not item.mask:
                    continue
                known["segmentation"] = coded_mask(item.mask, scene)
            annotations.append(known)
        for place, (x1, y1, x2, y2) in enumerate(its["boxes"].tolist()):
            result = {"image_id": number, "category_id": int(its["labels"][place])}
            result |= {"score": float(its["scores"][place]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            if kind == "segm":
                result["segmentation"] = its["masks"][place]
            results.append(result)
    if not results:
        return dict.fromkeys(METRICS, 0.0)
    categories = [{"id": place, "name": name} for place, name in enumerate(truth.classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = {"images": images, "annotations": annotations, "categories": categories}
        gold.createIndex()
        judge = COCOeval(gold, gold.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    scores = {name: float(judge.stats[place]) for name, place in METRICS.items()}
    return {name: score if score >= 0 else float("nan") for name, score in scores.items()}
