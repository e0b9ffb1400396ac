"""Scenes: figures of the set `shapes` with boxes and masks, written as a COCO folder.

A scene has one to four figures of any classes, some of which hide parts of others, on a cloudy
ground. Scene `index` of a part is a function of the part and the index alone. A figure's mask is
what is seen of it; one of which less than a quarter is seen is not listed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from softcl.data.shapes import CLASSES, FIGURES, PATTERNS
from softcl.files import replace_file

SIDE = 64
TRAIN_SIZE, TEST_SIZE = 400, 200
MOST_FIGURES = 4
RADIUS = (8.0, 15.0)  # pixels
LEAST_SEEN = 0.25


def draw_scene(part: str, index: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Pixels (SIDE, SIDE, 3) uint8, and of each figure its class and its mask (SIDE, SIDE) bool."""
    draw = np.random.default_rng([index, part == "train"])
    rows, columns = np.meshgrid(*(np.arange(SIDE, dtype=np.float32) + 0.5,) * 2, indexing="ij")
    ground = draw.uniform(0.4, 0.6)
    slope = draw.uniform(-0.001, 0.001, 2)
    image = (ground + slope[0] * rows + slope[1] * columns)[..., None].repeat(3, axis=2)
    figures: list[tuple[int, np.ndarray, int]] = []
    for _ in range(draw.integers(1, MOST_FIGURES + 1)):
        label, radius = int(draw.integers(len(CLASSES))), draw.uniform(*RADIUS)
        y, x = draw.uniform(radius / 2, SIDE - radius / 2, 2)
        angle = draw.uniform(-np.pi / 6, np.pi / 6)
        right, down = (columns - x) / radius, (rows - y) / radius
        across = right * np.cos(angle) + down * np.sin(angle)
        along = down * np.cos(angle) - right * np.sin(angle)
        distance = FIGURES[CLASSES[label]](across, along)
        coverage = np.clip(0.5 - distance * radius, 0, 1)[..., None]
        pattern = PATTERNS[str(draw.choice(list(PATTERNS)))](across, along)
        pattern = np.clip(pattern, 0, 1)[..., None]
        light = ground + draw.choice((-1, 1)) * draw.uniform(0.25, 0.4)
        hue = 0.08 * np.cos(2 * np.pi * (draw.uniform() - np.arange(3) / 3))
        second = light + np.sign(light - ground) * 0.2
        color = light + hue + pattern * (second - light)
        image += coverage * (color - image)
        mask = distance < 0
        figures = [(its, seen & ~mask, whole) for its, seen, whole in figures]
        figures.append((label, mask, int(mask.sum())))
    image += draw.uniform(-0.04, 0.04, image.shape)
    shown = [(its, seen) for its, seen, whole in figures if seen.sum() >= LEAST_SEEN * whole > 0]
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), shown


def write_scenes(folder: Path, train: int = TRAIN_SIZE, test: int = TEST_SIZE) -> None:
    """Write folder/{train,val}/NNNNNN.png and folder/annotations/instances_{train,val}.json.

    What is there already is written anew, the same.

    Raises:
        OSError: naming the file.
    """
    from PIL import Image
    from pycocotools import mask as coco_mask

    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("val", test)):
        (folder / part).mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            pixels, figures = draw_scene(part, index)
            name = f"{index:06}.png"
            Image.fromarray(pixels).save(folder / part / name)
            images.append({"id": index, "file_name": name, "height": SIDE, "width": SIDE})
            for label, mask in figures:
                coded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotation: dict[str, Any] = {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": coco_mask.toBbox(coded).tolist(),
                    "area": float(coco_mask.area(coded)),
                    "iscrowd": 0,
                    "segmentation": {"size": [SIDE, SIDE], "counts": coded["counts"].decode()},
                }
                annotations.append(annotation)
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        file = folder / "annotations" / f"instances_{part}.json"
        replace_file(file, json.dumps(content).encode())
