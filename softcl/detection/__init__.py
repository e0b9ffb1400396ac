"""Detection: what `softcl detect` trains on top of a backbone, by torchvision.

scenes     generated images of figures with boxes and masks, written as a COCO folder
sets       COCO and Pascal VOC folders, and their average precision by pycocotools
model      a ResNet with a feature pyramid under Faster or Mask R-CNN
"""
