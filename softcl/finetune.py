"""``python -m softcl.finetune SPEC``: how good a backbone is when few images have labels.

The whole network is trained, with a linear classifier on its features, on some of the labels; the
same network from random weights, trained alike, is the comparison. SPEC is a run, a file of
weights, or timm:NAME[.TAG], as --init of softcl.train takes it.

Recipe: SGD with Nesterov momentum 0.9 and no weight decay, rates of backbone and classifier apart,
divided by 5 after 0.6 and 0.8 of the epochs; random resized crops (8 % of the area or more) and
flips. Rates are SwAV's for 10 % of ImageNet (arXiv 2006.09882 and its eval_semisup.py; for 1 % it
has 0.02 and 5, which small networks do not survive), and so are the epochs, 20, unless that makes
fewer steps than there are with 1 % of ImageNet: then what makes 1,000.
--sweep tries BYOL's (arXiv 2006.07733, appendix C), one rate for both, on labels that are held out.
No test label chooses anything.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.command import CommandParser, carry_out, check_path, check_ranges, from_flag
from softcl.data import (
    FORMATS,
    VIEWS,
    DataError,
    ImageSet,
    load_dataset,
)
from softcl.data.views import RecipeTransform
from softcl.errors import ConfigError, RunError
from softcl.evaluate import CROP_SHARE, CROPPED_FROM, RESIZED
from softcl.evaluation.features import eval_mode, extract, sampled
from softcl.evaluation.probe import describe_tops, top_accuracies
from softcl.evaluation.subsets import choose, hold_out, raised, read_amount
from softcl.files import check_target, replace_file, user_path
from softcl.nn import build_backbone
from softcl.nn.pretrained import Pretrained
from softcl.nn.weights import IMAGENET
from softcl.train.checkpoint import NETWORKS
from softcl.train.images import labelled_views
from softcl.train.parts import resolve_device
from softcl.train.step import derived_seed
from softcl.train.weights import load_pretrained

PROG = "softcl.finetune"
RANDOM = "random"
EPOCHS, STEPS, BATCH, DROPS, DROP = 20, 1000, 256, (0.6, 0.8), 0.2
SWEPT_RATES, SWEPT_EPOCHS, HELD_OUT = (0.005, 0.01, 0.02, 0.05, 0.1), (30, 50), 0.2


class Rates(NamedTuple):
    """What a training has of numbers."""

    backbone: float
    head: float
    epochs: int


USUAL_RATES = (0.01, 0.2)  # of backbone and classifier


class Task(NamedTuple):
    """What all networks are trained and judged on.

    Attributes:
        train, test: labelled sets with the same classes.
        size: side of the views in pixels.
        crop_share: side of the centred square of a test image, of its shorter side.
        batch_size: N.
    """

    train: ImageSet
    test: ImageSet
    size: int
    crop_share: float
    batch_size: int
    device: torch.device
    seed: int


def build_parser() -> CommandParser:
    parser = CommandParser(
        PROG, "SPEC --data DATA [flags]", __doc__.splitlines()[0].partition(": ")[2]
    )
    add = parser.add_argument
    # fmt: off
    add("spec", metavar="SPEC", help=f"a run, a file of weights, timm:NAME[.TAG], or {RANDOM}")
    add("--data", required=True, metavar="DATA", help="labelled images, as softcl.train's --data")
    add("--test-data", metavar="DATA", help="images to be judged on (default: those of --data)")
    add("--labels", default="10%", metavar="AMOUNT",
        help="1%%, 25-per-class, or a file of names: what is learned from (default: 10%%)")
    add("--write-labels", metavar="FILE", help="write the names of the images learned from")
    add("--compare", action="append", metavar="SPEC",
        help="further weights, trained alike; may be repeated")
    add("--no-random", action="store_true", help="leave the random weights out")
    add("--lr-backbone", type=float, metavar="X",
        help=f"of the backbone (default: {USUAL_RATES[0]})")
    add("--lr-head", type=float, metavar="X",
        help=f"of the classifier (default: {USUAL_RATES[1]})")
    add("--epochs", type=int, metavar="N",
        help=f"over the labelled images (default: {EPOCHS}, or what makes {STEPS} steps)")
    add("--sweep", action="store_true",
        help="choose rate and epochs on a fifth of the labels, which is held out")
    add("--batch-size", type=int, metavar="N",
        help=f"(default: a tenth of the labelled images, 16 to {BATCH})")
    add("--image-size", type=int, metavar="N", help="side in pixels (default: the weights')")
    add("--crop-share", type=float, metavar="X",
        help="of a test image's shorter side (default: 0.875 from 224 px on, else 1)")
    add("--arch", metavar="NAME", help="the backbone, of weights that do not name it")
    add("--network", choices=NETWORKS, default="student", metavar="NAME",
        help="of a run: student or teacher (default: student)")
    add("--data-format", choices=FORMATS, default="auto", metavar="NAME",
        help="as softcl.train's (default: auto)")
    add("--limit", type=int, metavar="N", help="judge by at most so many test images")
    add("--seed", type=int, default=0, metavar="N", help="of labels, views and classifier")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, metavar="N", help="threads that decode images; 0: none")
    add("--save", metavar="FILE", help="write the network trained from SPEC (safetensors)")
    add("--out", metavar="FILE", help="write the results as JSON too")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags.
    """

    def command() -> None:
        options = build_parser().read(sys.argv[1:] if argv is None else argv)
        _check(options)
        results = finetune(options)
        if options.out is not None:
            replace_file(user_path(options.out), (json.dumps(results, indent=2) + "\n").encode())

    return carry_out(PROG, command)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be used before anything is read.

    Raises:
        ConfigError: naming the flag.
    """
    check_ranges(
        options, image_size=(8, 4096), epochs=(1, None), limit=(1, None), seed=(0, None),
        workers=(0, 256), batch_size=(2, None), crop_share=(0.1, 1.0), lr_backbone=(0.0, None),
        lr_head=(0.0, None),
    )  # fmt: skip
    for name in ("lr_backbone", "lr_head", "epochs"):
        if options.sweep and getattr(options, name) is not None:
            raise ConfigError(name, getattr(options, name), "is what --sweep chooses")
    read_amount(options.labels)
    check_path("data", options.data)
    for name in ("save", "out", "write_labels"):
        if getattr(options, name) is not None:
            check_path(name, getattr(options, name))
            with from_flag(name):
                check_target(user_path(getattr(options, name)))


def finetune(options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge each network, print line by line, and return everything."""
    device = resolve_device(options.device)
    starts = [options.spec, *(options.compare or [])]
    first = load_weights(options.spec, options.image_size, options)
    task = prepare(first, options, device)
    if not options.no_random and RANDOM not in starts:
        starts.append(RANDOM)
    rates = rates_of(options, task)
    print(f"backbone   {first.arch} at {task.size} px")
    print(f"train      {task.train.describe()}")
    print(f"test       {task.test.describe()}")
    results: dict[str, Any] = {
        "data": options.data,
        "labels": options.labels,
        "images": len(task.train),
        "test_images": len(task.test),
        "arch": first.arch,
        "image_size": task.size,
        "crop_share": task.crop_share,
        "batch_size": task.batch_size,
        "seed": options.seed,
        "results": [],
    }
    for spec in starts:
        started = time.perf_counter()
        weights = first
        if spec != options.spec:
            weights = load_weights(spec, first.image_size, options, like=first)
        found = best_rates(weights, task) if options.sweep else {"rates": rates}
        network = build_network(weights, task)
        losses = train(network, task, found["rates"])
        found |= judge(network, task.test, task) | {"train_loss": losses[-1]}
        found |= {"rates": found["rates"]._asdict(), "seconds": time.perf_counter() - started}
        results["results"].append({"weights": spec, **found})
        print(describe(spec, found), flush=True)
        if spec == options.spec and options.save is not None:
            save(network, first, task, options)
    return results


