"""Networks and state: backbones, heads, teacher, split batch norm, memory queue.

Nothing here knows that a loss exists. Backbones need timm (``softcl[train]``), imported when one is
built; the rest needs torch alone.
"""

from softcl.nn.backbones import build_backbone
from softcl.nn.encoder import Encoder, make_teacher, shuffled, update_teacher
from softcl.nn.heads import Projector, build_head
from softcl.nn.queue import MemoryQueue
from softcl.nn.split_batch_norm import SplitBatchNorm2d, convert_split_batch_norm

__all__ = [
    "Encoder",
    "MemoryQueue",
    "Projector",
    "SplitBatchNorm2d",
    "build_backbone",
    "build_head",
    "convert_split_batch_norm",
    "make_teacher",
    "shuffled",
    "update_teacher",
]
