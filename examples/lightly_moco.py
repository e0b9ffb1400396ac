"""lightly's MoCo, with ASCL's soft labels in place of its NT-Xent loss.

    pip install lightly
    python examples/lightly_moco.py FOLDER

The networks, the views and the loop are those of a lightly user; three lines are softcl's (marked
with an arrow). lightly's loss holds its memory bank itself and fills it in every call; softcl's
queue is yours, and the keys enter it on a line of their own.

Run once with lightly 1.6.0; the tests use stand-ins for its classes.
"""

from __future__ import annotations

import copy
import sys

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from torch import nn

from softcl.methods.losses import ASCLLoss  # <- was lightly.loss.NTXentLoss
from softcl.nn import MemoryQueue  # <-


class MoCo(nn.Module):
    """Backbone and projection head, and their slow copies."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, nn.Flatten(), MoCoProjectionHead(512, 512, 128))
        self.teacher = copy.deepcopy(self.student)
        deactivate_requires_grad(self.teacher)


def main(folder: str, epochs: int = 10) -> None:
    resnet = torchvision.models.resnet18()
    model = MoCo(nn.Sequential(*list(resnet.children())[:-1]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    dataset = LightlyDataset(folder, transform=MoCoV2Transform(input_size=32))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=256, shuffle=True, drop_last=True, num_workers=8
    )
    criterion = ASCLLoss(num_neighbors=5)  # <- was NTXentLoss(memory_bank_size=(4096, 128))
    queue = MemoryQueue(4096, 128).to(device)  # <- was inside that loss
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.06)

    for epoch in range(epochs):
        total = 0.0
        for views, *_ in loader:
            update_momentum(model.student, model.teacher, m=0.99)
            query = model.student(views[0].to(device))
            with torch.no_grad():
                key = model.teacher(views[1].to(device))
            loss = criterion(query, key, queue)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            queue.enqueue(key)  # <-
            total += loss.item()
        print(f"epoch {epoch:>2}  loss {total / len(loader):.5f}")


if __name__ == "__main__":
    main(sys.argv[1])
