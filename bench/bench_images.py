"""Two random crops of each JPEG file of a batch, from the disk's cache to uint8 in memory.

    pytest bench/bench_images.py --benchmark-only [--threads 2] [-k "1-thread and PIL"]

The files are generated: noise whose spectrum falls like a photograph's, 500 x 375 pixels and about
110 KB each, as ImageNet's mean is. Every contender's crops are first held to Pillow's, of the same
boxes. A round is a batch of 32 files; one of ours goes before each of another contender's, and the
row says how much longer that took. What only decodes shows how far ours is from its decoder.

With more threads than one (--threads, or as many as torch takes) everything runs a second time:
images_per_s_per_core in the extra information shows how it scales.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.image_peers import DECODERS, PEERS, Boxes, absent, make_peer
from bench.machine import conditions
from bench.table import Row
from bench.timing import measure
from softcl.data import load_dataset
from softcl.data.image_set import CropOrder, Cut
from softcl.data.recipe import CROP_COLUMNS, RECIPE, draw_box
from softcl.train.parts import keep_freed_pages

HEIGHT, WIDTH, SIDE, BATCH = 375, 500, 224, 32
QUALITY = 94  # gives about 110 KB
SECONDS, MOST_ROUNDS = 10.0, 60
OURS = "softcl"
# In levels of 8 bits, off Pillow's, which rounds between the axes.
MOST_LEVELS, MEAN_LEVELS = 1, 0.25


def pytest_generate_tests(metafunc):
    threads = metafunc.config.getoption("--threads") or torch.get_num_threads()
    names = lambda count: f"{count}-thread{'s' * (count > 1)}"  # noqa: E731
    metafunc.parametrize("threads", sorted({1, threads}), ids=names)
    metafunc.parametrize("contender", (OURS, *PEERS), ids=lambda x: x.replace(" ", "-"))


def photograph(seed: int) -> np.ndarray:
    """Pixels (HEIGHT, WIDTH, 3) uint8 whose spectrum falls as f^-1.25; its colours are related."""
    chooser = np.random.default_rng(seed)
    shape = (3, HEIGHT, WIDTH // 2 + 1)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = 1
    spectrum = chooser.normal(size=shape) + 1j * chooser.normal(size=shape)
    noise = np.fft.irfft2(spectrum / frequency**1.25, s=(HEIGHT, WIDTH))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    values = 128 + 40 * noise[:1] + 17.5 * noise
    return values.transpose(1, 2, 0).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    found = [folder / f"{i:03}.jpg" for i in range(BATCH)]
    for i, path in enumerate(found):
        content = io.BytesIO()
        Image.fromarray(photograph(i)).save(content, "JPEG", quality=QUALITY)
        path.write_bytes(content.getvalue())
    return found


@pytest.fixture
def torch_alone():
    """Torch's own threads off, in each of the pool's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_ours(files: list[Path], numbers: list[Tensor], threads: int) -> Callable[[], list[Tensor]]:
    """What training does; one worker is the caller's thread, as in every peer."""
    workers = 0 if threads == 1 else threads
    images = load_dataset(str(files[0].parent), "train", image_size=SIDE, workers=workers)
    cuts = {str(i): Cut(SIDE, RECIPE, rows) for i, rows in enumerate(numbers)}
    order = CropOrder(torch.arange(len(files)), cuts)
    return lambda: list(images.read(order).values())


def check(made: list[Tensor], files: list[Path], boxes: list[Boxes]) -> None:
    """Some crops are Pillow's."""
    from PIL import Image

    for i in range(0, len(files), 5):
        with Image.open(files[i]) as image:
            for view, (top, left, height, width) in zip(made, boxes[i], strict=True):
                part = image.crop((left, top, left + width, top + height))
                part = part.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                expected = torch.from_numpy(np.array(part)).permute(2, 0, 1)
                difference = (view[i].int() - expected.int()).abs()
                assert int(difference.max()) <= MOST_LEVELS
                assert float(difference.float().mean()) <= MEAN_LEVELS


def bench_two_crops(benchmark, report, files, torch_alone, contender, threads):
    count = f"{threads} thread{'s' * (threads > 1)}"
    group = f"2 crops of {SIDE}px of {BATCH} JPEGs, {count}"
    reason = absent(contender) if contender != OURS else absent("torchvision PIL")
    if reason:
        report(Row(group, contender, note=reason))
        pytest.skip(reason)
    keep_freed_pages()
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.rand((BATCH, CROP_COLUMNS), generator=generator) for _ in range(2)]
    rows = zip(*(x.tolist() for x in numbers), strict=True)
    boxes = [[draw_box(row, HEIGHT, WIDTH, RECIPE) for row in pair] for pair in rows]
    ours = make_ours(files, numbers, threads)
    check(ours(), files, boxes)
    make, other = ours, None
    if contender != OURS:
        make, other = make_peer(contender, files, boxes, SIDE, threads), ours
        made = make()
        if contender == "DALI":  # its boxes are its own
            assert [view.shape for view in made] == [(BATCH, 3, SIDE, SIDE)] * 2
        elif contender not in DECODERS:
            check(made, files, boxes)
    benchmark.group = group
    timing = measure(benchmark, make, other, seconds=SECONDS, most=MOST_ROUNDS)
    if timing is None:  # --benchmark-disable: the check alone
        return
    images_per_s = BATCH / timing.seconds
    report(
        Row(
            group, contender, timing.seconds, images_per_s=images_per_s,
            over_ours=timing.over_ours,
        )
    )  # fmt: skip
    benchmark.extra_info.update(
        conditions("cpu"),
        contender=contender,
        pool_threads=threads,
        images_per_s=images_per_s,
        images_per_s_per_core=images_per_s / threads,
    )
