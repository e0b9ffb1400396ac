"""What a set of a million images costs before and while it is read: seconds and bytes.

    python bench/many_images.py --folder /tmp/million                # 1,000,000 members, 2.5 GB
    python bench/many_images.py --folder /tmp/some --images 10000

Writes tar shards of tiny JPEG files with classes where they are not there yet. Two processes one
after the other then start on them, the first one with an empty cache (FOLDER.cache), and read steps
in both orders. "bytes/image" is the memory of the process's own (not of mapped files, which the
system may take back) at its most before the first step, and after the last one, above what it had
before. Where pixels or labels are not those that were written, it stops.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from softcl.data import ImageSet, batch_indices, load_dataset  # noqa: E402
from softcl.data.decode import pillow, suffixes  # noqa: E402

SHARD, CLASSES, SIDE, BATCH = 5000, 1000, 8, 256


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def label_of(number: int) -> int:
    return number * 7919 % CLASSES


def cache_of(folder: Path) -> Path:
    """Beside the set: a folder that changes in it would make it another one."""
    return folder.with_name(f"{folder.name}.cache")


def write(folder: Path, images: int) -> None:
    """Shards of grey images whose value is that of their number."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for value in range(256):
        file = io.BytesIO()
        pillow().new("L", (SIDE, SIDE), value).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    for start in range(0, images, SHARD):
        with tarfile.open(folder / f"train-{start // SHARD:06d}.tar", "w") as shard:
            for number in range(start, min(start + SHARD, images)):
                label = str(label_of(number)).encode()
                for suffix, content in (("jpg", files[number % 256]), ("cls", label)):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def own_memory() -> int:
    """Bytes of this process that are no mapped file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """The largest memory of its own that this process has while the context lasts."""

    def __enter__(self) -> Peak:
        self.most, self._over = own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, own_memory())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.most = max(self.most, own_memory())


def check(images: ImageSet, indices: torch.Tensor) -> None:
    """Members are named by their numbers, which say what they hold."""
    pixels, wanted = images.batch(indices), indices % 256
    if (pixels.float().mean((1, 2, 3)) - wanted).abs().max() > 2:
        raise SystemExit("the pixels are not those that were written")
    if images.labels[indices].tolist() != [label_of(number) for number in indices.tolist()]:
        raise SystemExit("the labels are not those that were written")


def start(options: argparse.Namespace) -> None:
    suffixes()  # Pillow's own memory is not the set's
    torch.zeros(8).sum()
    before = own_memory()
    with Peak() as peak:
        began = time.perf_counter()
        given = {"memory_limit": 0, "image_size": SIDE, "cache": cache_of(options.folder)}
        images = load_dataset(str(options.folder), "train", **given)
        seconds = time.perf_counter() - began
    size = len(images)
    print(f"{size} images listed in {seconds:.2f} s, {(peak.most - before) / size:.0f} bytes/image")
    for name, shards in (("exact", ()), ("shards", images.listing.shards())):
        began = time.perf_counter()
        for step in range(min(options.steps, size // BATCH)):
            check(images, batch_indices(size, BATCH, 0, 0, step, shards))
            if step == 0:
                first, began = time.perf_counter() - began, time.perf_counter()
        rate = step * BATCH / (time.perf_counter() - began)
        used = (own_memory() - before) / size
        print(f"  {name}: first batch {first:.2f} s, {rate:.0f} images/s, {used:.0f} bytes/image")


def main() -> None:
    options = parse()
    if options.start:
        start(options)
        return
    if not any(options.folder.glob("*.tar")):
        write(options.folder, options.images)
    shutil.rmtree(cache_of(options.folder), ignore_errors=True)
    time.sleep(3)  # files that have just been written are not kept
    for name in ("first", "second"):
        print(f"{name} start:", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--start"], check=True)


if __name__ == "__main__":
    main()
