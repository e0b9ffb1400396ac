"""A Hugging Face data set, any network, and softcl's whole training loop in one call.

    pip install datasets "softcl[train]"
    python examples/huggingface_datasets.py FOLDER

FOLDER holds images; ``load_dataset("cifar10", split="train")`` or any other set with a column of
images works as well. With labels a k-NN accuracy is printed while the run goes on.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from torch import nn
from torchvision import models

from softcl.train import fit  # <-


def main(folder: str, **numbers: object) -> None:
    images = load_dataset("imagefolder", data_dir=folder, split="train")
    network = models.resnet18()
    network.fc = nn.Identity()  # 512 features for each image

    def tell(moment) -> None:
        print(f"epoch {moment.epoch:g}: loss {moment.loss:.4f}")

    run = fit(data=images, backbone=network, method="ascl", on_epoch=tell, **numbers)  # <-
    print(f"{len(run.history)} rows in {run.folder}, k-NN {run.knn}")


if __name__ == "__main__":
    main(sys.argv[1])
