"""Weak and strong view of a batch: ours, batched, and torchvision's transforms image by image.

    pytest bench/bench_views.py --benchmark-only [--full] [--peer torchvision] [--threads 2] ...

A round makes both views of a batch of 256 (32 px; with --full also 96 -> 64 px and 64 of 256 -> 224
px), as every step of ASCL or MoCo needs them. Ours is first held to Pillow: some samples, made with
the same parameters. images_per_s in the extra information counts a pair of views as one image.

"cpu" is the compiled kernel and "torch on the CPU" PyTorch's operations, to which it is an
alternative; "triton" is the kernel for GPUs and "torch on the GPU" the same operations there, both
with numbers drawn on the GPU. Two of a device take turns, and the row of PyTorch's says how much
longer it takes than the kernel, call by call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from bench.machine import conditions
from bench.table import Row
from bench.timing import measure
from bench.view_peers import PEERS, absent, by_pillow, make_peer
from softcl.data import STATISTICS, ImageSet, make_shapes, strong_view, weak_view
from softcl.data.recipe import RECIPES, draw
from softcl.data.views import kernel_missing
from softcl.train.parts import keep_freed_pages

ON_CPU, ON_GPU = "torch on the CPU", "torch on the GPU"
SECONDS, MOST_ROUNDS = 3.0, 50
CHECKED = 32
# In levels of 8 bits. Pillow rounds after each operation, and its hue has 256 values.
MEAN_LEVELS, WORST_LEVELS = 1.5, 8.0


@dataclass(frozen=True)
class Work:
    """Both views, `side` px wide, of a batch of images `source` px wide."""

    batch: int
    source: int
    side: int

    def __str__(self) -> str:
        return f"views {self.batch}x{self.source}px to {self.side}px"


QUICK = (Work(256, 32, 32),)
FULL = (*QUICK, Work(256, 96, 64), Work(64, 256, 224))


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    compiled = kernel_missing(torch.device("cpu")) is None
    ours = [*["cpu"] * compiled, ON_CPU, *["triton", ON_GPU] * torch.cuda.is_available()]
    # --backend reference: PyTorch's operations.
    chosen = option("--backend") or ["cpu", "triton", "reference"]
    ours = [x for x in ours if ("reference" if x in (ON_CPU, ON_GPU) else x) in chosen]
    peers = [x for x in option("--peer") or PEERS if x in PEERS]
    metafunc.parametrize("work", FULL if option("--full") else QUICK, ids=str)
    metafunc.parametrize("contender", [*ours, *peers], ids=lambda x: x.replace(" ", "-"))


def make_images(work: Work) -> ImageSet:
    """A batch of the generated set, enlarged where it is too small."""
    pixels = make_shapes(work.batch).images
    if work.source != pixels.shape[-1]:
        size = (work.source, work.source)
        pixels = torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic")
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    mean, std = STATISTICS["shapes"]
    return ImageSet(pixels, None, [], mean, std, "shapes", "shapes")


def make_ours(images: ImageSet, side: int, device: str, kernel: bool) -> Callable[[], object]:
    pixels, generator = images.images.to(device), torch.Generator(device)
    common = (side, images.mean, images.std, generator)

    def make():
        pair = tuple(view(pixels, *common, kernel=kernel) for view in (weak_view, strong_view))
        if device == "cuda":
            torch.cuda.synchronize()
        return pair

    return make


def check(images: ImageSet, side: int, device: str, kernel: bool) -> None:
    """Both views of some samples agree with Pillow's, made with the same parameters."""
    images = ImageSet(images.images[:CHECKED], None, [], images.mean, images.std, images.name)
    height, width = images.size
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (images.mean, images.std))
    for view, recipe in ((weak_view, RECIPES["weak"]), (strong_view, RECIPES["strong"])):
        common = (side, images.mean, images.std)
        # A generator on the CPU gives the same numbers for every device.
        same = torch.Generator().manual_seed(1)
        made = view(images.images.to(device), *common, same, kernel=kernel).cpu()
        numbers = torch.rand((CHECKED, recipe.columns), generator=same.manual_seed(1))
        table = draw(numbers, height, width, recipe)
        expected = [by_pillow(x, row, side) for x, row in zip(images.images, table, strict=True)]
        levels = ((made * std + mean - torch.stack(expected)) * 255).abs().flatten(1)
        assert float(levels.mean()) <= MEAN_LEVELS, f"{levels.mean():.2f} levels off Pillow"
        worst = float(levels.quantile(0.99, dim=1).max())
        assert worst <= WORST_LEVELS, f"a sample is {worst:.1f} levels off Pillow's"


def bench_weak_and_strong(benchmark, report, work, contender):
    group, device = str(work), "cuda" if contender in ("triton", ON_GPU) else "cpu"
    reason = absent()
    if reason:
        report(Row(group, contender, note=reason))
        pytest.skip(reason)
    keep_freed_pages()
    images, batches, ours = make_images(work), 1, None
    if contender in PEERS:
        make, batches = make_peer(contender, images, work.batch, work.side)
    else:
        kernel = contender in ("cpu", "triton")
        check(images, work.side, device, kernel)
        make = make_ours(images, work.side, device, kernel)
        if not kernel and kernel_missing(torch.device(device)) is None:
            ours = make_ours(images, work.side, device, True)
            ours()
    make()
    benchmark.group = group
    # Peers take no turns: worker processes would go on while ours ran, and the ratios are no close
    # ones.
    timing = measure(benchmark, make, ours, device=device, seconds=SECONDS, most=MOST_ROUNDS)
    if timing is None:  # --benchmark-disable: the check alone
        return
    seconds = timing.seconds / batches
    images_per_s = work.batch / seconds
    report(Row(group, contender, seconds, images_per_s=images_per_s, over_ours=timing.over_ours))
    benchmark.extra_info.update(
        conditions(device),
        contender=contender,
        batches=batches,
        images_per_s=images_per_s,
    )
