"""Fine-tuning and detection: an epoch of ours, and of a bare loop on the same batches.

    pytest bench/bench_downstream.py --benchmark-only

The bare loop has views, images and targets that were made before, and does forward, loss, backward
and the optimiser's step, as torchvision's own examples do: what ours takes longer is views,
sampling and book-keeping. One epoch of ours goes before each of its rounds; over_bare in the extra
information is the median of their ratios.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from bench.timing import measure
from softcl import detect, finetune
from softcl.data import make_shapes
from softcl.data.views import RecipeTransform
from softcl.detection.scenes import write_scenes
from softcl.detection.sets import TrainingScenes, load_detection
from softcl.distributed import ALONE
from softcl.finetune import RESIZED, VIEWS, Rates, Task
from softcl.train.images import labelled_views

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 20.0


def bench_finetune(benchmark):
    """512 images of 32 px, batches of 64, resnet_tiny."""
    images = make_shapes(512)
    task = Task(images, images, 32, 1.0, 64, DEVICE, 0)
    options = finetune.build_parser().parse_args(["random", "--data", "x", "--arch", "resnet_tiny"])
    network = finetune.build_network(finetune.load_weights("random", 32, options), task)
    view = RecipeTransform(VIEWS["weak"], RESIZED, 32, images.mean, images.std)
    batches = list(labelled_views(images, view, 64, 0, DEVICE, 0, 8))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, nesterov=True)

    def bare() -> None:
        network.train()
        for views, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(views), labels).backward()
            optimizer.step()

    timing = measure(
        benchmark, bare, lambda: finetune.train(network, task, Rates(1e-6, 1e-6, 1)),
        device=DEVICE.type, seconds=SECONDS,
    )  # fmt: skip
    if timing is not None:
        benchmark.extra_info["over_bare"] = round(1 / timing.over_ours, 3)


@pytest.mark.parametrize("task", ["boxes", "masks"])
def bench_detect(benchmark, tmp_path, task):
    """Eight steps of eight scenes, resnet_tiny."""
    write_scenes(tmp_path, train=64, test=1)
    line = ["random", "--arch", "resnet_tiny", "--out", str(tmp_path / "run"), "--task", task]
    options = detect.build_parser().parse_args([*line, "--epochs", "9999", "--workers", "0"])
    for name, value in detect.OF_SCENES.items():
        setattr(options, name, value)
    images = load_detection(tmp_path, "train", task == "masks")
    weights = detect.load_weights("random", options.image_size, options)
    detector = detect.build_detector(
        weights, len(images.classes), options.image_size,
        masks=task == "masks", channels=options.channels, regions=options.regions,
    ).to(DEVICE)  # fmt: skip
    run = detect.DetectorRun(detector, images, options, ALONE, DEVICE, tmp_path)
    dataset = TrainingScenes(images.scenes, task == "masks")
    batches = [
        [
            (image.to(DEVICE), {name: value.to(DEVICE) for name, value in target.items()})
            for image, target in map(dataset.__getitem__, pairs)
        ]
        for pairs in itertools.islice(run._wanted(), 8)
    ]
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-9, momentum=0.9, weight_decay=1e-4)

    def bare() -> None:
        for batch in batches:
            torch.manual_seed(0)
            loss = sum(detector([x for x, _ in batch], [dict(t) for _, t in batch]).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def ours() -> None:
        run.options.lr = 1e-9
        run.step = 0
        for pairs in itertools.islice(run._wanted(), 8):
            torch.manual_seed(0)
            run._one_step([dataset[pair] for pair in pairs])

    timing = measure(benchmark, bare, ours, device=DEVICE.type, seconds=SECONDS)
    if timing is not None:
        benchmark.extra_info["over_bare"] = round(1 / timing.over_ours, 3)
