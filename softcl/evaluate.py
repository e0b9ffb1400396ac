"""``python -m softcl.evaluate RUN``: how good a checkpoint's features are, on any labelled set.

Weighted k-NN, linear probes by SGD and by L-BFGS, and retrieval precision, from features that are
computed once; printed, and written as JSON with --out. RUN is a run folder (its best.pt, or else
its newest checkpoint) or a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.command import (
    CommandParser,
    carry_out,
    check_path,
    check_range,
    check_ranges,
    from_flag,
)
from softcl.data import FORMATS, VIEWS, DataError, ImageSet, Recipe, load_dataset
from softcl.data.views import PaddedCrop, RecipeTransform
from softcl.errors import ConfigError
from softcl.evaluation.features import extract, sampled
from softcl.evaluation.knn import (
    BANK_PIECE,
    DISTANCES,
    NUM_NEIGHBORS,
    TEMPERATURE,
    knn_predict,
)
from softcl.evaluation.probe import (
    ASCL,
    BATCH,
    EPOCHS,
    PROTOCOLS,
    TOLERANCE,
    Batches,
    Labelled,
    describe_tops,
    lbfgs_probe,
    sgd_probe,
    top_accuracies,
)
from softcl.evaluation.retrieval import retrieval_precision
from softcl.files import check_target, replace_file, user_path
from softcl.ops.call import COLDEST, HOTTEST
from softcl.train.checkpoint import NETWORKS, Stored, features_of, load_backbone
from softcl.train.images import labelled_views
from softcl.train.parts import resolve_device

MEASURES = ("knn", "lbfgs", "sgd", "retrieval")
PROG = "softcl.evaluate"
CROP_SHARE, CROPPED_FROM = 0.875, 224  # as papers evaluate on ImageNet
RESIZED = Recipe(scale=(0.08, 1.0), jitter=0.0, grayscale=0.0, blur=0.0)  # torchvision's own


def build_parser() -> CommandParser:
    parser = CommandParser(PROG, "RUN [flags]", __doc__.splitlines()[0].partition(": ")[2])
    add = parser.add_argument
    # fmt: off
    add("run", metavar="RUN", help="a run folder or a checkpoint")
    add("--data", metavar="SPEC", help="labelled images to learn from (default: the run's)")
    add("--test-data", metavar="SPEC", help="images to be judged on (default: those of --data)")
    add("--data-format", choices=FORMATS, metavar="NAME",
        help="of both, as softcl.train's (default: the run's for its data, else auto)")
    add("--measure", action="append", choices=MEASURES, metavar="NAME",
        help="knn, lbfgs, sgd or retrieval; may be repeated (default: all)")
    add("--network", choices=NETWORKS, default="student", metavar="NAME",
        help="student or teacher (default: student)")
    add("--image-size", type=int, metavar="N", help="side in pixels (default: the run's)")
    add("--crop-share", type=float, metavar="X",
        help="side of the centred square that is seen, of the images' shorter side "
        f"(default: {CROP_SHARE} from {CROPPED_FROM} px on: Resize 256, CenterCrop 224; else 1)")
    add("--knn-k", type=int, default=NUM_NEIGHBORS, metavar="N",
        help=f"neighbours that vote (default: {NUM_NEIGHBORS})")
    add("--knn-distance", choices=DISTANCES, default="cosine", metavar="NAME",
        help="cosine, or euclidean of raw features, each with one vote (default: cosine)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="X",
        help=f"of the vote by cosines (default: {TEMPERATURE})")
    add("--protocol", choices=PROTOCOLS, metavar="NAME",
        help="of the SGD probe: ascl, moco or sce, with that source's views in every epoch "
        "(default: ascl's numbers, on whole images)")
    add("--stored", action="store_true", help="with --protocol: whole images, computed once")
    add("--epochs", type=int, default=EPOCHS, metavar="N",
        help=f"of the SGD probe (default: {EPOCHS})")
    add("--lr", type=float, metavar="X", help="of the SGD probe (default: the protocol's)")
    add("--limit", type=int, metavar="N", help="use at most so many images of each set")
    add("--seed", type=int, default=0, metavar="N", help="of the probes (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, metavar="N", help="threads that decode images; 0: none")
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
        out = None if options.out is None else user_path(options.out)
        if out is not None:
            with from_flag("out"):
                check_target(out)
        results = evaluate(load_backbone(user_path(options.run), options.network), options)
        if out is not None:
            replace_file(out, (json.dumps(results, indent=2) + "\n").encode())

    return carry_out(PROG, command)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be used before anything is read.

    Raises:
        ConfigError: naming the flag.
    """
    check_ranges(
        options, image_size=(8, 4096), knn_k=(1, None), epochs=(1, None), limit=(2, None),
        workers=(0, 256), seed=(0, None),
    )  # fmt: skip
    check_range("temperature", options.temperature, at_least=COLDEST, at_most=HOTTEST)
    if options.lr is not None:
        check_range("lr", options.lr, above=0.0)
    if options.stored and options.protocol is None:
        raise ConfigError("stored", "", "goes with --protocol")
    if options.crop_share is not None:
        check_range("crop_share", options.crop_share, at_least=0.1, at_most=1.0)
    for name in ("data", "test_data", "out"):
        if getattr(options, name) is not None:
            check_path(name, getattr(options, name))


