"""Sets of images whose list and pixels are kept, for the tests of it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from softcl.data import ImageSet, load_dataset

Image = pytest.importorskip("PIL.Image")


def read(images: Path, kept: Path | str, **options) -> ImageSet:
    return load_dataset(str(images), "train", cache=kept, **options)


def entries(kept: Path, kind: str = "pixels") -> list[Path]:
    return [path for path in sorted(kept.glob(f"{kind}-*")) if path.suffix != ".lock"]


def tar_of(folder: Path, shards: int, each: int) -> Path:
    """Shards of one-colour images; label and colour tell which one it is."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as archive:
            for number in range(each):
                place = shard * each + number
                color = (place % 256, place // 256, 7)
                file = io.BytesIO()
                Image.new("RGB", (4, 4), color).save(file, "PPM")
                for suffix, data in (("ppm", file.getvalue()), ("cls", b"%d" % (place % 10))):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def fails(*_, **__):
    raise AssertionError("read again")
