"""ASCL in plain PyTorch: a student, its moving average, a queue, and softcl's loss.

    python examples/plain_pytorch.py FOLDER          # images in one subfolder or more
    python examples/plain_pytorch.py --fake          # random images, to see it run

Needs torch, torchvision and softcl. Any backbone, loader and optimiser will do: the lines that
softcl adds to a training loop are marked with an arrow.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

from softcl.methods.losses import ASCLLoss  # <-
from softcl.nn import MemoryQueue  # <-

MOMENTUM = 0.99  # of the teacher


class TwoViews:
    """A strong view for the student, a weak one for the teacher."""

    def __init__(self, size: int) -> None:
        crop = [v2.ToImage(), v2.RandomResizedCrop(size, (0.2, 1.0)), v2.RandomHorizontalFlip()]
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
        jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
        color = [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(0.2)]
        self.strong, self.weak = v2.Compose(crop + color + end), v2.Compose(crop + end)

    def __call__(self, image):
        return self.strong(image), self.weak(image)


def make_student() -> nn.Module:
    """ResNet-18 for small images, with a projector to 128 dimensions."""
    network = models.resnet18(num_classes=128)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    return network


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module) -> None:
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1.0 - MOMENTUM)


def main() -> None:
    parser = argparse.ArgumentParser(description="ASCL in plain PyTorch")
    parser.add_argument("folder", nargs="?", help="images, in subfolders")
    parser.add_argument("--fake", action="store_true", help="512 random images instead")
    parser.add_argument("--size", type=int, default=32, help="side of the views in pixels")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    if not (arguments.fake or arguments.folder):
        parser.error("name a folder of images, or --fake")

    views = TwoViews(arguments.size)
    if arguments.fake:
        images = datasets.FakeData(512, (3, 40, 40), transform=views)
    else:
        images = datasets.ImageFolder(arguments.folder, views)
    loader = DataLoader(
        images, arguments.batch_size, shuffle=True, drop_last=True, num_workers=arguments.workers
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = make_student().to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    queue = MemoryQueue(4096, 128).to(device)  # <-
    criterion = ASCLLoss(num_neighbors=5)  # <-
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, arguments.epochs * len(loader)
    )

    for epoch in range(1, arguments.epochs + 1):
        total = torch.zeros((), device=device)
        for (strong, weak), _ in loader:
            follow(teacher, student)
            query = student(strong.to(device))
            with torch.no_grad():
                key = teacher(weak.to(device))
            loss = criterion(query, key, queue)  # <-
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            queue.enqueue(key)  # <-
            total += loss.detach()
        print(f"epoch {epoch}/{arguments.epochs}  loss {total.item() / len(loader):.4f}")
    torch.save(student.state_dict(), "student.pt")


if __name__ == "__main__":
    main()