def evaluate(stored: Stored, options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print line by line, and return everything as one dictionary."""
    device = resolve_device(options.device)
    size = options.image_size or stored.config.image_size
    share = options.crop_share
    if share is None:
        share = CROP_SHARE if size >= CROPPED_FROM else 1.0
    # Images that are cropped are stored larger, so that nothing is enlarged afterwards.
    train, test = load_sets(stored, options, round(size / share))
    print(f"checkpoint {stored.path}, step {stored.content['step']}, {options.network}")
    print(f"train      {train.describe()}")
    print(f"test       {test.describe()}")
    started = time.perf_counter()
    backbone = features_of(stored.backbone, device).eval()
    parts = []
    for images in (train, test):
        indices = sampled(len(images), options.limit or len(images))
        rows = extract(images, indices, backbone, size, device, normalize=False, crop_share=share)
        parts.append(Labelled(rows, images.labels[indices].to(device)))
    print(f"features   {parts[0].rows.shape[1]} per image, {time.perf_counter() - started:.1f} s")
    unknown = int((~torch.isin(parts[1].labels, parts[0].labels)).sum())
    if unknown:
        where = f"{unknown} of {len(parts[1].rows)} test images"
        print(f"warning    {where} are of classes that have no image to learn from")
    results: dict[str, Any] = {
        "checkpoint": str(stored.path),
        "step": stored.content["step"],
        "network": options.network,
        "arch": stored.config.arch,
        "image_size": size,
        "crop_share": share,
        "train": {"name": train.name, "images": len(parts[0].rows)},
        "test": {"name": test.name, "images": len(parts[1].rows)},
    }
    for name in options.measure or MEASURES:
        started = time.perf_counter()
        if name == "sgd" and options.protocol is not None and not options.stored:
            learned = augmented(train, backbone, size, device, options)
        else:
            learned = parts[0]
        found = measure(name, learned, parts[1], len(train.classes), options)
        found["seconds"] = time.perf_counter() - started
        results[name] = found
        print(describe(name, found), flush=True)
    return results


def load_sets(stored: Stored, options: argparse.Namespace, size: int) -> tuple[ImageSet, ImageSet]:
    """The labelled sets to learn from and to be judged on.

    Raises:
        DataError: one cannot be read, has no labels, or the classes differ.
    """
    spec = options.data or stored.config.data
    own_format = "auto" if options.data else stored.config.data_format
    given = {"image_size": size, "workers": options.workers}
    other = options.test_data or (None if options.data else stored.config.eval_data)
    test_format = options.data_format or ("auto" if other else own_format)
    with from_flag("data"):
        train = load_dataset(spec, "train", data_format=options.data_format or own_format, **given)
        _check_labels(train, "--data")
    with from_flag("test_data" if other else "data"):
        test = load_dataset(other or spec, "test", data_format=test_format, **given)
        _check_labels(test, "--test-data" if other else "--data")
    for images in (train, test):
        # The network was trained on pixels normalised in one way.
        run_spec = stored.content.get("normalisation")
        if run_spec is not None:
            images.mean, images.std = map(tuple, run_spec)
    train, test = train.labelled(), test.labelled()
    if train.classes != test.classes:
        raise DataError(f"{test.name}: its classes are not those of {train.name}")
    return train, test


def _check_labels(images: ImageSet, flag: str) -> None:
    if images.labels is None:
        raise DataError(f"{images.name}: no labels: use {flag} to name labelled images")


def augmented(
    images: ImageSet,
    backbone: nn.Module,
    size: int,
    device: torch.device,
    options: argparse.Namespace,
) -> Batches:
    """The features of the protocol's views, anew in every epoch, in whole batches.

    The images left over, others in each epoch, sit that one out.
    """
    if options.limit is not None:
        images = images.only(sampled(len(images), options.limit))
    batch = min(BATCH, len(images))
    if PROTOCOLS[options.protocol].view == "padded":
        images = dataclasses.replace(images, files=None)  # whole images
        view = PaddedCrop(size, images.mean, images.std)
    else:
        view = RecipeTransform(VIEWS["weak"], RESIZED, size, images.mean, images.std)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        per_epoch = len(images) // batch
        steps = (epoch * per_epoch, (epoch + 1) * per_epoch)
        for views, labels in labelled_views(images, view, batch, options.seed, device, *steps):
            with torch.no_grad():
                rows = backbone(views).float()
            yield rows, labels

    return batches


def measure(
    name: str, train: Labelled | Batches, test: Labelled, classes: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One of MEASURES."""
    if name == "sgd":
        settings = {"seed": options.seed, "epochs": options.epochs, "rate": options.lr}
        protocol = ASCL if options.protocol is None else PROTOCOLS[options.protocol]
        found = sgd_probe(train, test, classes, protocol=protocol, **settings)
        return found | {"protocol": options.protocol, "stored": isinstance(train, Labelled)}
    if name == "lbfgs":
        return lbfgs_probe(train, test, classes, seed=options.seed)
    euclidean = name == "knn" and options.knn_distance == "euclidean"
    bank, queries = (part.rows if euclidean else unit(part.rows) for part in (train, test))
    if name == "retrieval":
        return retrieval_precision(queries, test.labels, bank, train.labels)
    k = min(options.knn_k, len(bank))
    ranked = knn_predict(
        queries,
        bank,
        train.labels,
        classes,
        num_neighbors=k,
        temperature=options.temperature,
        top=min(5, classes),
        distance=options.knn_distance,
        bank_piece=BANK_PIECE,
    )
    found = {**top_accuracies(ranked, test.labels, classes), "num_neighbors": k}
    if euclidean:
        return found | {"distance": "euclidean"}
    return found | {"temperature": options.temperature}


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


def describe(name: str, found: dict[str, Any]) -> str:
    """A line of results."""
    seconds = f"{found['seconds']:.1f} s"
    if name == "retrieval":
        shares = (f"@{k.rpartition('_')[2]} {v:.1%}" for k, v in found.items() if k != "seconds")
        return f"retrieval  precision {', '.join(shares)}, {seconds}"
    if name == "knn":
        votes = f"with {found['num_neighbors']} votes" + " by distance" * ("distance" in found)
        return f"k-NN       {describe_tops(found)} {votes}, {seconds}"
    train = f"train {found['train_top1']:.2%}"
    if name == "sgd":
        best = f"best {found['best_top1']:.2%} at epoch {found['best_epoch']}"
        return f"linear     SGD {describe_tops(found)} ({best}; {train}), {seconds}"
    penalty = f"penalty {found['penalty']:g}"
    if found["excess"] > TOLERANCE:
        penalty += f", not converged: objective within {found['excess']:.0e}"
    return f"linear     L-BFGS top-1 {found['top1']:.2%} ({penalty}; {train}), {seconds}"


if __name__ == "__main__":
    sys.exit(main())
