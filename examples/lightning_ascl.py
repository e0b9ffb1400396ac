"""ASCL as a Lightning module, on one device or several.

    pip install lightning torchvision
    python examples/lightning_ascl.py FOLDER
    python examples/lightning_ascl.py --fake --epochs 1

FOLDER has images in subfolders, whose names are not used. Lines with an arrow are softcl's. The
queue is a part of the module, so that checkpoints hold it; under DDP every process enqueues the
keys of all, and has the same queue.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

from softcl.methods.losses import ASCLLoss  # <-
from softcl.nn import MemoryQueue, make_teacher, update_teacher  # <-


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


class ASCL(L.LightningModule):
    """A ResNet-18 with a projector to 128 dimensions, its teacher and the queue."""

    def __init__(self, queue_size: int = 4096, lr: float = 0.03) -> None:
        super().__init__()
        self.lr = lr
        self.student = models.resnet18(num_classes=128)
        self.student.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
        self.teacher = make_teacher(self.student)
        self.queue = MemoryQueue(queue_size, 128)  # <-
        self.criterion = ASCLLoss(num_neighbors=5)  # <-

    def training_step(self, batch: tuple, _index: int) -> Tensor:
        (strong, weak), _ = batch
        update_teacher(self.teacher, self.student, 0.99)
        query = self.student(strong)
        with torch.no_grad():
            key = self.teacher(weak)
        loss = self.criterion(query, key, self.queue)  # <-
        # Loss and gradient are known: the queue may change before the backward pass.
        several = self.trainer.world_size > 1
        self.queue.enqueue(self.all_gather(key).flatten(0, 1) if several else key)  # <-
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(
            self.student.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4
        )
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="ASCL in Lightning")
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
    trainer = L.Trainer(max_epochs=arguments.epochs, logger=False)
    trainer.fit(ASCL(), loader)
    print(f"loss {float(trainer.callback_metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
