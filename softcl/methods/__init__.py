"""Methods: one page each with paper, formula, defaults and loss. METHODS maps names to them.

Each is also a loss module for training loops of your own: see :mod:`softcl.methods.losses`.
"""

from softcl.methods.ascl import ASCL
from softcl.methods.defaults import Defaults
from softcl.methods.method import (
    Batch,
    Method,
    QueueMethod,
    RelationalMethod,
    Result,
    View,
)
from softcl.methods.moco import MoCo
from softcl.methods.msf import MSF
from softcl.methods.nnclr import NNCLR
from softcl.methods.reco import ReCo
from softcl.methods.ressl import ReSSL
from softcl.methods.sce import SCE
from softcl.methods.seed import SEED
from softcl.methods.snclr import SNCLR

METHODS: dict[str, type[Method]] = {
    "ascl": ASCL,
    "snclr": SNCLR,
    "reco": ReCo,
    "moco": MoCo,
    "ressl": ReSSL,
    "sce": SCE,
    "nnclr": NNCLR,
    "msf": MSF,
    "seed": SEED,
}

__all__ = [
    "ASCL",
    "METHODS",
    "MSF",
    "NNCLR",
    "SCE",
    "SEED",
    "SNCLR",
    "Batch",
    "Defaults",
    "Method",
    "MoCo",
    "QueueMethod",
    "ReCo",
    "ReSSL",
    "RelationalMethod",
    "Result",
    "View",
]
