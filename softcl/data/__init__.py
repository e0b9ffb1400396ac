"""Data: image sets, and random views of their batches. Nothing here knows a loss or a network."""

from softcl.data.formats import FORMATS
from softcl.data.formats import find as find_format
from softcl.data.image_set import STATISTICS, DataError, ImageSet
from softcl.data.load import SPLITS, load_dataset, training_split
from softcl.data.prefetch import batches
from softcl.data.sampler import batch_indices, num_batches
from softcl.data.shapes import make_shapes
from softcl.data.sheet import contact_sheet
from softcl.data.views import VIEWS, center_view, random_view, strong_view, weak_view

__all__ = [
    "FORMATS",
    "SPLITS",
    "STATISTICS",
    "VIEWS",
    "DataError",
    "ImageSet",
    "batch_indices",
    "batches",
    "center_view",
    "contact_sheet",
    "find_format",
    "load_dataset",
    "make_shapes",
    "num_batches",
    "random_view",
    "strong_view",
    "training_split",
    "weak_view",
]
