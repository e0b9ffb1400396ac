"""``python -m softcl.embed SPEC``: features of any folder of images, by any backbone.

SPEC is a run, a file of weights, or timm:NAME[.TAG], as --init of softcl.train takes it. Written
are, one row for an image, features, paths and labels; with --neighbors also each image's nearest
images and groups of near-duplicates. Images are read and features written in pieces; a command that
was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softcl.command import CommandParser, carry_out, check_ranges, report_for
from softcl.data import FORMATS, SPLITS, DataError, ImageSet, batches, center_view, load_dataset
from softcl.errors import ConfigError
from softcl.evaluation.neighbors import near_duplicates, nearest_of_each
from softcl.evaluation.table import check_suffix, write_table
from softcl.files import check_target, replace_file, user_path
from softcl.nn.pretrained import Pretrained
from softcl.nn.weights import WeightsError
from softcl.train.checkpoint import NETWORKS, features_of
from softcl.train.parts import resolve_device
from softcl.train.weights import load_pretrained

PROG = "softcl.embed"
SAVED_EVERY = 5.0  # seconds; what a kill loses
SHOWN_EVERY = 10.0
DUPLICATES = 0.98  # cosine
_PIXELS = 64 * 224 * 224  # of the images in a batch: their activations fit any machine
_PROGRESS, _ROWS, _KEPT, _LOCK = "progress.json", "rows.f32", "kept.i64", ".lock"


def build_parser() -> CommandParser:
    parser = CommandParser(
        PROG, "SPEC --data DATA --out FILE [flags]", __doc__.splitlines()[0].partition(": ")[2]
    )
    add = parser.add_argument
    # fmt: off
    add("spec", metavar="SPEC", help="a run, a file of weights, or timm:NAME[.TAG]")
    add("--data", required=True, metavar="DATA", help="images, as softcl.train's --data")
    add("--out", required=True, metavar="FILE", help="a .npz, .safetensors or .parquet file")
    add("--neighbors", type=int, metavar="K", help="write each image's K nearest others too")
    add("--duplicates", type=float, default=DUPLICATES, metavar="X",
        help=f"cosine from which neighbours are near-duplicates (default: {DUPLICATES})")
    add("--split", default="all", choices=SPLITS, metavar="NAME",
        help="train, test or all (default: all)")
    add("--data-format", choices=FORMATS, default="auto", metavar="NAME",
        help="as softcl.train's (default: auto)")
    add("--arch", metavar="NAME", help="the backbone, of weights that do not name it")
    add("--network", choices=NETWORKS, default="student", metavar="NAME",
        help="of a run: student or teacher (default: student)")
    add("--image-size", type=int, metavar="N", help="side in pixels (default: the weights')")
    add("--batch-size", type=int, metavar="N", help="images in a pass (default: by their size)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, metavar="N", help="threads that decode images; 0: none")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags, 130 stopped by Ctrl-C.
    """

    def command() -> None:
        options = build_parser().read(sys.argv[1:] if argv is None else argv)
        _check(options)
        embed(options)

    def report(_: BaseException, message: str, code: int) -> int:
        again = "; the same command goes on" if code == 130 else ""
        return report_for(PROG)(message + again, code)

    return carry_out(PROG, command, report=report)


def _check(options: argparse.Namespace) -> None:
    """Refuse what is out of range before anything is read.

    Raises:
        ConfigError: naming the flag.
    """
    check_ranges(
        options, image_size=(8, None), neighbors=(1, None), batch_size=(1, None), workers=(0, None)
    )
    if not -1 <= options.duplicates <= 1:
        raise ConfigError("duplicates", options.duplicates, "must be a cosine, in [-1, 1]")
    check_suffix(Path(options.out))
    check_target(user_path(options.out))


