"""``softcl.kernels`` in a source checkout: its modules lie in ``kernels/``, beside ``softcl/``.

An installed softcl holds that folder as ``softcl/kernels/`` and this file is left out of it.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