def load_weights(
    spec: str, image_size: int | None, options: argparse.Namespace, like: Pretrained | None = None
) -> Pretrained:
    """The backbone of a command whose SPEC may be "random".

    Args:
        options: with arch, network and seed.
        like: what a random backbone is to be like; None for --arch.

    Raises:
        ConfigError: nothing names the backbone, or it cannot take images of this size.
        WeightsError: the weights cannot be read.
    """
    arch, size = options.arch, image_size
    if like is not None:
        arch, size = like.arch, like.image_size
    if spec != RANDOM:
        return load_pretrained(spec, size, arch, network=options.network)
    if arch is None:
        raise ConfigError("arch", "", f"is needed: {RANDOM} names no backbone")
    torch.manual_seed(derived_seed(options.seed, "init"))
    size = size or 224
    try:
        backbone = build_backbone(arch, size)
    except ValueError as error:
        raise ConfigError("arch", arch, str(error)) from error
    mean, std = IMAGENET if like is None else (like.mean, like.std)
    return Pretrained(spec, backbone, arch, size, mean, std, "", 0, (), (), ())


def prepare(weights: Pretrained, options: argparse.Namespace, device: torch.device) -> Task:
    """The labelled sets and how they are seen.

    Raises:
        DataError: one cannot be read, has no labels, or the classes differ.
    """
    size = weights.image_size
    share = options.crop_share or (CROP_SHARE if size >= CROPPED_FROM else 1.0)
    # Images that are cropped are stored larger, so that nothing is enlarged afterwards.
    given = {"image_size": round(size / share), "workers": options.workers}
    given["data_format"] = options.data_format
    with from_flag("data"):
        train = load_dataset(options.data, "train", **given)
    with from_flag("test_data" if options.test_data else "data"):
        test = load_dataset(options.test_data or options.data, "test", **given)
    for images in (train, test):
        if images.labels is None:
            raise DataError(f"{images.name}: no labels, which fine-tuning learns from")
        images.mean, images.std, images.statistics = weights.mean, weights.std, "the weights'"
    train, test = train.labelled(), test.labelled()
    if train.classes != test.classes:
        raise DataError(f"{test.name}: its classes are not those of {train.name}")
    amount = read_amount(options.labels)
    with from_flag("labels"):
        chosen = choose(train, amount, options.seed)
    if told := raised(train, amount):
        print(f"labels     {told}")
    if options.write_labels is not None:
        names = train.names
        lines = "".join(f"{names[place]}\n" for place in chosen.tolist())
        replace_file(user_path(options.write_labels), lines.encode())
    train = train.only(chosen)
    test = test.only(sampled(len(test), options.limit or len(test)))
    test.files = None  # seen whole
    batch = options.batch_size or min(max(len(train) // 10, 16), BATCH)
    if options.batch_size is not None and batch > len(train):
        reason = f"larger than the {len(train)} images that are learned from"
        raise ConfigError("batch_size", batch, reason)
    return Task(train, test, size, share, min(batch, len(train)), device, options.seed)


def rates_of(options: argparse.Namespace, task: Task) -> Rates:
    """The rates and epochs that the flags ask for."""
    epochs = max(EPOCHS, -(-STEPS // (len(task.train) // task.batch_size)))
    given, usual = (options.lr_backbone, options.lr_head, options.epochs), (*USUAL_RATES, epochs)
    return Rates(*(u if g is None else g for g, u in zip(given, usual, strict=True)))


# ---------------------------------------------------------------------------------------- training


class Network(nn.Module):
    """A backbone (N, 3, S, S) -> (N, F) and a linear classifier (N, F) -> (N, C)."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_network(weights: Pretrained, task: Task) -> Network:
    """A network of its own that starts from the weights; the classifier is the same for all."""
    torch.manual_seed(derived_seed(task.seed, "head"))
    network = Network(copy.deepcopy(weights.backbone), len(task.train.classes))
    return network.to(task.device).to(memory_format=torch.channels_last)


def train(network: Network, task: Task, rates: Rates) -> list[float]:
    """Train all of a network; returns the mean loss of every epoch.

    Raises:
        RunError: it is not finite any more.
    """
    images, size, batch = task.train, task.size, task.batch_size
    view = RecipeTransform(VIEWS["weak"], RESIZED, size, images.mean, images.std)
    groups = [
        {"params": list(network.backbone.parameters()), "lr": rates.backbone},
        {"params": list(network.head.parameters()), "lr": rates.head},
    ]
    optimizer = torch.optim.SGD(groups, lr=rates.head, momentum=0.9, nesterov=True)
    drops = [math.ceil(share * rates.epochs) for share in DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=DROP)
    network.train()
    total, losses = torch.zeros((), device=task.device), []
    per_epoch = len(images) // batch
    steps = labelled_views(images, view, batch, task.seed, task.device, 0, rates.epochs * per_epoch)
    for step, (views, labels) in enumerate(steps):
        epoch, within = divmod(step, per_epoch)
        loss = F.cross_entropy(network(views), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if within + 1 == per_epoch:  # the device is read once an epoch
            losses.append(float(total) / per_epoch)
            if not math.isfinite(losses[-1]):
                reason = f"the loss of epoch {epoch + 1} is {losses[-1]}; try lower rates"
                raise RunError(f"{reason} (--lr-backbone, --lr-head)")
            total.zero_()
            schedule.step()
    return losses


def judge(network: Network, images: ImageSet, task: Task) -> dict[str, float]:
    """top1 of images seen whole, and top5 where there are more than five classes."""
    indices, share = torch.arange(len(images)), task.crop_share
    with eval_mode(network):
        scores = extract(
            images, indices, network, task.size, task.device, normalize=False, crop_share=share
        )
    ranked = scores.topk(min(5, len(images.classes)), dim=1).indices
    return top_accuracies(ranked, images.labels.to(task.device), len(images.classes))


def best_rates(weights: Pretrained, task: Task) -> dict[str, Any]:
    """The pair of BYOL's grid that is best on labels that are held out, and all of them.

    Raises:
        DataError: a class has one labelled image alone.
    """
    try:
        rest, held = hold_out(task.train.labels.cpu(), HELD_OUT, task.seed)
    except ValueError as error:
        raise DataError(f"--sweep: {error}") from error
    images, chosen_by = task.train.only(rest), task.train.only(held)
    chosen_by.files = None
    part = task._replace(train=images, batch_size=min(task.batch_size, len(images)))
    tried = []
    for rate, epochs in itertools.product(SWEPT_RATES, SWEPT_EPOCHS):
        rates = Rates(rate, rate, epochs)
        network = build_network(weights, part)
        try:
            train(network, part, rates)
        except RunError:  # such a rate is not chosen
            tried.append((rates, 0.0))
            continue
        tried.append((rates, judge(network, chosen_by, part)["top1"]))
    best = max(tried, key=lambda pair: pair[1])[0]
    sweep = [{**rates._asdict(), "held_out_top1": top1} for rates, top1 in tried]
    return {"rates": best, "sweep": sweep}


def describe(spec: str, found: dict[str, Any]) -> str:
    """A line of results."""
    words = [describe_tops(found)]
    rates = found["rates"]
    words.append(f"{rates['epochs']} epochs, rates {rates['backbone']:g} and {rates['head']:g}")
    return f"{spec}: {', '.join(words)}, {found['seconds']:.0f} s"


def save(network: Network, weights: Pretrained, task: Task, options: argparse.Namespace) -> None:
    """Write backbone and classifier; softcl.train's --init reads the former."""
    from safetensors.torch import save as to_bytes

    metadata = {
        "format": "pt",
        "arch": weights.arch,
        "image_size": str(task.size),
        "mean": json.dumps(list(weights.mean)),
        "std": json.dumps(list(weights.std)),
        "classes": json.dumps(task.train.classes),
    }
    tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    replace_file(user_path(options.save), to_bytes(tensors, metadata))
    print(f"written    {options.save}")


if __name__ == "__main__":
    sys.exit(main())
