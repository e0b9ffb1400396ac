"""A small student distilled from a teacher, beside the same student trained without one.

    python bench/distill.py                                  # the generated set `shapes`
    python bench/distill.py --data FOLDER --teacher runs/NAME

1. The teacher, a ResNet-18, is trained by ASCL as ``python -m softcl.train --arch resnet18`` does,
   unless --teacher names one.
2. A ResNet-18 of half the width, a quarter of the teacher's multiplications, is trained twice for
   the same steps, from the same weights and on the same images: by ASCL, and by SEED.

The k-NN accuracy of each is printed as a table, beside that of the untrained student. A second call
goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from softcl.nn import build_backbone  # noqa: E402
from softcl.train import Run, fit  # noqa: E402


def half_width(image_size: int) -> nn.Module:
    """ResNet-18 with 32, 64, 128 and 256 channels, and the stem that ours has at this size."""
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    network = ResNet(
        BasicBlock, (2, 2, 2, 2), channels=(32, 64, 128, 256), stem_type="deep", stem_width=16,
        num_classes=0, zero_init_last=False,
    )  # fmt: skip
    if image_size <= 64:
        network.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
    if image_size <= 32:
        network.maxpool = nn.Identity()
    return network


def operations(network: nn.Module, image_size: int) -> float:
    """Of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops()


def trained(out: Path, **settings: Any) -> Run:
    """A run in this folder, from its beginning, its checkpoint, or its end."""
    run = fit(out=str(out), resume="auto", **settings)
    if run.exit_code:
        raise SystemExit(run.exit_code)
    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--teacher", help="of --teacher of softcl.train, in place of one's own")
    parser.add_argument("--arch", default="resnet18", help="of the teacher that is trained here")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8, help="of each student")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-size", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    given = parser.parse_args(argv)
    common = dict(
        data=given.data, image_size=given.image_size, batch_size=given.batch_size,
        queue_size=given.queue_size, num_splits=1, projector_hidden=512, lr=0.06,
    )  # fmt: skip
    teacher, knn = given.teacher, None
    if teacher is None:
        run = trained(given.out / "teacher", arch=given.arch, epochs=given.teacher_epochs, **common)
        teacher, knn = str(run.folder), run.knn
    small = half_width(given.image_size)
    students = {
        method: trained(
            given.out / method, method=method, backbone=small, epochs=given.epochs, **common, **more
        )
        for method, more in (("ascl", {}), ("seed", {"teacher": teacher}))
    }
    large = operations(build_backbone(given.arch, given.image_size), given.image_size)
    share = operations(small, given.image_size) / large
    untrained = students["seed"].result["knn_untrained"]
    print("\n| network | multiplications | trained by | k-NN |\n|---|---|---|---|")
    if knn is not None:
        print(f"| {given.arch} | 1 | ascl, {given.teacher_epochs} epochs | {knn:.1%} |")
    print(f"| half its width | {share:.2f} | untrained | {untrained:.1%} |")
    for method, run in students.items():
        print(f"| half its width | {share:.2f} | {method}, {given.epochs} epochs | {run.knn:.1%} |")


if __name__ == "__main__":
    main()
