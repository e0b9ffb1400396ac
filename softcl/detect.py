"""``python -m softcl.detect SPEC``: how good a backbone is for detection and segmentation.

torchvision's Faster R-CNN (--task boxes) or Mask R-CNN (--task masks) with a feature pyramid is
trained on a set with boxes, all of it, and judged by COCO's average precision. SPEC is a run, a
file of weights, or timm:NAME[.TAG], as --init of softcl.train takes it, or "random".

Schedules are Detectron2's: 1x is 90,000 steps of 16 images of COCO, 12 epochs; the rate is 0.02 for
16 images and in proportion for others, rises over the first 1,000 steps (a tenth, of fewer), and is
divided by 10 after 2/3 and 8/9 of the steps; 2x is twice as long. SGD with momentum 0.9 and weight
decay 1e-4, images mirrored or not.

Without --data the images are generated: scenes of figures, see softcl/detection/scenes.py. A
command that was stopped goes on when it is given again, to the same bits.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcl.command import (
    CommandParser,
    carry_out,
    check_path,
    check_range,
    check_ranges,
    from_flag,
    need,
)
from softcl.data import batch_indices
from softcl.data.image_set import printable
from softcl.detection.model import build_detector, train_mode
from softcl.detection.scenes import SIDE, write_scenes
from softcl.detection.sets import (
    DetectionSet,
    TrainingScenes,
    average_precision,
    load_detection,
    read_image,
)
from softcl.distributed import World
from softcl.errors import ConfigError, DataError, RunError
from softcl.files import check_folder, replace_file, user_path
from softcl.finetune import RANDOM, load_weights
from softcl.train.checkpoint import (
    NETWORKS,
    check_content,
    read_checkpoint,
    write_checkpoint,
)
from softcl.train.parallel import StopRequest, StopVote
from softcl.train.parts import resolve_device
from softcl.train.step import derived_seed

PROG = "softcl.detect"
SCENES = "scenes"
SCHEDULES = {"1x": 12, "2x": 24}  # epochs
RATE, BATCH, WARMUP, DROPS = 0.02, 16, 1000, (2 / 3, 8 / 9)
CHECKPOINT, RESULT, PICTURE, ROWS = "last.pt", "result.json", "detections.png", "metrics.jsonl"
ENTRIES = {"detector": dict, "optimizer": dict, "step": int, "loss": float, "settings": dict}
SAVED_EVERY = 300.0  # seconds
SHOWN, SHOWN_SCORE = 12, 0.5  # images of the picture; a detection's least score there
# What scenes take of what COCO has: small images, few objects.
USUAL = {"image_size": 800, "channels": 256, "regions": 512, "batch_size": 16}
OF_SCENES = {"image_size": SIDE, "channels": 64, "regions": 64, "batch_size": 8}


def build_parser() -> CommandParser:
    parser = CommandParser(
        PROG, "SPEC --out FOLDER [flags]", __doc__.splitlines()[0].partition(": ")[2]
    )
    add = parser.add_argument
    # fmt: off
    add("spec", metavar="SPEC", help=f"a run, a file of weights, timm:NAME[.TAG], or {RANDOM}")
    add("--out", required=True, metavar="FOLDER", help="checkpoint, scores and a picture")
    add("--data", default=SCENES, metavar="FOLDER",
        help=f"COCO's JSON or Pascal VOC's folders (default: {SCENES}, which are generated)")
    add("--task", choices=("boxes", "masks"), default="boxes", metavar="NAME",
        help="boxes or masks (default: boxes)")
    add("--schedule", choices=SCHEDULES, default="1x", metavar="NAME",
        help="1x or 2x (default: 1x)")
    add("--epochs", type=int, metavar="N", help="in place of the schedule's 12 or 24")
    add("--batch-size", type=int, metavar="N",
        help=f"images of all processes (default: {USUAL['batch_size']}; scenes 8)")
    add("--lr", type=float, default=RATE, metavar="X",
        help=f"for {BATCH} images (default: {RATE})")
    add("--image-size", type=int, metavar="N",
        help=f"shorter side in pixels (default: {USUAL['image_size']}; scenes {SIDE})")
    add("--channels", type=int, metavar="N",
        help=f"of the pyramid (default: {USUAL['channels']}; scenes 64)")
    add("--regions", type=int, metavar="N",
        help=f"of an image, for the heads (default: {USUAL['regions']}; scenes 64)")
    add("--freeze-norms", action="store_true", help="keep the backbone's batch norms as they are")
    add("--arch", metavar="NAME", help="the backbone, of weights that do not name it")
    add("--network", choices=NETWORKS, default="student", metavar="NAME",
        help="of a run: student or teacher (default: student)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, default=2, metavar="N",
        help="processes that decode images; 0: none (default: 2)")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """

    def command() -> int:
        options = build_parser().read(sys.argv[1:] if argv is None else argv)
        _check(options)
        need("detection", "torchvision", "PIL")
        try:
            import pycocotools  # noqa: F401
        except ImportError as error:
            reason = 'detection needs pycocotools: pip install "softcl[detect]"'
            raise ImportError(reason) from error
        return detect(options)

    return carry_out(PROG, command)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be used before anything is read, and fill in what is left open.

    Raises:
        ConfigError: naming the flag.
    """
    check_ranges(
        options, epochs=(1, None), batch_size=(1, None), image_size=(32, 4096),
        channels=(8, 4096), regions=(4, 4096), seed=(0, None), workers=(0, 256),
    )  # fmt: skip
    check_range("lr", options.lr, above=0.0)
    for name in ("data", "out"):
        check_path(name, getattr(options, name))
    with from_flag("out"):
        check_folder(user_path(options.out))
    for name, value in (OF_SCENES if options.data == SCENES else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.epochs is None:
        options.epochs = SCHEDULES[options.schedule]


def detect(options: argparse.Namespace) -> int:
    """Train, judge and write everything; tell about it line by line."""
    world = World.start(options.device != "cpu" and torch.cuda.is_available())
    device = resolve_device(options.device, world)
    out = user_path(options.out)
    if options.batch_size % world.size:
        reason = f"must be a multiple of the {world.size} processes"
        raise ConfigError("batch_size", options.batch_size, reason)
    world.on_main_process(lambda: out.mkdir(parents=True, exist_ok=True))
    train, test = world.together(lambda: load_sets(options, out, world))
    weights = load_weights(options.spec, options.image_size, options)
    torch.manual_seed(derived_seed(options.seed, "detector"))
    detector = build_detector(
        weights,
        len(train.classes),
        options.image_size,
        masks=options.task == "masks",
        channels=options.channels,
        regions=options.regions,
    ).to(device)
    if not world.alone and device.type == "cuda":
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    run = DetectorRun(detector, train, options, world, device, out)
    if world.is_main_process:
        print(f"backbone   {weights.arch}, weights {weights.spec}")
        for name, images in (("train", train), ("test", test)):
            print(f"{name:10} {images.describe()}")
            for note in images.notes:
                print(f"           {note}")
        at = f", from step {run.step}" if run.step else ""
        print(f"training   {run.total} steps of {options.batch_size} images{at}", flush=True)
    with StopRequest(prog=PROG) as stop:
        code = run.train(stop)
    if code is None:
        world.on_main_process(lambda: finish(run, test, weights.spec, options))
    world.close()
    return code or 0


def load_sets(
    options: argparse.Namespace, out: Path, world: World
) -> tuple[DetectionSet, DetectionSet]:
    """What is learned from and what is judged on.

    Raises:
        DataError: one cannot be read, or the classes differ.
    """
    folder = user_path(options.data)
    if options.data == SCENES:
        folder = out / SCENES
        world.on_main_process(lambda: write_scenes(folder))
    masks = options.task == "masks"
    with from_flag("data"):
        train = load_detection(folder, "train", masks).learnable()
        test = load_detection(folder, "test", masks)
    if train.classes != test.classes:
        raise DataError(f"{test.name}: its classes are not those of {train.name}")
    both = {scene.file for scene in train.scenes} & {scene.file for scene in test.scenes}
    if both:
        reason = f"{len(both)} of its images are learned from too, as {printable(min(both))}"
        raise DataError(f"{test.name}: {reason}")
    if len(train) < options.batch_size:
        reason = f"larger than the {len(train)} images that are learned from"
        raise ConfigError("batch_size", options.batch_size, reason)
    return train, test


def learning_rate(step: int, total: int, peak: float) -> float:
    """Of a step from 0: linear from a thousandth, then `peak`, then divided by 10 twice."""
    warmup = min(WARMUP, max(total // 10, 1))
    if step < warmup:
        return peak * (0.001 + 0.999 * step / warmup)
    return peak / 10 ** sum(step >= math.floor(share * total) for share in DROPS)


def as_it_is(batch: Any) -> Any:
    """DataLoader's collation: none."""
    return batch


