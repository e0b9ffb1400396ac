"""Methods: one page each with paper, formula, defaults and label rule. METHODS maps names to
them."""

from softcl.methods.ascl import ASCL
from softcl.methods.defaults import Defaults

METHODS = {"ascl": ASCL}

__all__ = ["ASCL", "METHODS", "Defaults"]
