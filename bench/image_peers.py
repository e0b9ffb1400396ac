"""The peers of the crops of image files, and what decodes those files alone.

    Pillow decodes         the file's pixels in Pillow's memory, and nothing else: ours needs it too
    torchvision decodes    decode_jpeg alone
    torchvision uint8      decode_jpeg, then v2's resized_crop with antialias, once for each box
    torchvision PIL        Pillow decodes; torchvision's resized_crop of it, once for each box
    DALI                   NVIDIA's CPU path: images.decode, then random_resized_crop for each view

All but the last map over the files by a pool of threads, as ours does, with torch's own threads
off, cut the boxes that they are given, and write their crops into the batch. DALI draws its own
boxes and schedules its own threads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

DECODERS = ("Pillow decodes", "torchvision decodes")
CROPPERS = ("torchvision uint8", "torchvision PIL")
PEERS = (*DECODERS, *CROPPERS, "DALI")

Boxes = Sequence[tuple[int, int, int, int]]  # of one image: top, left, height and width


def absent(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    modules = ("nvidia.dali",) if peer == "DALI" else ("torchvision", "PIL")
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the package that it would be part of
            found = None
        if found is None:
            return f"not run: {module} is not installed"
    return None


def _decode_by_pillow(path: Path):
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image


def _decode_by_torchvision(path: Path) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return decode_jpeg(read_file(str(path)), ImageReadMode.RGB)


def _crop_uint8(path: Path, boxes: Boxes, side: int) -> list[Tensor]:
    from torchvision.transforms.v2.functional import resized_crop

    image = _decode_by_torchvision(path)
    return [resized_crop(image, *box, [side, side], antialias=True) for box in boxes]


def _crop_pil(path: Path, boxes: Boxes, side: int) -> list[Tensor]:
    from torchvision.transforms.functional import pil_to_tensor, resized_crop

    image = _decode_by_pillow(path)
    return [pil_to_tensor(resized_crop(image, *box, [side, side])) for box in boxes]


def make_peer(
    peer: str, files: Sequence[Path], boxes: Sequence[Boxes], side: int, threads: int
) -> Callable[[], list[Tensor]]:
    """What makes the crops of a batch: uint8 (N, 3, side, side) of each view; none of a decoder."""
    if peer == "DALI":
        return _make_dali(files, len(boxes[0]), side, threads)
    mapped = map if threads == 1 else ThreadPoolExecutor(threads).map
    if peer in DECODERS:
        decode = _decode_by_pillow if peer == DECODERS[0] else _decode_by_torchvision

        def decode_all() -> list[Tensor]:
            for _ in mapped(decode, files):
                pass
            return []

        return decode_all
    crop = _crop_uint8 if peer == CROPPERS[0] else _crop_pil

    def crop_all() -> list[Tensor]:
        shape = (len(files), 3, side, side)
        views = [torch.empty(shape, dtype=torch.uint8) for _ in boxes[0]]

        def work(i: int) -> None:
            for view, made in zip(views, crop(files[i], boxes[i], side), strict=True):
                view[i] = made

        for _ in mapped(work, range(len(files))):
            pass
        return views

    return crop_all


def _make_dali(files: Sequence[Path], views: int, side: int, threads: int):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(files), num_threads=threads, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=[str(path) for path in files])
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        options = dict(device="cpu", size=(side, side), random_area=(0.2, 1.0), antialias=True)
        return tuple(fn.random_resized_crop(image, **options) for _ in range(views))

    built = pipeline()
    built.build()
    return lambda: [torch.from_numpy(view.as_array()).permute(0, 3, 1, 2) for view in built.run()]