def leave_signals(_: int) -> None:
    """In a process that decodes: the one that trains decides when it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class DetectorRun:
    """The training of a detector, which a checkpoint in its folder takes up where it was.

    Attributes:
        step, total: steps done, and of the whole run.
        loss: the sum over the steps of this epoch, on the device.
    """

    def __init__(
        self,
        detector: nn.Module,
        train: DetectionSet,
        options: argparse.Namespace,
        world: World,
        device: torch.device,
        out: Path,
    ) -> None:
        self.detector, self.images, self.options = detector, train, options
        self.world, self.device, self.out = world, device, out
        train_mode(detector, options.freeze_norms)
        trained = [p for p in detector.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.per_epoch = len(train) // options.batch_size
        self.step, self.total = 0, options.epochs * self.per_epoch
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.settings = {k: v for k, v in vars(options).items() if k not in ("device", "workers")}
        self.settings["images"] = len(train)
        self.settings.pop("out")
        if (out / CHECKPOINT).exists():
            self._resume()
        self.parallel = detector
        if not world.alone:
            places = [device] if device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(detector, device_ids=places)

    def _resume(self) -> None:
        stored = read_checkpoint(self.out / CHECKPOINT)
        check_content(self.out / CHECKPOINT, stored, ENTRIES)
        if stored["settings"] != self.settings:
            changed = [k for k in self.settings if stored["settings"].get(k) != self.settings[k]]
            reason = f"holds a run with another {', '.join(changed)}; name another --out"
            raise RunError(f"{self.out}: {reason}")
        self.detector.load_state_dict(stored["detector"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.step = stored["step"]
        self.loss += stored["loss"]

    def save(self) -> None:
        """From here a later command goes on."""
        content = {
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "loss": float(self.loss),
            "settings": self.settings,
        }
        write_checkpoint(self.out / CHECKPOINT, content)

    def _wanted(self) -> Iterator[list[tuple[int, bool]]]:
        """This process's images of every step from here, and whether each is mirrored."""
        o, world = self.options, self.world
        for step in range(self.step, self.total):
            indices = batch_indices(
                len(self.images), o.batch_size, o.seed, *divmod(step, self.per_epoch)
            )
            generator = torch.Generator().manual_seed(derived_seed(o.seed, step, "mirror"))
            mirrored = torch.rand(o.batch_size, generator=generator) < 0.5
            pairs = zip(indices.tolist(), mirrored.tolist(), strict=True)
            yield list(pairs)[world.rank :: world.size]

    def train(self, stop: StopRequest) -> int | None:
        """Go on to the end; returns the exit code of a stop that was asked for.

        Raises:
            RunError: the loss is not finite any more.
        """
        dataset = TrainingScenes(self.images.scenes, self.options.task == "masks")
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=self._wanted(),
            num_workers=self.options.workers,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals,
        )
        vote, first = StopVote(self.world, stop), self.step
        started = saved = time.monotonic()
        for pairs in loader:
            if isinstance(pairs, DataError):
                raise pairs
            self.loss += self._one_step(pairs)
            self.step += 1
            if self.step % self.per_epoch == 0:  # the device is read once an epoch
                self._report(float(self.loss) / self.per_epoch, started, first)
                self.loss.zero_()
            asked = vote.asked()
            due = time.monotonic() - saved > SAVED_EVERY and self.world.alone
            if self.world.is_main_process and (due or asked or self.step % self.per_epoch == 0):
                self.save()
                saved = time.monotonic()
            if asked and self.step < self.total:
                return vote.settle()
        vote.settle()  # the last one, which nothing waits for
        return None

    def _one_step(self, pairs: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> torch.Tensor:
        o = self.options
        # What torchvision samples of the regions comes from PyTorch's own generator.
        torch.manual_seed(derived_seed(o.seed, self.step, "regions", self.world.rank))
        rate = learning_rate(self.step, self.total, o.lr * o.batch_size / BATCH)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = [image.to(self.device) for image, _ in pairs]
        targets = [{k: v.to(self.device) for k, v in target.items()} for _, target in pairs]
        loss = sum(self.parallel(images, targets).values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _report(self, loss: float, started: float, first: int) -> None:
        epoch = self.step // self.per_epoch
        if not math.isfinite(loss):
            raise RunError(f"the loss of epoch {epoch} is {loss}; try a lower --lr")
        if self.world.is_main_process:
            speed = (self.step - first) * self.options.batch_size / (time.monotonic() - started)
            print(f"epoch {epoch:3}  loss {loss:.4f}  {speed:.1f} images/s", flush=True)
            with open(self.out / ROWS, "a") as rows:
                rows.write(json.dumps({"step": self.step, "epoch": epoch, "loss": loss}) + "\n")


# --------------------------------------------------------------------------------------- judging


def finish(run: DetectorRun, test: DetectionSet, spec: str, options: argparse.Namespace) -> None:
    """Judge, and write scores and picture."""
    found = find_objects(run.detector, test, run.device, masks=options.task == "masks")
    scores = {"boxes": average_precision(test, found, "bbox")}
    if options.task == "masks":
        scores["masks"] = average_precision(test, found, "segm")
    for kind, its in scores.items():
        print(f"{kind:10} {'  '.join(f'{name} {100 * x:.1f}' for name, x in its.items())}")
    content = {"weights": spec, **run.settings, "steps": run.total, "scores": scores}
    replace_file(run.out / RESULT, (json.dumps(content, indent=2) + "\n").encode())
    draw(run.out / PICTURE, test, found)
    print(f"done       in {run.out}: {RESULT}, {PICTURE}, {CHECKPOINT}")


@torch.no_grad()
def find_objects(
    detector: nn.Module, test: DetectionSet, device: torch.device, *, masks: bool
) -> list[dict[str, Any]]:
    """What a detector finds on every scene, as `average_precision` takes it."""
    import numpy as np
    from pycocotools import mask as coco_mask

    detector.eval()
    found = []
    for scene in test.scenes:
        (its,) = detector([read_image(scene).to(device)])
        row = {"boxes": its["boxes"].cpu(), "labels": its["labels"].cpu() - 1}
        row["scores"] = its["scores"].cpu()
        if masks:
            solid = (its["masks"][:, 0] > 0.5).cpu().numpy().astype(np.uint8)
            row["masks"] = [coco_mask.encode(np.asfortranarray(mask)) for mask in solid]
        found.append(row)
    return found


def draw(path: Path, test: DetectionSet, found: Sequence[dict[str, Any]]) -> None:
    """Write a PNG of the first scenes with what was found on them."""
    import numpy as np
    from PIL import Image
    from pycocotools import mask as coco_mask
    from torchvision.transforms.functional import resize
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

    tiles = []
    for scene, its in list(zip(test.scenes, found, strict=True))[:SHOWN]:
        sure = (its["scores"] >= SHOWN_SCORE).nonzero().flatten()
        pixels = (read_image(scene) * 255).round().to(torch.uint8)
        if "masks" in its and len(sure):
            solid = np.stack([coco_mask.decode(its["masks"][place]) for place in sure.tolist()])
            pixels = draw_segmentation_masks(pixels, torch.from_numpy(solid).bool(), alpha=0.5)
        scale = 256 / max(scene.width, scene.height)
        pixels = resize(pixels, [round(scene.height * scale), round(scene.width * scale)])
        if len(sure):
            words = [test.classes[label] for label in its["labels"][sure].tolist()]
            pixels = draw_bounding_boxes(pixels, its["boxes"][sure] * scale, words, width=2)
        tile = torch.full((3, 256, 256), 255, dtype=torch.uint8)
        tile[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        tiles.append(tile)
    sheet = make_grid(torch.stack(tiles), nrow=4, pad_value=255)
    stream = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(stream, format="PNG")
    replace_file(path, stream.getvalue())


if __name__ == "__main__":
    sys.exit(main())
