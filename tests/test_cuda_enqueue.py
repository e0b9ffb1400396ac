"""The CUDA enqueue against the CPU's (needs a GPU), and what the module says of devices."""

from __future__ import annotations

import pytest
import torch

_C = pytest.importorskip("softcl._C", reason="softcl._C is not built")

needs_cuda_build = pytest.mark.skipif(not _C.has_cuda(), reason="softcl._C has no CUDA")
needs_gpu = pytest.mark.skipif(
    not (_C.has_cuda() and torch.cuda.is_available()), reason="no CUDA device"
)

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(ELEMENT_TYPES)


def sizes(keys: torch.Tensor, queue: torch.Tensor, pointer: int, normalize: bool) -> dict:
    return dict(
        keys=keys.data_ptr(),
        queue=queue.data_ptr(),
        num_keys=len(keys),
        queue_size=len(queue),
        dim=queue.shape[1],
        pointer=pointer,
        key_type=ELEMENT_TYPES[keys.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        normalize=normalize,
    )


def test_devices_are_those_of_torch() -> None:
    assert _C.cuda_device_count() == (torch.cuda.device_count() if _C.has_cuda() else 0)
    assert (_C.cuda_no_device_reason() == "") == (_C.cuda_device_count() > 0)


@needs_cuda_build
def test_unknown_device_is_refused() -> None:
    count = _C.cuda_device_count()
    for index in (-1, count):
        for query in (_C.cuda_device_name, _C.cuda_compute_capability):
            with pytest.raises(ValueError, match=rf"index={index}, must be in \[0, {count}\)"):
                query(index)


@needs_cuda_build
@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_keys", -1), ("queue_size", 0), ("dim", 0), ("pointer", -1), ("pointer", 5), ("keys", 0)],
)
def test_bad_argument_is_refused_before_any_launch(argument: str, value: int) -> None:
    keys, queue, refused = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(1, dtype=torch.int64)
    arguments = sizes(keys, queue, 0, True) | {argument: value}
    with pytest.raises(ValueError, match=argument):
        _C.cuda_enqueue(**arguments, refused=refused.data_ptr(), device=0, stream=0)


@needs_gpu
def test_device_is_described_as_by_torch() -> None:
    assert _C.cuda_device_name(0) == torch.cuda.get_device_name(0)
    assert _C.cuda_compute_capability(0) == torch.cuda.get_device_capability(0)


@needs_gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("key_dtype", DTYPES)
def test_agrees_with_cpu(key_dtype, queue_dtype, normalize) -> None:
    generator = torch.Generator().manual_seed(0)
    for N, K, D, pointer in [
        (0, 3, 4, 1),
        (1, 1, 1, 0),
        (5, 8, 33, 6),
        (20, 7, 128, 3),
        (64, 64, 5, 0),
    ]:
        keys = torch.randn(N, D, generator=generator).to(key_dtype)
        for row, value in [(0, float("nan")), (3, 0.0), (5, float("inf"))]:
            if row < N:
                keys[row] = value
        queue = torch.randn(K, D, generator=generator).to(queue_dtype)
        on_gpu, gpu_keys = queue.cuda(), keys.cuda()
        refused = torch.zeros(1, dtype=torch.int64, device="cuda")
        _C.cuda_enqueue(
            **sizes(gpu_keys, on_gpu, pointer, normalize),
            refused=refused.data_ptr(),
            device=torch.cuda.current_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
        expected_refused = _C.cpu_enqueue(**sizes(keys, queue, pointer, normalize))
        assert int(refused) == expected_refused
        # The sums of squares may differ in the last bit of double: one ulp after the cast.
        tolerance = torch.finfo(queue_dtype).eps if normalize else 0.0
        torch.testing.assert_close(on_gpu.cpu(), queue, rtol=tolerance, atol=0.0)
