"""Triton kernels of softcl, imported as ``softcl.kernels``.

Names belong in the modules beside this file, not here: a source checkout reaches them through
``softcl/kernels.py``, which does not run this file.
"""

if __name__ != "softcl.kernels":
    raise ImportError(
        f"this is the package softcl.kernels, imported as {__name__!r}; write "
        "'import softcl.kernels' (the package 'kernels' on PyPI is another project)"
    )
