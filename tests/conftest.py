"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def nan_filled_memory():
    """torch.empty returns NaN (and the largest integer): nothing unwritten goes unnoticed."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton's kernels run: "cpu" in its interpreter, "cuda", or the test is skipped."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return "cuda"
