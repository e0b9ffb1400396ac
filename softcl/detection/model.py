"""Faster and Mask R-CNN of torchvision on a ResNet of ours.

The pyramid has a level for each of the ResNet's four stages and one below the last. Anchors are
eight times a level's stride, which is 32 to 512 pixels for the usual stem, and fits the stem of
small images too. Batch norms are trained, in the pyramid as well (as MoCo does, arXiv 1911.05722):
from weights that no supervision has scaled, frozen ones would have statistics that do not fit.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from softcl.errors import ConfigError
from softcl.nn.pretrained import Pretrained

STAGES = ("layer1", "layer2", "layer3", "layer4")
RATIOS = (0.5, 1.0, 2.0)


def build_detector(
    weights: Pretrained,
    num_classes: int,
    image_size: int,
    *,
    masks: bool,
    channels: int,
    regions: int,
) -> nn.Module:
    """A detector that starts from the weights; all else of it is random.

    Args:
        num_classes: without the background.
        image_size: shorter side of the images in pixels; the longer one is at most 5/3 of it.
        channels: of the pyramid.
        regions: of an image that the heads learn from, drawn from four times so many that the
            proposals' network likes best; in a test the heads judge twice so many.

    Raises:
        ConfigError: the backbone has no four stages.
    """
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone = copy.deepcopy(weights.backbone)
    if not all(hasattr(backbone, stage) for stage in STAGES):
        reason = "has no maps of four sizes: detection takes ResNets"
        raise ConfigError("arch", weights.arch, reason)
    widths, strides = measure_stages(backbone, max(image_size, 64))
    pyramid = BackboneWithFPN(
        backbone,
        {stage: str(place) for place, stage in enumerate(STAGES)},
        widths,
        channels,
        norm_layer=nn.BatchNorm2d,
    )
    strides = [*strides, 2 * strides[-1]]
    sizes = tuple((8 * stride,) for stride in strides)
    levels = [str(place) for place in range(len(STAGES))]
    options = dict(
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 49, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, num_classes + 1),
        rpn_pre_nms_top_n_train=4 * regions,
        rpn_post_nms_top_n_train=4 * regions,
        rpn_pre_nms_top_n_test=2 * regions,
        rpn_post_nms_top_n_test=2 * regions,
        box_batch_size_per_image=regions,
        min_size=image_size,
        max_size=image_size * 5 // 3,
        image_mean=list(weights.mean),
        image_std=list(weights.std),
    )
    if not masks:
        return FasterRCNN(pyramid, **options)
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    return MaskRCNN(
        pyramid,
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        **options,
    )


@torch.no_grad()
def measure_stages(backbone: nn.Module, side: int) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps after each of STAGES."""
    widths, strides = [], []

    def look(_: nn.Module, __: object, found: torch.Tensor) -> None:
        widths.append(found.shape[1])
        strides.append(round(side / found.shape[2]))

    hooks = [getattr(backbone, stage).register_forward_hook(look) for stage in STAGES]
    training = backbone.training
    try:
        backbone.eval()(torch.zeros(1, 3, side, side))
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    return widths, strides


def train_mode(detector: nn.Module, freeze_norms: bool) -> None:
    """Training mode, but for the backbone's batch norms where these are frozen."""
    detector.train()
    if freeze_norms:
        for module in detector.backbone.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
