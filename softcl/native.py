"""softcl._C, the compiled kernels: loaded once, for all parts of the package.

A kernel gets addresses and sizes by name; 0 is the address of what is absent or not wanted.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch  # before softcl._C, which PyTorch's OpenMP runtime then serves too

# The values of ElementType in csrc/include/softcl/element_type.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The module, or None and why it cannot be used."""
    try:
        from softcl import _C
    except ImportError as error:
        return None, f"softcl._C is not built ({error})"
    return _C, ""


def advice() -> str:
    """How to get the module, here: in a checkout, or in an installed package."""
    if (Path(__file__).parent.parent / "setup.py").exists():
        return "python setup.py build_ext --inplace builds it"
    return "install softcl again from its sources where there is a C++17 compiler"


@functools.cache
def load_for_cpu() -> tuple[ModuleType | None, str]:
    """The same for its CPU kernels, which SOFTCL_CPU_ISA can ask too much of."""
    module, reason = load()
    if module is not None:
        try:
            module.isa()
        except ValueError as error:
            return None, str(error)
    return module, reason