def embed(options: argparse.Namespace) -> None:
    """Read, compute and write everything; tell about it line by line."""
    device = resolve_device(options.device)
    weights = load_pretrained(
        options.spec, options.image_size, options.arch, network=options.network
    )
    images = load_dataset(
        options.data,
        options.split,
        image_size=weights.image_size,
        memory_limit=0,  # each image is needed once
        workers=options.workers,
        data_format=options.data_format,
    )
    if options.neighbors is not None and options.neighbors >= len(images):
        reason = f"there are {len(images)} images, and one is not its own neighbour"
        raise ConfigError("neighbors", options.neighbors, reason)
    first, *rest = weights.describe()
    print(f"weights    {first}")
    for line in rest:
        print(f"           {line}")
    print(f"backbone   {weights.arch} at {weights.image_size} px")
    images.mean, images.std, images.statistics = weights.mean, weights.std, "the weights'"
    print(f"data       {images.describe()}")
    out = user_path(options.out)
    width, batch_size = weights.backbone.num_features, options.batch_size
    if batch_size is None:
        batch_size = min(max(_PIXELS // weights.image_size**2, 1), 512)
    with closing(Scratch(out, _identity(weights, images, options), width)) as scratch:
        if scratch.read:
            print(f"resumed    at image {scratch.read:,} of {len(images):,}")
        extract_rows(images, weights, device, batch_size, scratch)
        for line in images.skipped[:3]:
            print(f"           skipped {line}")
        columns = _columns(images, scratch)
        if options.neighbors is not None:
            columns |= _neighbors(options, columns, scratch, out, device)
        write_table(out, columns, _metadata(weights, images, options))
        count = len(columns["features"])
        print(f"written    {out}: {count:,} images, {width} features, {', '.join(columns)}")
        shutil.rmtree(scratch.path)


def _identity(weights: Pretrained, images: ImageSet, options: argparse.Namespace) -> str:
    """Changes with whatever the rows depend on, but for the pixels in the files."""
    digest = hashlib.sha256()
    for key, value in weights.backbone.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    settings = [weights.arch, weights.image_size, weights.mean, weights.std, options.split]
    digest.update(json.dumps([settings, images.name, len(images), images.names]).encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- rows


class Scratch:
    """Rows on the disk, in the folder FILE.parts, from the first image to the end of the command.

    A folder that another command left there, of other weights or images, is started over.

    Attributes:
        width: F, numbers in a row.
        read: images that were seen.
        kept: rows that are there: an image that cannot be read has none.
    """

    def __init__(self, out: Path, identity: str, width: int) -> None:
        self.path, self.identity, self.width = out.with_name(f"{out.name}.parts"), identity, width
        self.read = self.kept = 0
        from filelock import FileLock, Timeout

        self.path.mkdir(exist_ok=True)
        self._lock = FileLock(self.path / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OSError(errno.EAGAIN, "another process writes there", str(self.path)) from None
        try:
            stored = json.loads((self.path / _PROGRESS).read_text())
            if stored["identity"] == identity:
                self.read, self.kept = int(stored["read"]), int(stored["kept"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a new one
        self._files = {}
        for name, width in ((_ROWS, 4 * self.width), (_KEPT, 8)):
            self._files[name] = open(self.path / name, "ab")
            self._files[name].truncate(self.kept * width)  # what came after the last `save`
        self._saved = time.monotonic()

    def add(self, rows: Tensor, kept: Tensor, read: int) -> None:
        """Rows (n, F) of the images kept (n,); `read` images were seen for them."""
        self._files[_ROWS].write(rows.float().cpu().contiguous().numpy().data)
        self._files[_KEPT].write(kept.contiguous().numpy().data)
        self.read, self.kept = self.read + read, self.kept + len(rows)
        if time.monotonic() - self._saved > SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """From here a later command goes on."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        content = {"identity": self.identity, "read": self.read, "kept": self.kept}
        replace_file(self.path / _PROGRESS, json.dumps(content).encode())
        self._saved = time.monotonic()

    def rows(self) -> np.ndarray:
        """(M, F) float32, on the disk."""
        return np.memmap(self.path / _ROWS, np.float32, "r", shape=(self.kept, self.width))

    def indices(self) -> np.ndarray:
        """(M,) int64: which image each row is of."""
        return np.fromfile(self.path / _KEPT, np.int64, self.kept)

    def new(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """An array of the caller's, on the disk."""
        return np.memmap(self.path / name, dtype, "w+", shape=shape)

    def close(self) -> None:
        """Let other commands go on from here."""
        for file in self._files.values():
            file.close()
        self._lock.release()


@torch.no_grad()
def extract_rows(
    images: ImageSet, weights: Pretrained, device: torch.device, batch_size: int, scratch: Scratch
) -> None:
    """Features of the images that are not in `scratch` yet, into it."""
    backbone: nn.Module = features_of(weights.backbone.eval(), device)
    total, first, size = len(images), scratch.read, weights.image_size
    started = shown = time.monotonic()
    order = torch.arange(first, total).split(batch_size) if first < total else ()
    try:
        for indices, pixels in batches(images, order, device=device):
            views = center_view(pixels, size, images.mean, images.std)
            rows = backbone(views.contiguous(memory_format=torch.channels_last))
            if not rows.isfinite().all():
                reason = f"gives features that are not finite, of images {scratch.read} and later"
                raise WeightsError(f"{weights.spec}: {reason}")
            good = _readable(images, indices)
            scratch.add(rows[good.to(rows.device)], indices[good], len(indices))
            if time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                pace = (scratch.read - first) / (shown - started)
                left = math.ceil((total - scratch.read) / pace)
                numbers = f"{pace:,.0f} images/s, {left} s left"
                print(f"           {scratch.read:,} of {total:,} images, {numbers}", flush=True)
    finally:
        scratch.save()
    if not scratch.kept:
        raise DataError(f"{images.name}: no image can be read")


def _readable(images: ImageSet, indices: Tensor) -> Tensor:
    """Which of the images were read; another one stood in for those that were not."""
    if images.resident:
        return torch.ones(len(indices), dtype=torch.bool)
    broken = images.images.unreadable
    return torch.tensor([index not in broken for index in indices.tolist()])


# -------------------------------------------------------------------------------------- columns


def _columns(images: ImageSet, scratch: Scratch) -> dict[str, Any]:
    indices, names = scratch.indices(), images.names
    columns = {"features": scratch.rows(), "paths": [names[index] for index in indices]}
    if images.labels is not None:
        columns["labels"] = images.labels.cpu().numpy().astype(np.int64)[indices]
    return columns


def _metadata(weights: Pretrained, images: ImageSet, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "weights": weights.spec,
        "arch": weights.arch,
        "image_size": weights.image_size,
        "mean": list(weights.mean),
        "std": list(weights.std),
        "data": options.data,
        "classes": images.classes,
    }


def _neighbors(
    options: argparse.Namespace,
    columns: dict[str, Any],
    scratch: Scratch,
    out: Path,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """The columns of the nearest images; near-duplicates in a file of their own too."""
    count, started = len(columns["features"]), time.perf_counter()
    k = min(options.neighbors, count - 1)
    neighbors = scratch.new("neighbors.i64", np.int64, (count, k))
    similarities = scratch.new("similarities.f32", np.float32, (count, k))
    unit = scratch.new("unit.f32", np.float32, columns["features"].shape)
    nearest_of_each(columns["features"], unit, neighbors, similarities, device)
    groups = near_duplicates(neighbors, similarities, options.duplicates)
    members, found = np.nonzero(groups >= 0)[0], int(groups.max(initial=-1)) + 1
    print(
        f"neighbors  {k} of each image in {time.perf_counter() - started:.1f} s; {len(members):,} "
        f"images in {found:,} groups of near-duplicates (cosine {options.duplicates:g} or more)"
    )
    if found:
        listed = out.with_name(f"{out.name}.duplicates.tsv")
        members = members[np.argsort(groups[members], kind="stable")]
        lines = (f"{groups[row]}\t{columns['paths'][row]}\n" for row in members)
        replace_file(listed, "".join(lines).encode())
        print(f"           {listed}")
    return {"neighbors": neighbors, "similarities": similarities, "groups": groups}


if __name__ == "__main__":
    sys.exit(main())
